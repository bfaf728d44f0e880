"""Reads settings from YAML and `key=value` overrides, writes them as YAML, describes and compares them.

`load(path, overrides)` reads and checks; one `ConfigError` reports all faults. `settings.py` defines the settings.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlq_ray.config import stored
from fedlq_ray.config.sections import affects, is_optional, is_text, keys
from fedlq_ray.config.settings import Config
from fedlq_ray.errors import ConfigError

__all__ = ["Config", "load", "parse", "to_yaml"]

EVERY = Config.model_validate({"strategy": {"name": "module:attribute"}})
WITHOUT_EFFECT = frozenset(affects(EVERY, "nothing"))  # settings that config_sha256 leaves out
TEXTS = {path: is_optional(field) for path, field, _ in keys(EVERY) if is_text(field)}  # text: whether it may be null

# What OmegaConf, and YAML's constructors of numbers and dates, raise for a file's contents.
UNREADABLE = (
    OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError, OmegaConfBaseException
)  # fmt: skip


def unreadable(source: object, exc: Exception) -> ConfigError:
    """A ConfigError of one line for an error of `UNREADABLE`."""
    told, where = " ".join(str(exc).split()), str(source)[:300]
    if isinstance(exc, RecursionError):
        told = "is nested too deeply"
    elif not isinstance(exc, OSError | UnicodeDecodeError | yaml.YAMLError | OmegaConfBaseException):
        told = f"holds a value that is not of the type that YAML takes it for ({type(exc).__name__}: {told})"
    return ConfigError(f"{where}: {told}")


def load(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file and `key=value` overrides; later overrides win.

    Raises:
        ConfigError: the file cannot be read, or the settings are wrong (all faults in one message).
    """
    return merge(_read(path) if path is not None else {}, overrides, source=str(path) if path else None)


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Like `load`, for the config.yaml of a run's folder, which an earlier version may have written."""
    base = _read(path)
    if "target_accuracy" in base:
        base["target"] = base.pop("target_accuracy")
    if isinstance(base.get("strategy"), dict):
        base["strategy"] = stored.migrated(base["strategy"])
    return merge(base, overrides, source=str(path))


def _read(path: str | Path) -> dict[str, Any]:
    try:
        found = read(path)
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file, and no key=value") from exc
    except UNREADABLE as exc:
        raise unreadable(path, exc) from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as `rounds: 10`")
    return found


def merge(base: Mapping[str, Any], overrides: Iterable[str], *, source: str | None = None) -> Config:
    """Checked settings from `base` and `key=value` overrides; later overrides win.

    If an override names another strategy, the settings of `base` that this strategy does not read are left out.

    Raises:
        ConfigError: an override is not `key=value`, or the settings are wrong.
    """
    where = source or "the command line"
    try:
        tree, given = OmegaConf.create(dict(base)), OmegaConf.create({})
        for override in overrides:
            name, equals, _ = override.partition("=")
            if not equals or not name.strip():
                raise ConfigError(f"{override!r}: is neither a file nor key=value")
            where = f"{source}: {override}" if source else override
            change(tree, override)
            change(given, override)
        where = source or "the command line"
        settings, changes = plain(tree), plain(given)
    except UNREADABLE as exc:
        raise unreadable(where, exc) from exc
    before, after = base.get("strategy"), settings.get("strategy")
    if isinstance(before, Mapping) and isinstance(after, dict) and before.get("name", "fedlq") != after.get("name"):
        kept = changes.get("strategy")
        settings["strategy"] = stored.fitted(after, kept if isinstance(kept, Mapping) else {})
    return parse(settings, source=source)


def read(path: str | Path, *, under: str | None = None, named: Iterable[str] = ()) -> Any:
    """The contents of a YAML file, with interpolations unresolved and text settings as written.

    Otherwise YAML reads `name: 0123` as 83, `1:30` as 90 and `1_000` as 1000.

    Args:
        under: the key that has the settings; None: the whole file.
        named: keys of mappings whose keys are names, which are text too.
    """
    text = Path(path).read_text(encoding="utf-8")
    found = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    nodes = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(found, dict):
        _restore(found if under is None else found.get(under), nodes if under is None else _child(nodes, under))
        for name in named:
            child = _child(nodes, name)
            if isinstance(child, yaml.MappingNode) and len(found.get(name) or ()) == len(child.value):
                found[name] = dict(zip((k.value for k, _ in child.value), found[name].values(), strict=True))
    return found


def _child(node: yaml.Node | None, name: str) -> yaml.Node | None:
    """The value of a key in a YAML mapping."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)


def _restore(found: Any, node: yaml.Node | None, path: str = "") -> None:
    """Restores the text of a YAML node where a text setting became another type."""
    if not isinstance(found, dict) or not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        here = f"{path}.{key_node.value}" if path else str(key_node.value)
        value = found.get(key_node.value) if isinstance(key_node.value, str) else None
        if here in TEXTS and isinstance(value_node, yaml.ScalarNode) and value is not None:
            found[key_node.value] = value_node.value
        else:
            _restore(value, value_node, here)


def plain(tree: Any) -> Any:
    """An OmegaConf tree as dicts, lists and values."""
    found = OmegaConf.to_container(tree, resolve=True)
    repr(found)  # fails for an integer of thousands of digits, which messages and files cannot hold
    return found


def change(tree: Any, override: str) -> None:
    """Sets one key=value of an OmegaConf tree. It replaces the old value, even a dict.

    The value is YAML; the value of a text setting is its text.
    """
    name, _, value = override.partition("=")
    path = name.strip()
    if path in TEXTS:
        OmegaConf.update(tree, path, _as_text(value.strip(), optional=TEXTS[path]), force_add=True)
        return
    made = OmegaConf.from_dotlist([override])
    if isinstance(_DEFAULTS.get(path), dict):
        OmegaConf.update(tree, path, None, force_add=True)
    tree.merge_with(made)


def _as_text(value: str, *, optional: bool) -> str | None:
    """The text of an override's value, without enclosing quotes; None for null, if the setting may be null."""
    if optional and value in ("", "null", "Null", "NULL", "~"):
        return None
    if value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1:
        return str(yaml.safe_load(value))
    return value


def parse(settings: Any, *, source: str | None = None) -> Config:
    """A checked configuration from plain dicts.

    Raises:
        ConfigError: all faults, one per line: the key, what is wrong, what was given.
    """
    try:
        return Config.model_validate(settings)
    except ConfigError as exc:
        raise ConfigError(f"in {source}:\n{exc}" if source else str(exc)) from None


def flat(config: Config) -> dict[str, Any]:
    """Every setting's value, as in JSON, by its dotted path."""
    settings = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for path, _, _ in keys(config):
        value: Any = settings
        for step in path.split("."):
            value = value[step]
        found[path] = value
    return found


_DEFAULTS = flat(EVERY)


def describe(path: str, field: Any) -> str:
    """One line about a setting: meaning, unit, and bounds or choices."""
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
    """The resolved configuration without `out`, as YAML that `load` reads back unchanged."""
    if not commented:
        plain = config.model_dump(mode="json", exclude={"out"})
        return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    settings = flat(config)
    lines: list[str] = []
    section = ""
    for path, field, _ in keys(config):
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
    """The overrides that turn one configuration into another, except `out`."""
    old, new = flat(before), flat(after)
    return [f"{p}={json.dumps(v)}" for p, v in new.items() if p != "out" and (p not in old or old[p] != v)]


def digest(config: Config, *, without: Iterable[str] = ()) -> str:
    """SHA-256 (hex) of the settings that can change a result, except those in `without`."""
    settings = config.model_dump(mode="json") | {"strategy": stored.whole(config.strategy)}
    for path in (*WITHOUT_EFFECT, *without):
        section, dot, name = path.rpartition(".")
        tree = settings[section] if dot else settings
        del tree[name]
        if not tree:
            del settings[section]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
