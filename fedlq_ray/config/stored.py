"""A strategy's settings in files and digests: those of all schemes, and the form of earlier versions."""

from collections.abc import Mapping
from typing import Any

from fedlq_ray.config.schemes import SCHEMES, Budgeted, Every, StrategyConfig, own_settings, readers


def whole(config: StrategyConfig) -> dict[str, Any]:
    """All settings, as JSON. Settings that a strategy does not read have their defaults; its own ones are in `args`.

    Digests are computed from this, so a setting of another strategy does not change them.
    """
    own = own_settings(type(config))
    found = Every.model_construct().model_dump(mode="json") | config.model_dump(mode="json", exclude=set(own))
    defaults = type(config).model_fields
    args = {name: getattr(config, name) for name in own if getattr(config, name) != defaults[name].default}
    return found | ({"args": args} if own else {})


def fitted(settings: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """A section's settings without those that its strategy does not read; settings in `kept` always stay."""
    kind = SCHEMES.get(str(settings.get("name", "fedlq")), Every)
    return {
        key: value for key, value in settings.items() if key in kept or key in kind.model_fields or not readers(key)
    }


def migrated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Converts an earlier version's settings, which had those of all strategies and own ones in `args`."""
    kind = SCHEMES.get(str(settings.get("name", "fedlq")), Every)
    if kind is Every:
        return dict(settings)
    own = own_settings(kind)
    old = "args" in settings
    found = {k: v for k, v in settings.items() if k in kind.model_fields and not (old and k in own)}
    if old and issubclass(kind, Budgeted) and found.get("budget", "cohort") != "bits":
        found.pop("bits", None)
    return found | dict(settings.get("args") or {})
