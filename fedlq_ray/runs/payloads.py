"""payloads.bin: what clients sent, as bytes, in the order of summation (`payloads=true`)."""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlq_ray.errors import ConfigError

NAME = "payloads.bin"
_FRAME = struct.Struct("<II")  # the step of the server, and the length of the payload that follows


class PayloadFile:
    """Writes payloads.bin, if a run keeps payloads."""

    def __init__(self, folder: Path, rounds: int, keep: bool) -> None:
        """Keeps the payloads of the first `rounds` steps and drops the others."""
        self.file, self.keep = folder / NAME, keep
        if self.file.exists():
            os.truncate(self.file, sum(_FRAME.size + size for step, size in _frames(self.file) if step < rounds))

    def __enter__(self) -> "PayloadFile":
        self._stream = self.file.open("ab") if self.keep else None
        return self

    def __exit__(self, *exc: object) -> None:
        if self._stream:
            with self._stream:
                self.sync()

    def write(self, step: int, payloads: Sequence[bytes]) -> None:
        """Adds a step's payloads."""
        if self._stream:
            for payload in payloads:
                self._stream.write(_FRAME.pack(step, len(payload)) + payload)
            self._stream.flush()

    def sync(self) -> None:
        """Returns when everything written is on the disk."""
        if self._stream:
            os.fsync(self._stream.fileno())


def _frames(file: Path) -> Iterator[tuple[int, int]]:
    """The step and the length of each payload that is whole: a process may have been killed while writing the last."""
    left = file.stat().st_size
    with file.open("rb") as stream:
        while left >= _FRAME.size:
            step, size = _FRAME.unpack(stream.read(_FRAME.size))
            left -= _FRAME.size + size
            if left < 0:
                return
            yield step, size
            stream.seek(size, os.SEEK_CUR)


def count(folder: Path) -> int:
    """How many payloads a run has kept.

    Raises:
        ConfigError: it has kept none.
    """
    file = folder / NAME
    found = sum(1 for _ in _frames(file)) if file.exists() else 0
    if not found:
        raise ConfigError(f"{folder}: has no {NAME}; a run keeps its payloads with payloads=true")
    return found


def read(folder: Path) -> Iterator[bytes]:
    """The payloads that a run has kept."""
    file = folder / NAME
    with file.open("rb") as stream:
        for _, size in _frames(file):
            stream.seek(_FRAME.size, os.SEEK_CUR)
            yield stream.read(size)
