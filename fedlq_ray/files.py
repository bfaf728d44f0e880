"""Files that are there whole, or not at all."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlq_ray.errors import ConfigError


def expand(path: str, setting: str) -> str:
    """A path whose first part is `~` or `~USER` with that home folder in its place; any other text as it is.

    Args:
        setting: that has the path, for messages.
    Raises:
        ConfigError: the home folder is not known.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as exc:
        home = path.partition("/")[0]
        raise ConfigError(f"{setting}: {path}: there is no home folder {home}; write the whole path") from exc


def write_durably(file: Path, data: bytes | str) -> None:
    """A file that is there whole, or as it was before, whatever happens: written beside, synced, renamed, synced."""
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    _sync(file.parent)


def make_folder(folder: Path, exist_ok: bool = False) -> None:
    """A new folder, and those above it, that are on the disk when this returns."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=exist_ok)
    for path in new:
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A run's folder for this process alone; the system frees it when the process ends, however it does.

    Raises:
        ConfigError: another process has it.
    """
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        for left in reversed(range(5)):  # who only looks (`is_locked`) holds it for an instant
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as exc:
                if not left:
                    raise ConfigError(f"{folder}: another process is running it") from exc
                time.sleep(0.05)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process has the folder to itself."""
    try:
        with (folder / ".lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here for this folder; leaves no file. Without effect where it cannot lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network filesystems
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
