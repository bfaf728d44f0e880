"""Checkpoints: what a run needs to go on, as one file that is there whole or not at all.

A file is MAGIC, a version, the SHA-256 of the rest, and a safetensors body whose tensor `tree` is JSON: plain values,
with a name in place of each array. Nothing in it is code, and nothing is believed before the checksum holds.
"""

import contextlib
import dataclasses
import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from fedlq_ray.errors import CheckpointError, FedLQError

MAGIC = b"FQCKPT"
VERSION = 1
_HEAD = struct.Struct("<6sH32s")

Snapshot = dict[str, Any]


class _Arrays:
    """A snapshot's arrays by name, each once. No closures: those would hold each other, and the arrays, for long."""

    def __init__(self) -> None:
        self.named: dict[str, np.ndarray[Any, Any]] = {}
        self.names: dict[int, str] = {}
        self.kept: list[Any] = []  # so that no id is given twice

    def name(self, value: Any) -> str:
        if id(value) not in self.names:
            name = self.names[id(value)] = str(len(self.named))
            self.kept.append(value)
            plain = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            self.named[name] = np.ascontiguousarray(plain).reshape(plain.shape)
        return self.names[id(value)]

    def plain(self, value: Any, where: str) -> Any:
        """A value as JSON can tell it, with names in place of arrays."""
        if value is None or isinstance(value, bool | int | str) and not isinstance(value, np.generic):
            return value
        if isinstance(value, float) and not isinstance(value, np.generic):
            return value if np.isfinite(value) else {"float": repr(value)}
        if isinstance(value, Tensor):
            return {"tensor": self.name(value)}
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return {"scalar": self.name(np.asarray(value))}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return {"array": self.name(value)}
        if isinstance(value, list | tuple):
            items = [self.plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return items if type(value) is list else {"tuple": items}
        if isinstance(value, Mapping):
            return {"dict": [[self.plain(k, where), self.plain(v, f"{where}[{k!r}]")] for k, v in value.items()]}
        raise CheckpointError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")


def pack(snapshot: Snapshot) -> bytes:
    """A snapshot as bytes: None, bool, int, float, str, lists, tuples, dicts, tensors and arrays may be in it.

    Raises:
        CheckpointError: something else is in it; names where.
    """
    arrays = _Arrays()
    tree = json.dumps({name: arrays.plain(value, name) for name, value in snapshot.items()}, allow_nan=False)
    named = arrays.named | {"tree": np.frombuffer(tree.encode(), np.uint8)}
    body = safetensors.numpy.save(named)
    return _HEAD.pack(MAGIC, VERSION, hashlib.sha256(body).digest()) + body


def unpack(data: bytes) -> Snapshot:
    """The snapshot in these bytes.

    Raises:
        CheckpointError: they are damaged, no checkpoint, or one of another version.
    """
    if len(data) < _HEAD.size or data[: len(MAGIC)] != MAGIC:
        raise CheckpointError("is no checkpoint, or cut off")
    _, version, digest = _HEAD.unpack_from(data)
    if version != VERSION:
        raise CheckpointError(f"is of format {version}, and this program reads {VERSION}")
    body = data[_HEAD.size :]
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError("is damaged (its checksum differs)")
    try:
        arrays = safetensors.numpy.load(body)
        made: dict[str, Any] = {}
        tree = json.loads(arrays["tree"].tobytes())
        if not isinstance(tree, dict):
            raise TypeError(f"its tree is a {type(tree).__name__}, where a dict was due")
        return {name: _value(item, arrays, made) for name, item in tree.items()}
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError, safetensors.SafetensorError) as exc:
        raise CheckpointError(f"cannot be read: {exc}") from exc


def _value(tree: Any, arrays: Mapping[str, Any], made: dict[str, Any]) -> Any:
    """What `_Arrays.plain` told; `made`: tensors by name, for two places may have had the same one."""
    if isinstance(tree, list):
        return [_value(item, arrays, made) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tuple":
        return tuple(_value(item, arrays, made) for item in content)
    if kind == "dict":
        return {_value(k, arrays, made): _value(v, arrays, made) for k, v in content}
    if kind == "float":
        return float(content)
    if kind == "tensor":
        if content not in made:
            made[content] = torch.from_numpy(arrays[content].copy())
        return made[content]
    return arrays[content][()] if kind == "scalar" else arrays[content]


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
