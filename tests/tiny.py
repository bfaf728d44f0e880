"""A short run and a small model, of which tests change one thing."""

from pathlib import Path

from torch import nn

from fedlq_ray import Config


def config(out: Path | None = None, **sections) -> Config:
    clients = {"count": 10, "cohort": 4, "hosting": "serial"} | sections.pop("clients", {})
    base = {"rounds": 3, "target": None, "tracking": {"uri": None}, "out": out}
    return Config(**{**base, "clients": clients, **sections})


def layers(*hidden: nn.Module, width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), *hidden, nn.Linear(width, 10))
