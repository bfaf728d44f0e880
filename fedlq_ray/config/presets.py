"""Defaults of settings that differ from one dataset to another, by `data.name`."""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "shakespeare": {
        "problem": "tokens",
        "target": None,
        "clients.count": 200,
        "data.partition": "natural",
        "data.min_samples": 10,
        "evaluate_every": 5,
        "model.name": "lstm",
        "model.args": {"hidden": 128},
        "train.lr": 3.0,
        "train.batch_size": 4,
        "train.max_grad_norm": 1.0,
    },
    "leaf": {"data.partition": "natural"},
    "diabetes": {
        "problem": "regression",
        "target": None,
        "clients.count": 10,
        "data.partition": "iid",
        "model.name": "mlp",
        "model.args": {"hidden": []},
        "train.lr": 0.03,
    },
}


def fill(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the settings of a dataset where nothing else is set; a model's arguments are for that model only."""
    filled = dict(settings)
    name = _given(filled.get("data", {})).get("name")
    model = _given(filled.get("model", {})).get("name")
    for path, value in PRESETS.get(str(name), {}).items():
        section, dot, key = path.rpartition(".")
        if path == "model.args" and model not in (None, PRESETS[str(name)].get("model.name")):
            continue
        if dot:
            filled[section] = {key: value, **_given(filled.get(section, {}))}
        else:
            filled.setdefault(key, value)
    return filled


def _given(section: Any) -> dict[str, Any]:
    """What was set in a section, which is a mapping or has been checked already."""
    if isinstance(section, Mapping):
        return dict(section)
    return {name: getattr(section, name) for name in getattr(section, "model_fields_set", ())}
