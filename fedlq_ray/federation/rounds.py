"""The steps of the server: ask clients, collect what they send, commit, one after another.

This module does not depend on Ray: a `Host` trains and evaluates. Neither the host nor the order in which replies
arrive changes the records.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fedlq_ray.errors import FedLQError
from fedlq_ray.federation import server
from fedlq_ray.federation.accounting import record_of
from fedlq_ray.federation.clock import round_time
from fedlq_ray.federation.downlink import Shared
from fedlq_ray.federation.flight import Flight, FlightEnd
from fedlq_ray.federation.fold import Fold
from fedlq_ray.federation.host import Future, Host
from fedlq_ray.federation.planning import Rules, probe, shares_of
from fedlq_ray.federation.record import Record
from fedlq_ray.federation.selection import called
from fedlq_ray.federation.selections import selection_of
from fedlq_ray.federation.server import Moments
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Task
from fedlq_ray.federation.traffic import Landings, Traffic, land
from fedlq_ray.significance import Measurement
from fedlq_ray.strategies import RoundResult, Strategy
from fedlq_ray.strategies.asking import asked
from fedlq_ray.training.payloads import PAYLOADS


@dataclass
class Timing:
    """Wall seconds, which are written only to timing.json.

    Attributes:
        round_s: of each round, from its first dispatch to its last payload.
        encode_s, decode_s: of each round's quantizing, at the clients and at the server, summed over clients.
        evaluation_s, probe_s: of each evaluation and probe, as they run.
    """

    round_s: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    evaluation_s: list[float] = field(default_factory=list)
    probe_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A finished step of the server.

    Attributes:
        record: with its evaluation, if the step is evaluated.
        state: the state before the next step.
        faults: why each skipped client failed.
        resumable: a run of more rounds has the same record. False if it was evaluated only as the last round.
        settle: waits until the host has answered all flights of the state, which a checkpoint needs.
        payloads: that the step took, in the order of summation, if the run keeps them.
    """

    record: Record
    state: ServerState
    faults: Mapping[int, str]
    resumable: bool
    settle: Callable[[], None] = lambda: None
    payloads: Sequence[bytes] = ()


def begin(task: Task, strategy: Strategy) -> ServerState:
    """The state before the first round."""
    weights = task.flat_model().read()
    return ServerState(
        round=0,
        weights=weights,
        update=torch.zeros_like(weights),
        sim_time_s=0.0,
        payload_bytes=None,
        server=Moments(),
        held={},
        tracked={},
        strategy=asked(strategy, task.config.seed, "init", 0),
        memories={},
        dispatches=0,
        selection=called(selection_of(task), task.config.seed, "init", 0),
        shared=Shared(weights, 0, {}) if task.config.network.downlink == "shared" else None,
    )


def run(
    task: Task,
    strategy: Strategy,
    host: Host,
    state: ServerState,
    timing: Timing,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Takes the server's steps from `state`; yields each once it is evaluated. Evaluations run during the next step.

    Args:
        stopped: called after each payload; if true, the current step is abandoned.
    Raises:
        ClientError: a client failed.
        FedLQError: the average is not finite, or nothing was learned.
    """
    state = _hosted(host, state)
    rules, pending, landings = Rules.of(task, strategy), None, Landings()
    published = host.publish(state.weights)
    while state.round < task.config.rounds:
        started = time.perf_counter()
        traffic = Traffic(rules, host, state, published, landings)
        probing = begin_probe(rules, host, state, sorted(traffic.flying))
        flights = sorted(traffic.flying.values(), key=lambda flight: flight.order)
        # Where the step takes all clients, their payloads are summed as they arrive.
        fold = fold_of(rules, state, flights) if task.config.synchronous else None
        traffic.advance()
        while not traffic.full:
            job, reply, _ = land(host, landings)
            if fold:
                fold.take(job.key, reply)
            if stopped():
                break
            if pending and pending.ready():
                yield pending.step(timing)
                pending = None
            traffic.advance()
        if stopped():  # this step does not count; the previous one is the last
            traffic.abandon()
            break
        timing.round_s.append(time.perf_counter() - started)
        if pending:  # before flights of its state may be stopped
            yield pending.step(timing)
        ended = traffic.close()
        fold = fold or taken(rules, state, ended)
        timing.encode_s.append(sum(reply.encode_s for reply in fold.replies.values()))
        timing.decode_s.append(fold.decode_s)
        measurement = None if probing is None else _timed(probing, timing.probe_s)
        state, record = commit(rules, state, traffic, ended, fold, measurement)
        published = host.publish(state.weights)
        regular = state.round % task.config.evaluate_every == 0
        due = regular or state.round == task.config.rounds
        faults = {fault.client: str(fault) for fault in fold.faults}
        settle = partial(_settle, host, landings, state.flights)
        evaluation = host.evaluate(published) if due else None
        kept = [reply.payload for reply in fold.replies.values()] if task.config.payloads else []
        pending = Pending(record, state, faults, evaluation, regular or not due, settle, kept)
    if pending:
        yield pending.step(timing)


def _hosted(host: Host, state: ServerState) -> ServerState:
    """The state with its memories in the host's form."""
    for flight in state.flights:
        if (answer := flight.landing.answer) and answer.memory is not None:
            (memory,) = host.remember({flight.client: answer.memory}).values()
            flight.landing.answer = answer._replace(memory=memory)
    return replace(state, memories=host.remember(state.memories))


def _settle(host: Host, landings: Landings, flights: Sequence[Flight]) -> None:
    """Waits for the answers to these flights, except to those that were taken back."""
    while any(flight.awaited and flight.key in landings for flight in flights):
        land(host, landings)


def begin_probe(rules: Rules, host: Host, state: ServerState, clients: Sequence[int]) -> Future | None:
    """Starts the step's probe, on what clients would send: the weights, or the last mean update."""
    if (wanted := probe(rules, state, clients)) is None:
        return None
    sent = PAYLOADS[rules.task.config.strategy.payload].probed(state.weights, state.update)
    return host.probe(wanted, state.weights - sent, sent, state.round)


def fold_of(rules: Rules, state: ServerState, flights: Sequence[Flight]) -> Fold:
    """The sum of what flights send, in their order. Older updates count less: (1 + staleness)^-exponent (FedBuff)."""
    sending = [(flight, job) for flight in flights if (job := flight.job)]
    shares = shares_of([flight.member for flight, _ in sending], [job.plan.weight for _, job in sending])
    exponent = rules.task.config.server.staleness_exponent
    return Fold(
        rules.task,
        [job for _, job in sending],
        [flight.download.model if flight.download.coded else state.weights for flight, _ in sending],
        shares,
        state.tracked,
        state.update,
        [(1 + state.round - flight.version) ** -exponent for flight, _ in sending],
        state.round,
    )


def taken(rules: Rules, state: ServerState, ended: Sequence[FlightEnd]) -> Fold:
    """The sum of the payloads that have arrived since the last step."""
    answered = [e.flight for e in ended if e.how in ("arrived", "failed")]
    fold = fold_of(rules, state, answered)
    for flight in answered:
        if answer := flight.landing.answer:
            fold.take(flight.key, answer.reply)
    return fold


def commit(
    rules: Rules,
    state: ServerState,
    traffic: Traffic,
    ended: Sequence[FlightEnd],
    fold: Fold,
    measurement: Measurement | None,
) -> tuple[ServerState, Record]:
    """Steps along the mean update, and lets the strategy and the selection learn; the new state and the record."""
    task, config, step = rules.task, rules.task.config, state.round
    fold.require_movement(alone=config.continuous)
    work = mean_work(ended, fold)
    # Buffers are averages already. Scaling or a larger step could make a variance negative.
    update, parameters = fold.mean().float(), fold.parameters
    update[:parameters] *= work
    mean, update = update, rules.ask("combine", step, copy.deepcopy(state.strategy), update)
    change, moments = server.step(config.server, state.server, update)
    weights = state.weights + torch.cat([change[:parameters], update[parameters:]])
    if not bool(torch.isfinite(weights).all()):
        raise FedLQError(f"round {step}: the average of the clients is not finite; lower train.lr")
    answered, sent = len(fold.replies), sum(len(reply.payload) for reply in fold.replies.values())
    norm = float(update[:parameters].double().norm())
    error = work * fold.mean_error if update is mean else None
    record = record_of(task, state, ended, fold, norm, error, traffic.now_s)
    payload_bytes = sent / answered if answered else None
    took_s = seconds_of(state, traffic, ended)
    result = RoundResult(measurement, update, state.weights, record.train_loss, took_s, fold.noise, payload_bytes)
    learned = rules.ask(
        "learn", step, copy.deepcopy(state.strategy), step, result
    )  # a user's strategy may change it in place
    record = replace(record, report=dict(rules.ask("report", step, learned)))
    return ServerState(
        round=step + 1,
        weights=weights,
        update=update,
        sim_time_s=traffic.now_s,
        payload_bytes=state.payload_bytes if payload_bytes is None else payload_bytes,
        server=moments,
        held=traffic.held,
        tracked=fold.tracked,
        strategy=learned,
        memories=traffic.memories,
        dispatches=traffic.dispatches,
        flights=tuple(sorted(traffic.flying.values(), key=lambda flight: flight.order)),
        selection=rules.learned(state, ended),
        shared=rules.downlink.broadcast(traffic.shared, weights, step),
    ), record


def seconds_of(state: ServerState, traffic: Traffic, ended: Sequence[FlightEnd]) -> float:
    """Simulated seconds of a step. Where it waits for all, its slowest client's: a difference of clocks would round."""
    if traffic.config.synchronous:
        return round_time(e.times for e in ended)
    return traffic.now_s - state.sim_time_s


def mean_work(ended: Sequence[FlightEnd], fold: Fold) -> float:
    """The mean work of the clients that answered, weighted by their shares.

    Each client sends its update per unit of work, and the sum is scaled by the mean work, so that clients that train
    longer do not dominate: FedNova (Wang et al., NeurIPS 2020, eq. 6).
    """
    works = {e.flight.key: e.flight.member.work for e in ended}
    came = [
        (share, works[job.key]) for share, job in zip(fold.shares, fold.jobs, strict=True) if job.key in fold.replies
    ]
    return sum(share * done for share, done in came) / (fold.answered or 1)


@dataclass(frozen=True)
class Pending:
    """A record that waits for its evaluation (None: it is not evaluated)."""

    record: Record
    state: ServerState
    faults: Mapping[int, str]
    evaluation: Future | None
    resumable: bool
    settle: Callable[[], None]
    payloads: Sequence[bytes] = ()

    def ready(self) -> bool:
        return self.evaluation is None or self.evaluation.ready()

    def step(self, timing: Timing) -> Step:
        """Waits for the evaluation."""
        if self.evaluation is None:
            return Step(self.record, self.state, self.faults, self.resumable, self.settle, self.payloads)
        found = _timed(self.evaluation, timing.evaluation_s)
        record = self.record.evaluated(found.metrics, found.loss if math.isfinite(found.loss) else None)
        return Step(record, self.state, self.faults, self.resumable, self.settle, self.payloads)


def _timed(future: Future, spent: list[float]) -> Any:
    value, wall_s = future.result()
    spent.append(wall_s)
    return value
