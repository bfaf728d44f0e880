"""Storage of checkpoints: their folder, when they are written, and which one a run resumes from."""

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlq_ray.config.load import Config
from fedlq_ray.config.settings import CheckpointConfig
from fedlq_ray.errors import CheckpointError
from fedlq_ray.federation.state import FIELDS
from fedlq_ray.files import expand, make_folder, write_durably
from fedlq_ray.runs.checkpoint import Snapshot, pack, unpack

SUFFIX = ".ckpt"
_MEMORIES = ("memories", "memories_under_way")  # in the host's form
_FIRST_S = 10.0  # delay before the first checkpoint: shorter runs are as quickly repeated
_SHARE = 0.05  # maximum share of the time that is spent on checkpoints


class Folder:
    """A folder for a run's checkpoints: local, or on any filesystem of pyarrow by its address (s3://...).

    Args:
        run: prefix of the files' names, so that several runs can share a folder.
    """

    def __init__(self, where: str, run: str = "") -> None:
        self.where, self.run = where, run
        self.remote = "://" in where

    def _filesystem(self) -> tuple[Any, str]:
        from pyarrow import fs

        found, path = fs.FileSystem.from_uri(self.where)
        return found, path

    def names(self) -> list[str]:
        """Names of checkpoints, newest first."""
        return self._found(rf"{re.escape(self.run)}\d+{re.escape(SUFFIX)}")

    def _found(self, pattern: str) -> list[str]:
        try:
            if self.remote:
                from pyarrow import fs

                system, path = self._filesystem()
                found = [info.base_name for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True))]
            else:
                found = os.listdir(self.where) if os.path.isdir(self.where) else []
        except (OSError, ValueError, ImportError) as exc:
            raise CheckpointError(f"{self.where}: {exc}") from exc
        return sorted((name for name in found if re.fullmatch(pattern, name)), reverse=True)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file atomically; it is on disk when this returns."""
        if self.remote:
            system, path = self._filesystem()
            try:
                stream = system.open_output_stream(f"{path}/{name}.part")
            except FileNotFoundError:  # the filesystem has folders, but this one does not exist
                system.create_dir(path)
                stream = system.open_output_stream(f"{path}/{name}.part")
            with stream:
                stream.write(data)
            system.move(f"{path}/{name}.part", f"{path}/{name}")
            return
        make_folder(Path(self.where), exist_ok=True)
        write_durably(Path(self.where) / name, data)

    def read(self, name: str) -> bytes:
        if self.remote:
            system, path = self._filesystem()
            with system.open_input_stream(f"{path}/{name}") as stream:
                return bytes(stream.read())
        return (Path(self.where) / name).read_bytes()

    def clear(self) -> None:
        """Removes all checkpoints of the finished run, including files that were incomplete when it was killed."""
        for name in self._found(rf"\.?{re.escape(self.run)}\d+{re.escape(SUFFIX)}(\.part)?"):
            self.remove(name)
        with contextlib.suppress(FileNotFoundError):
            if not self.remote and not os.listdir(self.where):
                Path(self.where).rmdir()

    def remove(self, name: str) -> None:
        if self.remote:
            system, path = self._filesystem()
            system.delete_file(f"{path}/{name}")
        else:
            (Path(self.where) / name).unlink(missing_ok=True)

    def name_of(self, round: int) -> str:
        """Name of the checkpoint from which a run resumes with `round`."""
        return f"{self.run}{round:08d}{SUFFIX}"


def checkpoints(folder: Path, config: Config) -> Folder:
    """Returns a run's checkpoint folder; outside the run's folder, files have a unique prefix, which the run stores."""
    if config.checkpoint.path is None:
        return Folder(str(folder / "checkpoints"))
    name = folder / "checkpoints.id"
    if not name.exists():
        write_durably(name, uuid.uuid4().hex)
    return Folder(expand(config.checkpoint.path, "checkpoint.path"), name.read_text(encoding="utf-8") + "-")


def clear(folder: Path, config: Config) -> None:
    """Removes all checkpoints of a finished run, if there are any."""
    name = folder / "checkpoints.id"
    if name.exists() or (folder / "checkpoints").exists():
        checkpoints(folder, config).clear()
        name.unlink(missing_ok=True)


def latest(
    folder: Folder, rounds: int, checksum: Callable[[int], str] | None = None
) -> tuple[Snapshot | None, list[str]]:
    """Returns the newest usable checkpoint, or None if there are none, and the faults of newer ones.

    Args:
        rounds: number of rounds in the journal; a checkpoint of a later round is not usable.
        checksum: checksum of the journal's first rounds; a checkpoint with another checksum is not usable.
    Raises:
        CheckpointError: there are checkpoints, but none is usable.
    """
    faults: list[str] = []
    for name in folder.names():
        try:
            snapshot = unpack(folder.read(name))
            if type(snapshot.get("round")) is not int or snapshot["round"] < 0:
                raise CheckpointError("does not state its round")
            if missing := [name for name in FIELDS if name not in snapshot]:
                raise CheckpointError(f"lacks {', '.join(missing)}")
            if snapshot["round"] > rounds:
                raise CheckpointError(f"is of round {snapshot['round']}, but rounds.jsonl has {rounds} whole rounds")
            # Earlier versions wrote no checksum.
            if checksum and snapshot.get("journal") not in (None, checksum(snapshot["round"])):
                raise CheckpointError(
                    f"is of other rounds: rounds.jsonl changed in its first {snapshot['round']} lines"
                )
            return snapshot, faults
        except (CheckpointError, OSError) as exc:
            faults.append(f"{folder.where}/{name} {exc}")
    if faults:
        told = "; ".join(faults)
        raise CheckpointError(
            f"no checkpoint can be used: {told}; restore the files, or remove the checkpoints to start from round 0"
        )
    return None, faults


class Saver:
    """Writes checkpoints in a separate thread, one at a time, and keeps the last few.

    Without `checkpoint.every_rounds`, it uses at most a twentieth of the time. If a checkpoint cannot be written, the
    run continues: `failure` holds the reason, and earlier checkpoints remain.

    Args:
        recall: converts memories from the host's form to tensors.
        sync: syncs the journal to disk; called before a checkpoint that refers to it.
    """

    def __init__(
        self,
        folder: Folder,
        config: CheckpointConfig,
        recall: Callable[[Mapping[int, Any]], Mapping[int, Tensor]],
        sync: Callable[[], None],
    ) -> None:
        self.folder, self.config, self.recall, self.sync = folder, config, recall, sync
        self.failure: str | None = None
        self.last: tuple[int, Callable[[], Snapshot]] | None = None
        self.saved = -1
        self._thread: threading.Thread | None = None
        self._ended, self._took = time.monotonic(), 0.0

    def offer(self, round: int, snapshot: Callable[[], Snapshot]) -> None:
        """Takes a round's snapshot, and starts writing it if a checkpoint is wanted now; only then it is made."""
        self.last = round, snapshot
        every = self.config.every_rounds
        if every is None:
            writing = self._thread is not None and self._thread.is_alive()
            wait_s = max(_FIRST_S, self._took * (1 / _SHARE - 1))
            due = not writing and time.monotonic() - self._ended >= wait_s
        else:
            due = round % every == 0
        if due and self.config.keep:
            self._join()
            self._thread = threading.Thread(target=self._write, args=(snapshot(),), daemon=True)
            self._thread.start()

    def finish(self, completed: bool) -> None:
        """Waits for the checkpoint in progress; for a run that is not completed, also writes the last round's."""
        self._join()
        if completed or not self.config.keep or self.last is None or self.saved == self.last[0]:
            return
        round, snapshot = self.last
        try:
            last = snapshot()
        except Exception as exc:  # a client under way failed, or Ray did
            self.failure = f"no checkpoint of round {round}: {exc}"
            return
        self._write(last)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _write(self, snapshot: Snapshot) -> None:
        started = time.monotonic()
        try:
            self.sync()
            data = pack(snapshot | {name: dict(self.recall(snapshot[name])) for name in _MEMORIES})
            self.folder.write(self.folder.name_of(snapshot["round"]), data)
            self.saved = snapshot["round"]
            for name in self.folder.names()[self.config.keep :]:
                self.folder.remove(name)
        except Exception as exc:  # such as a full disk or a lost filesystem: training continues
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            self.failure = f"no checkpoint of round {snapshot['round']} in {self.folder.where}: {reason}"
        self._ended = time.monotonic()
        self._took = self._ended - started
