"""Atomic and durable writes, and locks on folders."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlq_ray.errors import ConfigError


def expand(path: str, setting: str) -> str:
    """Replaces a leading `~` or `~USER` by that home folder; returns any other text unchanged.

    Args:
        setting: name of the setting that holds the path, for messages.
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
    """Writes a file atomically: to a temporary file next to it, synced, then renamed; the folder is synced too."""
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
    """Creates a folder and its parents, and syncs them to disk."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=exist_ok)
    for path in new:
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Syncs a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run's folder for this process; the system releases the lock when the process ends, however it ends.

    Raises:
        ConfigError: another process holds the lock.
    """
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        for left in reversed(range(5)):  # a process that only checks (`is_locked`) holds the lock for an instant
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as exc:
                if not left:
                    raise ConfigError(f"{folder}: another process is running it") from exc
                time.sleep(0.05)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock on the folder."""
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
    """Waits until no other process is in this context for the folder; leaves no file. No effect if locking fails."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network filesystems
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
