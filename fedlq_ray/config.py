"""Settings read from YAML and `key=value` overrides, written as YAML, described, and compared.

`load(path, overrides)` reads and checks; one `ConfigError` tells every fault at once. `settings.py` has the settings.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from fedlq_ray.errors import ConfigError
from fedlq_ray.settings import Config, Section

__all__ = ["Config", "load", "parse", "to_yaml"]

# Keys that cannot change a result: they are left out of config_sha256.
WITHOUT_EFFECT = (
    "name", "out", "tracking", "checkpoint", "clients.hosting", "clients.actors", "clients.retries",
    "clients.timeout_s", "clients.on_failure", "clients.num_cpus", "clients.num_gpus", "clients.resources",
    "clients.labels",
)  # fmt: skip


# What OmegaConf, and YAML's makers of numbers and dates, raise of what a file holds.
UNREADABLE = (
    OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError, OmegaConfBaseException
)  # fmt: skip


def unreadable(source: object, exc: Exception) -> ConfigError:
    """One of `UNREADABLE` as one line."""
    told, where = " ".join(str(exc).split()), str(source)[:300]
    if isinstance(exc, RecursionError):
        told = "is nested too deeply"
    elif not isinstance(exc, OSError | UnicodeDecodeError | yaml.YAMLError | OmegaConfBaseException):
        told = f"holds a value that is not of the type that YAML takes it for ({type(exc).__name__}: {told})"
    return ConfigError(f"{where}: {told}")


def load(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file, and `key=value` overrides of which a later one wins.

    Raises:
        ConfigError: the file cannot be read, or the settings are wrong (all faults in one message).
    """
    tree = OmegaConf.create({})
    source = str(path or "the command line")
    try:
        if path is not None:
            tree = OmegaConf.load(Path(path))  # type: ignore[assignment]
            if not OmegaConf.is_dict(tree):
                raise ConfigError(f"{path}: must hold keys and values, such as `rounds: 10`")
        for override in overrides:
            name, equals, _ = override.partition("=")
            if not equals or not name.strip():
                raise ConfigError(f"{override!r}: is neither a file nor key=value")
            source = override
            change(tree, override)
        source = str(path or "the command line")
        settings = plain(tree)
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file, and no key=value") from exc
    except UNREADABLE as exc:
        raise unreadable(source, exc) from exc
    return parse(settings, source=str(path) if path else None)


def plain(tree: Any) -> Any:
    """An OmegaConf tree as dicts, lists and values."""
    found = OmegaConf.to_container(tree, resolve=True)
    repr(found)  # fails on an integer of thousands of digits, which no message and no file could hold
    return found


def change(tree: Any, override: str) -> None:
    """Set one key=value of an OmegaConf tree: it takes the place of what was there, also where it is a dict."""
    made = OmegaConf.from_dotlist([override])
    path = override.partition("=")[0].strip()
    if isinstance(flat(Config()).get(path), dict):
        OmegaConf.update(tree, path, None, force_add=True)
    tree.merge_with(made)


def parse(settings: Any, *, source: str | None = None) -> Config:
    """A checked configuration from plain dicts.

    Raises:
        ConfigError: every fault, a line each: the key, what is wrong, what was given.
    """
    try:
        return Config.model_validate(_tuples(settings))
    except ValidationError as exc:
        lines = [_fault(error) for error in exc.errors(include_url=False)]
        raise ConfigError("\n".join(([f"in {source}:"] if source else []) + lines)) from exc


def _tuples(value: Any) -> Any:
    """Lists as tuples, which strict validation asks for where a setting is a sequence."""
    if isinstance(value, Mapping):
        return {name: item if name == "args" else _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _fault(error: Any) -> str:
    path = ".".join(str(step) for step in error["loc"])
    given = f" (given: {error['input']!r})" if not isinstance(error["input"], Mapping) else ""
    if error["type"] == "extra_forbidden":
        known = [name for name, _, _ in keys()]
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.5) or [k for k in known if k.endswith("." + path)]
        return f"{path}: unknown key{f'; did you mean {near[0]}?' if near else ''}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path + ': ' if path else ''}{message}"
    return f"{path}: {message[0].lower()}{message[1:]}{given}"


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every setting: its dotted path, its pydantic field, and its default, that without environment variables."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            extra: Any = field.json_schema_extra or {}
            yield f"{prefix}{name}", field, extra.get("default", field.default)


def flat(config: Config) -> dict[str, Any]:
    """Every setting's value, as JSON has it, by its dotted path."""
    settings = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for path, _, _ in keys():
        value: Any = settings
        for step in path.split("."):
            value = value[step]
        found[path] = value
    return found


def describe(path: str, field: Any) -> str:
    """One line on a setting: meaning, unit, bounds or choices."""
    parts = [field.description]
    unit = (field.json_schema_extra or {}).get("unit")
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    metadata = [*field.metadata, *(m for a in get_args(field.annotation) for m in getattr(a, "__metadata__", ()))]
    metadata = [m for item in metadata for m in getattr(item, "metadata", [item])]
    bounds = [f"{s} {getattr(m, n):g}" for n, s in signs.items() for m in metadata if getattr(m, n, None) is not None]
    kinds = [field.annotation, *get_args(field.annotation)]  # a choice, or a choice or null
    choices = [value for kind in kinds for value in get_args(kind) if isinstance(value, str)]
    return "; ".join(
        [*parts]
        + ([f"unit: {unit}"] if unit else [])
        + ([f"bounds: {' and '.join(dict.fromkeys(bounds))}"] if bounds else [])
        + ([f"one of: {', '.join(choices)}"] if choices and bool not in kinds else [])
    )


def to_yaml(config: Config, *, commented: bool = False) -> str:
    """The resolved configuration, without `out`, as YAML that `load` reads back to the same."""
    if not commented:
        return yaml.safe_dump(config.model_dump(mode="json", exclude={"out"}), sort_keys=False, allow_unicode=True)
    settings = flat(config)
    lines: list[str] = []
    section = ""
    for path, field, _ in keys():
        head, dot, name = path.rpartition(".")
        if path == "out":
            continue
        if head != section:
            lines.append(f"{head}:")
            section = head
        shown = yaml.safe_dump({name: settings[path]}, default_flow_style=True, width=1000, allow_unicode=True).strip()[
            1:-1
        ]
        indent = "  " if dot else ""
        lines += [f"{indent}# {describe(path, field)}", f"{indent}{shown}"]
    return "\n".join(lines) + "\n"


def differences(before: Config, after: Config) -> list[str]:
    """What turns one configuration into another, `out` left out, as overrides."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    changed = []
    for path, *_ in keys():
        was, value = old, new
        for step in path.split("."):
            was, value = was[step], value[step]
        if path != "out" and was != value:
            changed.append(f"{path}={json.dumps(value)}")
    return changed


def digest(config: Config, *, without: Iterable[str] = ()) -> str:
    """SHA-256 (hex) of the settings that can change a result, but for those of `without`."""
    settings = config.model_dump(mode="json")
    for path in (*WITHOUT_EFFECT, *without):
        *sections, name = path.split(".")
        tree = settings
        for step in sections:
            tree = tree[step]
        del tree[name]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
