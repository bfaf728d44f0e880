"""Supervises the driver actor: a driver that dies restarts from its checkpoint."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlq_ray.errors import FedLQError, first_line
from fedlq_ray.federation.events import Ended, Event, Restarted, RoundDone, Stopping, Warned
from fedlq_ray.federation.task import Task
from fedlq_ray.hosts.ray import stub
from fedlq_ray.hosts.ray.session import start_ray
from fedlq_ray.runs.interrupts import Interrupts
from fedlq_ray.strategies import GivenStrategy
from fedlq_ray.tracking.log import Tracking, lacking

_RESTARTS = 3  # of a driver that dies without progress: no further round than before


def events(
    task: Task, strategy: GivenStrategy | None, track: Tracking | None, interrupts: Interrupts, folder: Path
) -> Iterator[Event]:
    """Yields the driver actor's events. A driver that dies or loses objects restarts from the checkpoint.

    After Ended, the caller writes the run's other files; the next event that it asks for lets the driver log them.
    """
    import ray
    from ray.exceptions import (
        ObjectStoreFullError,
        OutOfDiskError,
        OutOfMemoryError,
        RayActorError,
        RayError,
        RayTaskError,
    )

    start_ray()
    with interrupts:
        left, furthest, shared = _RESTARTS, -1, None
        while True:
            try:
                shared = shared or ray.put(task)
                for event in _driven(shared, strategy, track, interrupts, folder, task.config.clients.timeout_s):
                    if isinstance(event, RoundDone) and event.record.round > furthest:
                        left, furthest = _RESTARTS, event.record.round
                    yield event
                return
            except RayTaskError as exc:
                cause = exc.cause
                if isinstance(cause, FedLQError | OSError):
                    raise cause from None
                if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
                    raise _full(cause, folder) from None
                fault = f"the driver failed: {cause!r}"
                if not isinstance(cause, RayError) or not left:
                    raise FedLQError(fault) from None
            except (RayActorError, OutOfMemoryError) as exc:
                fault = f"the driver actor died: {first_line(exc)}"
                if not left:
                    raise FedLQError(fault) from None
            except (ObjectStoreFullError, OutOfDiskError) as exc:
                raise _full(exc, folder) from exc
            except RayError as exc:
                raise FedLQError(f"Ray: {first_line(exc)}") from exc
            left -= 1
            yield Restarted(fault)


def _full(exc: Exception, folder: Path) -> FedLQError:
    """The error for a full object store, with advice; an immediate restart would not help."""
    return FedLQError(
        f"Ray's object store has no room ({type(exc).__name__}: {first_line(exc)}): free /dev/shm, and disk "
        f"in Ray's temporary folder, or use a smaller model or cohort; resume with: fedlq resume {folder}"
    )


def _driven(
    task: Any,
    strategy: GivenStrategy | None,
    track: Tracking | None,
    interrupts: Interrupts,
    folder: Path,
    timeout_s: float,
) -> Iterator[Event]:
    """Yields one driver actor's events. The actor is forked, like clients' actors, and runs on this node, which has the
    run's folder.
    """
    import ray
    from ray.exceptions import RayError

    from fedlq_ray.hosts.ray.placement import options
    from fedlq_ray.runs.actor import Driver

    here = options(ray.get_runtime_context().get_node_id(), stub.command())
    driver = Driver.options(max_concurrency=2, **here).remote(os.getcwd())  # type: ignore[attr-defined]  # of ray.remote
    run, attach = (method.options(num_returns="streaming") for method in (driver.run, driver.attach))
    ended: Event | None = None
    try:
        for ended in _heard(driver, run.remote(task, strategy, track, folder), interrupts, timeout_s):
            yield ended
        if track and isinstance(ended, Ended) and ended.completed and not ended.tracked:
            try:
                yield from _heard(driver, attach.remote(task, track, folder), interrupts, timeout_s)
            except RayError as exc:  # the rounds are over: a new driver would have nothing to do
                yield Warned(lacking(folder, exc))
    finally:
        ray.kill(driver)


def _heard(driver: Any, stream: Any, interrupts: Interrupts, timeout_s: float) -> Iterator[Event]:
    """Yields the events of one call of the driver actor, and passes an interrupt on to it.

    If the actor does not answer for `timeout_s`, it is killed: if it woke up later, it would write to the folder.
    """
    import ray
    from ray.exceptions import RayActorError

    told, pid, asked = False, None, time.monotonic()
    alive = driver.alive.remote()
    while True:
        if interrupts.received is not None and not told:
            told = True
            driver.stop.remote()
            yield Stopping()
        if ray.wait([stream], timeout=0.2)[0]:
            try:
                event = next(stream)
            except StopIteration:
                return
            yield ray.get(event)
        elif ray.wait([alive], timeout=0)[0]:
            if time.monotonic() - asked > timeout_s / 4 or pid is None:
                pid, asked, alive = ray.get(alive), time.monotonic(), driver.alive.remote()
        elif pid and time.monotonic() - asked > timeout_s:
            with contextlib.suppress(OSError):  # it has already ended
                os.kill(pid, signal.SIGKILL)
            raise RayActorError(error_msg=f"it was silent for {timeout_s:g} s")
