"""Checkpoints: what a run needs to resume, in one file that exists completely or not at all.

A file is MAGIC, a version, the SHA-256 of the rest, and a safetensors body whose tensor `tree` is JSON: plain values,
with a name in place of each array. It contains no code, and nothing is used before the checksum is verified.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from fedlq_ray.errors import CheckpointError

MAGIC = b"FQCKPT"
VERSION = 1
_HEAD = struct.Struct("<6sH32s")

Snapshot = dict[str, Any]


class _Arrays:
    """A snapshot's arrays by name, each once. Not closures: reference cycles would keep the arrays alive for long."""

    def __init__(self) -> None:
        self.named: dict[str, np.ndarray[Any, Any]] = {}
        self.names: dict[int, str] = {}
        self.kept: list[Any] = []  # keeps values alive, so that ids stay unique

    def name(self, value: Any) -> str:
        if id(value) not in self.names:
            name = self.names[id(value)] = str(len(self.named))
            self.kept.append(value)
            plain = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            self.named[name] = np.ascontiguousarray(plain).reshape(plain.shape)
        return self.names[id(value)]

    def plain(self, value: Any, where: str) -> Any:
        """A value as JSON can represent it, with names in place of arrays."""
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
    """A snapshot as bytes. It may hold None, bool, int, float, str, lists, tuples, dicts, tensors and arrays.

    Raises:
        CheckpointError: it holds something else; the message names where.
    """
    arrays = _Arrays()
    tree = json.dumps({name: arrays.plain(value, name) for name, value in snapshot.items()}, allow_nan=False)
    named = arrays.named | {"tree": np.frombuffer(tree.encode(), np.uint8)}
    body = safetensors.numpy.save(named)
    return _HEAD.pack(MAGIC, VERSION, hashlib.sha256(body).digest()) + body


def unpack(data: bytes) -> Snapshot:
    """The snapshot in these bytes.

    Raises:
        CheckpointError: they are damaged, not a checkpoint, or of another version.
    """
    if len(data) < _HEAD.size or data[: len(MAGIC)] != MAGIC:
        raise CheckpointError("is not a checkpoint, or is cut off")
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
            raise TypeError(f"its tree must be a dict, got {type(tree).__name__}")
        return {name: _value(item, arrays, made) for name, item in tree.items()}
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError, safetensors.SafetensorError) as exc:
        raise CheckpointError(f"cannot be read: {exc}") from exc


def _value(tree: Any, arrays: Mapping[str, Any], made: dict[str, Any]) -> Any:
    """The value that `_Arrays.plain` converted. `made`: tensors by name, since two places may share one."""
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
