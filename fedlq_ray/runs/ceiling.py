"""What links cost a run, before anything is trained: the most that compression alone can gain in time.

The steps are those of the run's own event loop, with a host that trains nothing and answers with payloads of a known
size. Cohorts, links, dropouts, availability, buffers and deadlines are therefore the run's own.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fedlq_ray.errors import ConfigError
from fedlq_ray.federation import cohorts
from fedlq_ray.federation.clock import client_time
from fedlq_ray.federation.downlink import Downlink, Download, Shared
from fedlq_ray.federation.flight import FlightEnd
from fedlq_ray.federation.host import Answer
from fedlq_ray.federation.planning import Rules
from fedlq_ray.federation.rounds import begin, seconds_of
from fedlq_ray.federation.selection import Uniformly
from fedlq_ray.federation.selections import SELECTIONS
from fedlq_ray.federation.task import Job, Task, Worker
from fedlq_ray.federation.traffic import Landings, Traffic, land
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.runs.output import short
from fedlq_ray.strategies import Strategy, make
from fedlq_ray.strategies.budgets import bytes_at_rate
from fedlq_ray.training.local import Reply
from fedlq_ray.training.sgd import samples_of

STEPS = 20  # steps of the server that are looked at; all of a shorter run


class Quantiles(NamedTuple):
    """Of the clients: linear between two of them."""

    least: float
    tenth: float
    median: float
    ninth: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> "Quantiles":
        return Quantiles(*np.quantile(values, (0, 0.1, 0.5, 0.9, 1)).tolist())


@dataclass(frozen=True)
class Ceiling:
    """What compression can gain.

    Attributes:
        ratios: of each client, the time of its upload at float32 over the time of its computing, by the means of its
            profile and at the base work.
        float32_s, free_s: mean simulated seconds of a step if clients send float32, and if uploads take no time.
    """

    ratios: Quantiles
    float32_s: float
    free_s: float

    @property
    def gain(self) -> float:
        """How many times as fast a run of as many steps is if its uploads take no time, compared with float32."""
        return self.float32_s / self.free_s

    @property
    def line(self) -> str:
        """One line for people."""
        low, middle, high = (short(value) for value in (self.ratios.least, self.ratios.median, self.ratios.most))
        return (
            f"uploading float32 takes {low} to {high} times as long as computing (median {middle}); compression of "
            f"uploads alone makes steps at most {short(self.gain)} times as fast"
        )


class Sized(SerialHost):
    """A host that trains nothing: `size` says how many bytes each client sends."""

    def __init__(self, task: Task, size: Callable[[Job], int]) -> None:
        super().__init__(task)
        self.size = size

    def _train(self, job: Job, weights: Tensor, memory: Tensor | None, retries: int) -> Answer:
        return Answer(job, Reply(bytes(self.size(job)), 0.0, job.samples, 0.0, 0.0), None)


class Budgeted(Downlink):
    """A downlink whose coded payloads have the size of their budgets, the most that they take."""

    def broadcast(self, shared: Shared | None, weights: Tensor, step: int) -> Shared | None:
        if shared is None or self.bits is None:
            return shared
        return Shared(shared.model, shared.sent + int(bytes_at_rate(self.context, self.bits)), shared.fetched)

    def _coded(self, held: Tensor, weights: Tensor, client: int, budget: float, round: int) -> Download:
        return Download(held, min(self.whole_bytes, int(budget)), True)


@dataclass(frozen=True)
class Stepped:
    """A step of the server: its simulated seconds, and the flights that ended since the one before."""

    seconds: float
    ended: Sequence[FlightEnd]

    @property
    def sizes(self) -> list[int]:
        """Bytes of the payloads that arrived."""
        return [e.uplink_bytes for e in self.ended if e.how == "arrived"]


def rules_of(task: Task, strategy: Strategy) -> Rules:
    """The run's rules, for steps that train nothing. A selection of the user's own is replaced by random draws."""
    rules, network = Rules.of(task, strategy), task.config.network
    down, own = rules.downlink, task.config.clients.selection not in SELECTIONS
    coded = Budgeted(down.context, network.downlink_bits, network.downlink_cap_bits, down.initial, down.whole_bytes)
    return replace(rules, downlink=coded, selection=Uniformly() if own else rules.selection)


def walk(rules: Rules, size: Callable[[Job], int], steps: int = STEPS) -> list[Stepped]:
    """Steps of a run in which nothing is trained or learned: its first ones. Of a synchronous run, whose budgets may
    rise with the rounds, they have the numbers of rounds that are spread evenly over the run.

    Args:
        size: the bytes of a job's payload.
    Raises:
        FedLQError: no client is available, or none answers.
    """
    task, found, landings = rules.task, list[Stepped](), Landings()
    host = Sized(task, size)
    state = begin(task, rules.strategy)
    state = replace(state, selection=rules.selection.init())
    rounds = task.config.rounds
    steps = min(steps, rounds)
    for step in range(steps):
        if task.config.synchronous:
            state = replace(state, round=(2 * step + 1) * rounds // (2 * steps))
        traffic = Traffic(rules, host, state, host.publish(state.weights), landings)
        traffic.advance()
        while not traffic.full:
            land(host, landings)
            traffic.advance()
        ended = traffic.close()
        found.append(Stepped(seconds_of(state, traffic, ended), ended))
        state = replace(
            state,
            round=state.round + 1,
            sim_time_s=traffic.now_s,
            payload_bytes=statistics.fmean(found[-1].sizes) if found[-1].sizes else state.payload_bytes,
            held=traffic.held,
            dispatches=traffic.dispatches,
            flights=tuple(sorted(traffic.flying.values(), key=lambda flight: flight.order)),
            shared=rules.downlink.broadcast(traffic.shared, state.weights, state.round),
        )
    return found


def ratio(task: Task, client: int, num_bytes: int) -> float:
    """The time of a client's upload of so many bytes over that of its computing, by the means of its profile."""
    samples = samples_of(len(task.shards[client]), task.config.train)
    time = client_time(
        task.profiles[client],
        flops=task.flops * cohorts.base_work(task, samples),
        uplink_bytes=num_bytes,
        downlink_bytes=0,
        bill=task.config.network.bill,
        uplink_free=task.config.network.uplink_free,
    )
    return time.upload_s / time.compute_s


def ceiling(task: Task) -> Ceiling:
    """What compression can gain in a run, from FedAvg with its links, and with uploads that take no time.

    Raises:
        ConfigError: computing takes no time.
    """
    if not task.flops:
        raise ConfigError("model.name: no FLOPs are counted, so that computing takes no simulated time")
    size = Worker(task).model_size()
    limit = task.config.network.model_copy(update={"uplink_free": True})
    free = replace(task, config=task.config.model_copy(update={"network": limit}))
    float32_s, free_s = (
        statistics.fmean(step.seconds for step in walk(rules_of(t, make(Worker(t).context, "fedavg")), lambda _: size))
        for t in (task, free)
    )
    return Ceiling(Quantiles.of([ratio(task, client, size) for client in range(task.clients.count)]), float32_s, free_s)
