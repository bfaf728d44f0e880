"""A simulator of communication-efficient federated learning: clients as Ray actors, quantized layer by layer."""

import importlib
import os
from typing import TYPE_CHECKING, Any

from fedlq_ray.errors import CheckpointError, ClientError, ConfigError, DivergedError, FedLQError, PayloadError

if TYPE_CHECKING:
    from fedlq_ray.api import Comparison, Forecast, Result, compare, plan, resume, simulate, sweep
    from fedlq_ray.config.load import Config

__all__ = [
    "CheckpointError",
    "ClientError",
    "Comparison",
    "Config",
    "ConfigError",
    "DivergedError",
    "FedLQError",
    "Forecast",
    "PayloadError",
    "Result",
    "compare",
    "plan",
    "resume",
    "simulate",
    "sweep",
]
# Imported when they are asked for: client processes need neither, and startup.py comes before all libraries.
_LATER = {"Config": "config.load"} | dict.fromkeys(
    ("Comparison", "Forecast", "Result", "compare", "plan", "resume", "simulate", "sweep"), "api"
)

if os.path.expanduser("~") == "~":  # no HOME, and no entry of the user's: MLflow and others could not be imported
    os.environ["HOME"] = "/nonexistent"


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    except Exception as exc:
        from fedlq_ray.shadows import explain

        told = explain()
        if told is None:
            raise
        raise ImportError(told) from exc
