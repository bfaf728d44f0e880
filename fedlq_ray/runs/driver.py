"""Drives a run: the rounds on a host, the journal, the checkpoints, and MLflow."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedlq_ray.federation.events import Ended, Event, Hosting, Resumed, RoundDone, Warned
from fedlq_ray.federation.host import Host
from fedlq_ray.federation.rounds import Step, Timing, begin, run
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Task, Worker
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.runs import rundir
from fedlq_ray.runs.identity import identity
from fedlq_ray.runs.payloads import PayloadFile
from fedlq_ray.runs.storage import Saver, checkpoints, latest
from fedlq_ray.strategies import GivenStrategy, make
from fedlq_ray.tracking import log
from fedlq_ray.tracking.log import Tracker, Tracking


def drive(
    task: Task,
    given: GivenStrategy | None,
    host: Host,
    tracking: Tracking | None,
    stopped: Callable[[], bool],
    folder: Path,
) -> Iterator[Event]:
    """Runs the rounds on a host, from the last checkpoint if there is one; writes the journal and tracks the run.

    Yields:
        Resumed first if it continues from a checkpoint, RoundDone for each round, Warned once for each client that is
        skipped and for checkpoints that could not be written, and Ended last.
    """
    config, goal, strategy = task.config, task.problem.goal, make(Worker(task).context, given)
    whose, where = identity(task, strategy), checkpoints(folder, config)
    written = rundir.journal(folder)
    before, faults = latest(where, len(written), partial(rundir.checksum, folder))
    state = begin(task, strategy)
    if before is not None:
        state = ServerState.from_snapshot(before, state, task)
    records, timing = written[: state.round], Timing()
    if before or faults:
        yield Resumed(records, faults)
    tracker = Tracker(tracking, config, records) if tracking else None
    status, told, heard, reached = "FAILED", set[int](), True, False
    try:
        with (
            rundir.Journal(folder, len(records)) as journal,
            PayloadFile(folder, len(records), config.payloads) as sent,
        ):
            saver = Saver(where, config.checkpoint, host.recall, partial(_each, sent.sync, journal.sync))
            try:
                for step in run(task, strategy, host, state, timing, stopped):
                    state, record = step.state, step.record
                    sent.write(record.round, step.payloads)  # first: a step in the journal has its payloads
                    journal.write(record)
                    if tracker:
                        tracker.log(record)
                    yield RoundDone(record)
                    yield from _warnings(step, told, saver)
                    if reached := config.stop_at_target and goal.reaches(record.main, config.target):
                        break  # without a checkpoint: a resume would train past the target
                    if step.resumable:
                        saver.offer(state.round, partial(_snapshot, step, {"identity": whose}, journal.checksum()))
            finally:
                completed = reached or state.round >= config.rounds
                saver.finish(completed)
            if saver.failure:
                yield Warned(saver.failure)
        of_clients = _of_clients(task, host, state) if completed else {}
        status = "FINISHED" if completed else "KILLED"
    except (KeyboardInterrupt, GeneratorExit):  # a second interrupt, here or in the caller
        status, heard = "KILLED", False
        raise
    finally:
        tracked = tracker.finish(status, wait=heard) if tracker else None
    yield Ended(state.weights.numpy(), completed, vars(timing), tracked, len(state.flights), of_clients)


def _warnings(step: Step, told: set[int], saver: Saver) -> Iterator[Event]:
    """What went wrong since the step before; each skipped client once, which `told` then has."""
    for client in [c for c in step.faults if c not in told]:
        yield Warned(f"skipped (clients.on_failure=skip_client): {step.faults[client]}")
    told.update(step.faults)
    if saver.failure:
        yield Warned(saver.failure)
        saver.failure = None


def _each(*functions: Callable[[], None]) -> None:
    for function in functions:
        function()


def _of_clients(task: Task, host: Host, state: ServerState) -> Mapping[str, float]:
    """The main metric by the test samples' client; empty if they have none."""
    if task.test_clients is None:
        return {}
    found: Mapping[str, float] = host.evaluate(host.publish(state.weights)).result().value.of_clients
    return found


def _snapshot(step: Step, identity: Mapping[str, Any], journal: str) -> dict[str, Any]:
    step.settle()
    return step.state.snapshot() | {**identity, "journal": journal}


def drive_serially(
    task: Task, given: GivenStrategy | None, tracking: Tracking | None, stopped: Callable[[], bool], folder: Path
) -> Iterator[Event]:
    """Drives a run without Ray, in this process."""
    yield Hosting("serial", "as configured", 0, 0.0)
    yield from drive(task, given, SerialHost(task), tracking, stopped, folder)


def attach(task: Task, tracking: Tracking, folder: Path) -> Iterator[Event]:
    """Logs a finished run's files to MLflow, and its model if the settings ask for it.

    Yields:
        Warned if MLflow fails: the run itself is finished and stored.
    """
    try:
        module = copy.deepcopy(task.module) if task.config.tracking.log_model else None
        log.attach(tracking, task.config, rundir.journal(folder), folder, module)
    except Exception as exc:
        yield Warned(log.lacking(folder, exc))
