"""Finds a part by name: a built-in in its dict, or a user's own as `module:attribute`."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlq_ray.errors import ConfigError, first_line


def find(kind: str, name: str, builtin: Mapping[str, Any]) -> Any:
    """The part called `name`.

    Args:
        kind: the configuration key, for messages, such as `model.name`.
        name: a key of `builtin`, or `module:attribute`.
    Raises:
        ConfigError: the name is unknown, the module cannot be imported, or it lacks the attribute.
    """
    if name in builtin:
        return builtin[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"{kind}: {unknown(name, builtin)}")
    try:
        part: Any = importlib.import_module(module_name)
    except Exception as exc:  # a user's module may raise anything while it is imported
        raise ConfigError(f"{kind}: cannot import {module_name!r} ({type(exc).__name__}: {exc})") from exc
    for step in attribute.split("."):
        if not hasattr(part, step):
            raise ConfigError(f"{kind}: module {module_name!r} has no {attribute!r}{_hidden(module_name)}")
        part = getattr(part, step)
    return part


def unknown(name: str, builtin: Mapping[str, Any]) -> str:
    """The message if no part is called `name`."""
    near = difflib.get_close_matches(name, builtin, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {name!r}; known: {', '.join(builtin)}, or your own as module:attribute{hint}"


def require_picklable(given: Mapping[str, Any]) -> None:
    """Requires that Ray can send parts to its actors.

    Args:
        given: parts by the setting that each replaces.
    Raises:
        ConfigError: one cannot be pickled.
    """
    from ray import cloudpickle

    for kind, part in given.items():
        try:
            cloudpickle.dumps(part)
        except Exception as exc:  # a user's part may hold anything
            why = f"{type(exc).__name__}: {first_line(exc)}"
            raise ConfigError(
                f"{kind}: cannot be sent to Ray's actors ({why}); keep locks, files and connections out of it, or use "
                "clients.hosting=serial"
            ) from exc


def _hidden(module_name: str) -> str:
    """A hint for the message, if the import found another module than the user's of the same name."""
    found = getattr(sys.modules[module_name], "__file__", None)
    own = Path(*module_name.split("."))
    for file in (own.with_name(f"{own.name}.py"), own / "__init__.py"):
        if file.is_file() and not (found and file.samefile(found)):
            return f"; it is {found or 'a part of Python'}, which comes before your {file}: rename yours"
    return ""


def takes(factory: Callable[..., Any], name: str) -> bool:
    """Whether a factory has a parameter of this name."""
    try:
        return name in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def takes_all(factory: Callable[..., Any]) -> bool:
    """Whether a factory takes arguments of any name."""
    try:
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return False


def call(kind: str, factory: Callable[..., Any], offered: Mapping[str, Any], args: Mapping[str, Any]) -> Any:
    """Calls a part's factory with `args`, and with the `offered` values that its parameters name.

    Raises:
        ConfigError: `args` do not fit the factory, or it raises.
    """
    try:
        known = dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        known = {}
    any_name = takes_all(factory)
    wrong = [key for key in args if key not in known and not any_name]
    if wrong:
        raise ConfigError(f"{kind}: takes no {', '.join(map(repr, wrong))}; it takes {', '.join(known) or 'nothing'}")
    for key, value in args.items():
        if key in known and known[key].annotation in (int, "int") and type(value) is not int:
            raise ConfigError(f"{kind}: {key} must be a whole number, got {value!r}")
        if key in known and known[key].annotation in (str, "str") and not isinstance(value, str):
            raise ConfigError(f"{kind}: {key} must be text, got {value!r}; quote what YAML reads as something else")
    given = {key: value for key, value in offered.items() if key in known or any_name}
    try:
        return factory(**{**given, **args})
    except ConfigError:
        raise
    except Exception as exc:  # a user's factory may raise anything
        raise ConfigError(f"{kind}: {type(exc).__name__}: {exc}") from exc
