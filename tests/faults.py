"""What the reliability tests share: a run in a process of its own that ends, or fails, at its N-th fault point."""

import contextlib
import functools
import gc
import itertools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from fedlq_ray import files, resume, simulate
from fedlq_ray.config import load as configuration
from fedlq_ray.errors import ConfigError, FedLQError
from fedlq_ray.federation.events import Event, RoundDone
from fedlq_ray.runs import rundir
from fedlq_ray.runs.rundir import Journal

SMALL = (
    "rounds=4", "clients.count=6", "clients.cohort=3", "clients.hosting=serial", "train.local_epochs=1",
    "train.max_samples=32", "evaluate_every=2", "tracking.uri=null", "checkpoint.every_rounds=1",
)  # fmt: skip
# Between them, all that a run remembers: strategy state, error memory, EF21, coded downlink, server moments, work, and
# clients under way.
KINDS = {
    "fedlq": ["strategy.name=fedlq", "strategy.probe_every=2", "strategy.probe_samples=16"],
    "rd": [
        "strategy.name=fedlq_rd",
        "strategy.error_feedback=true",
        "network.downlink_bits=1",
        "train.adaptive_work=4",
    ],
    "flights": [
        "strategy.name=ecsq",
        "strategy.error_feedback=true",
        "strategy.bits=1",
        "network.downlink_bits=1",
        "server.buffer=2",
        "server.max_staleness=2",
        "clients.dropout=0.2",
        "clients.cohort=4",
    ],
    "ef21": ["strategy.name=ecsq", "strategy.error_feedback=ef21", "strategy.bits=1", "server.optimizer=adam"],
}


def round_of(event: Event) -> int | None:
    """The round that an event ends."""
    return event.record.round if isinstance(event, RoundDone) else None


def in_child(work: Callable[[], Any]) -> int:
    """Do some work in a forked process: its exit code, minus the signal that ended it; 3 for a FedLQError."""
    sys.stdout.flush()
    gc.freeze()  # else the child's collector touches, and so copies, all that there is
    pid = os.fork()
    if pid == 0:
        os.nice(10)  # tests under Ray, in another process of pytest, have deadlines
        code = 4
        warnings.simplefilter("ignore")  # a checkpoint that could not be written is one
        with contextlib.suppress(BaseException):
            try:
                work()
                code = 0
            except FedLQError as exc:
                code = 3
                os.write(2, f"{exc}\n".encode())
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@functools.cache
def _settings(*settings: str) -> configuration.Config:
    return configuration.load(None, [*SMALL, *settings])


def start(out: Path, *settings: str) -> None:
    simulate(_settings(*settings).model_copy(update={"out": str(out)}))


def go_on(out: Path, *settings: str) -> None:
    """As a user would after a crash: resume, or start again where there is not even a configuration."""
    if not (out / "config.yaml").exists():
        start(out, *settings)
        return
    finished = (out / "summary.json").exists()
    try:
        resume(out)
    except ConfigError as exc:  # says so, and clears what was left
        if not finished or "is finished" not in str(exc):
            raise


def cut(out: Path, *settings: str, after: int = 3, **given: Any) -> None:
    """A run that ends abruptly after some rounds, with checkpoints."""

    def run() -> None:
        rounds = []

        def watch(event: Event) -> None:
            rounds.append(isinstance(event, RoundDone))
            if sum(rounds) == after:
                die()

        simulate(configuration.load(None, [*SMALL, *settings, f"out={out}"]), watch=watch, **given)

    assert in_child(run) == -signal.SIGKILL


def evidence(out: Path) -> tuple[bytes, str]:
    """What two runs that gave the same have in common; nothing is missing, or left over."""
    found = rundir.read(out)
    assert found.summary is not None
    assert len((out / "clients.csv").read_text().splitlines()) == 1 + found.config.clients.count
    assert not [f for f in out.rglob("*") if f.name.startswith("checkpoints") or f.suffix == ".part"]
    return (out / "rounds.jsonl").read_bytes(), found.summary["weights_sha256"]


def workers(name: str, program: int) -> list[int]:
    """The processes of Ray's actors whose class starts so, of a program that started its own Ray."""

    def its_own(folder: Path) -> bool:
        environment = (folder / "environ").read_text().split("\0")
        raylet = next((v.partition("=")[2] for v in environment if v.startswith("RAY_RAYLET_PID=")), None)
        if raylet is not None:  # it imported Ray itself, or its server serves a raylet
            return parent(raylet) == program
        return parent(parent(folder.name)) == program  # between them, the server of a session

    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended in the meantime
            if (folder / "cmdline").read_text().startswith(f"ray::{name}") and its_own(folder):
                found.append(int(folder.name))
    return sorted(found)


def parent(process: int | str) -> int:
    """The process that started this one."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


MARK = "FEDLQ_TEST_MARK"  # a variable that a program's processes inherit, those of its Ray and its fork server too


def left(mark: str, seconds: float = 90.0) -> list[str]:
    """What is still there, so much later at most, of the processes that have this mark."""
    end = time.monotonic() + seconds
    while True:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended in the meantime
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().decode().replace("\0", " "))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.5)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def at_point(number: int, happens: Callable[[], None]) -> Any:
    """Something happens at the N-th of these points: before and after each write, sync and rename of a run's files, and
    in the middle of each line of the journal."""
    count = itertools.count(1)  # counts each once, also from two threads

    def point() -> None:
        if next(count) == number:
            happens()

    real_sync, real_replace, real_put = os.fsync, Path.replace, Journal._put

    def sync(descriptor: int) -> None:
        point()
        real_sync(descriptor)
        point()

    def replace(file: Path, target: Path) -> Path:
        point()
        result = real_replace(file, target)
        point()
        return result

    def put(journal: Journal, line: str) -> None:
        real_put(journal, line[: len(line) // 2])
        point()
        real_put(journal, line[len(line) // 2 :])
        point()

    with (
        mock.patch.object(files.os, "fsync", sync),
        mock.patch.object(Path, "replace", replace),
        mock.patch.object(Journal, "_put", put),
    ):
        yield
