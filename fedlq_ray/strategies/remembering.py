"""What a strategy remembers from round to round, as values; and the watch over what it must not change."""

import contextlib
import dataclasses
import hashlib
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedlq_ray.errors import FedLQError

Snapshot = dict[str, Any]


def remembered(strategy: Any) -> Snapshot:
    """What a strategy has in the attributes that it `remembers`; of a dataclass, its fields.

    Lists, tuples, dicts, tensors and arrays are copied: what is written later is what was so now.
    """
    made: dict[int, tuple[Any, Any]] = {}

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: _copied(getattr(value, field.name), made) for field in dataclasses.fields(value)}
        return _copied(value, made)

    return {name: plain(getattr(strategy, name)) for name in getattr(strategy, "remembers", ())}


def _copied(value: Any, made: dict[int, tuple[Any, Any]]) -> Any:
    """A copy; `made`: arrays and their copies by id, for two places may have the same one."""
    if isinstance(value, Tensor | np.ndarray):
        copy = value.detach().clone() if isinstance(value, Tensor) else value.copy()
        return made.setdefault(id(value), (value, copy))[1]
    if type(value) in (list, tuple):
        return type(value)(_copied(item, made) for item in value)
    return {key: _copied(item, made) for key, item in value.items()} if type(value) is dict else value


def remind(strategy: Any, state: Mapping[str, Any]) -> None:
    """Give a new strategy what `remembered` took from another."""
    for name, value in state.items():
        holder = getattr(strategy, name, None)
        if dataclasses.is_dataclass(holder):
            for field, content in value.items():
                setattr(holder, field, content)
        else:
            setattr(strategy, name, value)


def fingerprints(strategy: Any) -> dict[str, bytes]:
    """A digest of each attribute that a strategy does not remember, to see that none of them changes."""
    found = {}
    for name, value in getattr(strategy, "__dict__", {}).items():
        if name not in getattr(strategy, "remembers", ()):
            with contextlib.suppress(Exception):  # what does not pickle cannot be told
                found[name] = hashlib.sha256(pickle.dumps(value)).digest()
    return found


def require_unchanged(strategy: Any, before: Mapping[str, bytes]) -> None:
    """
    Raises:
        FedLQError: an attribute changed that the strategy does not remember, so that a resume would lose it.
    """
    changed = sorted(name for name, found in fingerprints(strategy).items() if before.get(name) != found)
    if changed:
        kind = type(strategy).__name__
        raise FedLQError(
            f"strategy {kind} changes {', '.join(changed)} from round to round; name what changes in its class, so "
            f"that a resumed run has it: remembers = ({', '.join(repr(name) for name in changed)},)"
        )
