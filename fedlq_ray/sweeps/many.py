"""Several runs at once, each a Ray task on its own core. Progress is read from the runs' folders."""

from fedlq_ray.startup import make_importable  # first: a user's file could hide later imports

# isort: split
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedlq_ray.config.load import Config
from fedlq_ray.errors import ConfigError, FedLQError, first_line
from fedlq_ray.federation.events import Closed, Resumed
from fedlq_ray.files import is_locked
from fedlq_ray.hosts.ray.session import start_ray
from fedlq_ray.runs import follow, progress, rundir
from fedlq_ray.runs.console import Console
from fedlq_ray.runs.interrupts import Interrupts
from fedlq_ray.runs.simulation import run_or_resume
from fedlq_ray.sweeps.sweep import Start

# Memory requested from Ray per run: 0.7 GB was measured with Fashion-MNIST, 1.0 GB with CIFAR-10.
RUN_BYTES = 2e9


def in_turn(begin: Callable[[Config, str], Any]) -> Callable[[Sequence[Config], str], Iterator[Any]]:
    """Turns a function that begins one run into one that begins several, one after another."""

    def start(configs: Sequence[Config], parent: str) -> Iterator[tuple[Config, FedLQError | None]]:
        for config in configs:
            failure = None
            try:
                begin(config, parent)
            except ConfigError:
                raise
            except FedLQError as exc:
                failure = exc
            yield config, failure

    return start


def starter(console: Console) -> Start:
    """What `sweep.run` calls to begin runs: side by side where cores allow it, the others one after another."""

    def begin(config: Config, parent: str) -> None:
        with progress.watch(config, console, False) as report:
            run_or_resume(config, watch=report, parent=parent)

    def start(configs: Sequence[Config], parent: str) -> Iterator[tuple[Config, FedLQError | None]]:
        together = abreast(configs)
        if together:
            yield from run(together, parent, console)
        apart = {config.out for config in together}
        yield from in_turn(begin)([config for config in configs if config.out not in apart], parent)

    return start


def abreast(configs: Sequence[Config]) -> list[Config]:
    """The runs to run in parallel, with `serial` hosting.

    These are the runs with `serial` or `auto` hosting, if there are at least two and two fit the free cores and memory.
    Hosting does not change a run's result, and parallel runs leave no core idle at a round's end.
    """
    found = [config for config in configs if config.clients.hosting in ("serial", "auto")]
    if len(found) < 2:
        return []
    start_ray()
    free = ray.available_resources()
    if min(free.get("CPU", 0.0), free.get("memory", 0.0) // RUN_BYTES) < 2:
        return []
    return [c.model_copy(update={"clients": c.clients.model_copy(update={"hosting": "serial"})}) for c in found]


@ray.remote(max_retries=0)
def _run(config: Config, parent: str, folder: str) -> list[str]:
    """Runs one run and returns its warnings."""
    os.chdir(folder)  # a worker may still be in the folder of another sweep
    make_importable(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        run_or_resume(config, parent=parent)
    return [str(warning.message) for warning in told if warning.category is UserWarning]


def run(configs: Sequence[Config], parent: str, console: Console) -> Iterator[tuple[Config, FedLQError | None]]:
    """Runs all, as many at once as this node's cores and memory allow; yields each as it ends, and why it failed.

    An interrupt ends all runs at their next payload, so that they can resume later. A second one ends them at once.
    """
    start_ray()
    # The runs' folders are on this node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = _run.options(num_cpus=1, memory=RUN_BYTES, scheduling_strategy=here)
    interrupts, stopping = Interrupts(), False
    with interrupts, progress.bars(console) as shown:
        running = {task.remote(config, parent, os.getcwd()): config for config in configs}
        watched = {str(config.out): _Watched(config, shown) for config in configs}
        try:
            while running:
                done, _ = ray.wait(list(running), timeout=1)
                with interrupts.showing():
                    for one in watched.values():
                        one.look()
                for ref in done:
                    config = running.pop(ref)
                    warned, failure = _outcome(ref)
                    with interrupts.showing():
                        for warning in warned:
                            console.print(f"{config.out}: {warning}", highlight=False, markup=False)
                        watched.pop(str(config.out)).close()
                    if interrupts.received is None:
                        yield config, failure
                if interrupts.received is not None and not stopping:
                    stopping = True
                    with interrupts.showing():
                        console.print("stopping; interrupt again to end at once", highlight=False, markup=False)
                    for ref in running:
                        ray.cancel(ref)
        finally:
            for ref in running:
                ray.cancel(ref, force=True)
    interrupts.pass_on()


def _outcome(ref: Any) -> tuple[list[str], FedLQError | None]:
    """A run's warnings, and why it failed (None if it did not)."""
    try:
        return ray.get(ref), None
    except RayTaskError as exc:
        if isinstance(exc.cause, ConfigError):
            raise exc.cause from None
        return [], exc.cause if isinstance(exc.cause, FedLQError) else FedLQError(repr(exc.cause))
    except RayError as exc:
        return [], FedLQError(first_line(exc))


class _Watched:
    """Shows a run's progress from its folder, once it has begun."""

    def __init__(self, config: Config, shown: Any) -> None:
        self.folder, self.config, self.shown = Path(str(config.out)), config, shown
        self.before = rundir.journal(self.folder)
        self.told = len(self.before)
        self.show: Any = None

    def look(self) -> None:
        if self.show is None and is_locked(self.folder):
            self.show = progress.line(self.config, self.shown)
            if self.before:
                self.show(Resumed(self.before, []))
        if self.show:
            self.told, events = follow.news(self.folder, self.told)
            for event in events:
                self.show(event)

    def close(self) -> None:
        self.look()
        if self.show:
            self.show(Closed("FINISHED"))
