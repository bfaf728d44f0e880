"""A run goes on as the run that its checkpoint is of, or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import KINDS, SMALL, cut, evidence, start
from torch import nn

from fedlq_ray import resume, simulate
from fedlq_ray.config import load as configuration
from fedlq_ray.data import Dataset
from fedlq_ray.errors import ConfigError
from fedlq_ray.quantization import MinMax, Quantizer
from fedlq_ray.runs.identity import require_same
from fedlq_ray.strategies import STRATEGIES as BY_NAME


class Own(BY_NAME["uniform"]):  # type: ignore[valid-type,misc]
    pass


def own_quantizer(bits: int) -> Quantizer:
    return MinMax(bits)


def own_model(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def own_data() -> tuple[Any, ...]:
    x, y = np.random.default_rng(0).integers(0, 16, (420, 8, 8), np.uint8), np.arange(420) % 10
    return x[:400], y[:400], x[400:], y[400:]


@pytest.mark.parametrize(
    "given",
    [{"strategy": Own}, {"quantizer": own_quantizer}, {"model": own_model}, {"data": own_data()}],
    ids=lambda given: next(iter(given)),
)
def test_what_was_given_must_be_given_again(given: dict[str, Any], tmp_path: Path) -> None:
    """Each alone is told, and nothing is written."""
    out = tmp_path / "run"
    simulate(configuration.load(None, [*SMALL, "strategy.name=uniform", f"out={tmp_path / 'whole'}"]), **given)
    cut(out, "strategy.name=uniform", **given)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    (name,) = given
    with pytest.raises(ConfigError, match=rf"{name} was .* and is .*resume\(\.\.\., {name}=\.\.\.\)"):
        resume(out, ["rounds=5"])
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    resume(out, **given)
    assert evidence(out) == evidence(tmp_path / "whole")


def test_settings_that_were_changed_in_the_folder(tmp_path: Path, whole: dict[str, tuple[bytes, str]]) -> None:
    out = tmp_path / "run"
    cut(out, *KINDS["rd"])
    settings = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(settings.replace("  lr: 0.1\n", "  lr: 0.5\n", 1))
    with pytest.raises(ConfigError, match=r"train.lr was 0.1 and is 0.5; set config.yaml back"):
        resume(out)
    (out / "config.yaml").write_text(settings)
    resume(out, ["name=other", "clients.retries=0"])  # without effect
    assert evidence(out) == whole["rd"]


def test_data_are_told_apart_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in every round: it reads all of them."""
    made, real = [], Dataset.digest
    monkeypatch.setattr(Dataset, "digest", lambda data: made.append(data) or real(data))
    start(tmp_path / "run")
    assert len(made) == 1


def test_what_another_version_does_not_know_is_not_compared(tmp_path: Path) -> None:
    require_same({"old": 1, "same": [1, 2.5]}, {"new": 2, "same": [1, 2.5]}, tmp_path)
    require_same({}, {"new": 2}, tmp_path)
