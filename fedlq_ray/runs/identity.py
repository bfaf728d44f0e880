"""A run's identity, stored in its checkpoints: a resumed run must have the same one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlq_ray.config.load import WITHOUT_EFFECT, flat
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.availability import Intervals
from fedlq_ray.federation.task import Task
from fedlq_ray.quantization import Always
from fedlq_ray.strategies import Strategy

_FREE = {"rounds", *WITHOUT_EFFECT}
FROZEN = "frozen parameters"
TIMES = "the file of clients.availability"
RATES = "the file of network.bandwidth"
_GIVEN = ("data", "model", "strategy", "quantizer", "problem", "local")  # parts that may be given as objects


def identity(task: Task, strategy: Strategy) -> dict[str, Any]:
    """The settings that determine a result, by path, and digests, sizes and names of objects."""
    settings = flat(task.config).items()
    layers = [[layer.name, layer.size] for layer in task.layers]
    digest = hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:8]
    family = task.quantizer
    times = {TIMES: task.availability.digest} if isinstance(task.availability, Intervals) else {}
    rates = {RATES: task.bandwidth.digest} if task.bandwidth.of_clients else {}
    frozen = {} if task.frozen_digest is None else {FROZEN: task.frozen_digest}
    return {
        **{path: value for path, value in settings if path not in _FREE},
        "data": task.data_digest,
        "model": f"{sum(layer.size for layer in task.layers)} numbers in {len(layers)} layers ({digest})",
        **frozen,
        **times,
        **rates,
        "problem": _name(task.problem),
        "local": None if task.local is None else _name(task.local),
        "strategy": _name(strategy),
        "quantizer": _name(family.quantizer if isinstance(family, Always) else family),
    }


def _name(part: Any) -> str:
    """Name of a class, a function, or an object's class, without a user's module, which may differ on resume."""
    kind = part if hasattr(part, "__qualname__") else type(part)
    return f"fedlq_ray.{kind.__qualname__}" if kind.__module__.startswith("fedlq_ray.") else kind.__qualname__


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Requires the same identity. Entries that another version of this program does not have are not compared.

    Raises:
        ConfigError: the identities differ; the message names every difference.
    """
    changed = [name for name, value in before.items() if now.get(name, value) != value]
    if not changed:
        return
    told = [f"{name} was {json.dumps(before[name])} and is {json.dumps(now[name])}" for name in changed]
    given = [name for name in _GIVEN if name in changed or name == "model" and FROZEN in changed]
    if "local" in given:  # it may give the model buffers
        given = [name for name in given if name != "model"]
    if given:
        objects = ", ".join(f"{name}=..." for name in given)
        told.append(f"give the {' and '.join(given)} that it began with (in Python: resume(..., {objects}))")
    if TIMES in changed or RATES in changed:
        told.append("restore the file")
    if any(name not in (*_GIVEN, FROZEN, TIMES, RATES) for name in changed):
        told.append("set config.yaml back")
    raise ConfigError(f"{folder}: cannot resume as a different run: {'; '.join(told)}")
