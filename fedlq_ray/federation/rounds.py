"""The rounds: plan, collect, commit, one after another.

This module does not depend on Ray: a `Host` trains and evaluates. Neither the host nor the order in which replies
arrive changes the records.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedlq_ray.errors import FedLQError
from fedlq_ray.federation import server
from fedlq_ray.federation.accounting import record_of, times_of
from fedlq_ray.federation.clock import round_time
from fedlq_ray.federation.fold import Fold
from fedlq_ray.federation.host import Future, Host
from fedlq_ray.federation.planning import Planned, Rules, plan
from fedlq_ray.federation.record import Record
from fedlq_ray.federation.server import Moments
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Task
from fedlq_ray.significance import Measurement
from fedlq_ray.strategies import News, Strategy
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
    """A finished round.

    Attributes:
        record: with its evaluation, if the round is evaluated.
        state: the state before the next round.
        faults: why each skipped client failed.
        resumable: a run of more rounds has the same record. False if it was evaluated only as the last round.
    """

    record: Record
    state: ServerState
    faults: Mapping[int, str]
    resumable: bool


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
    )


def run(
    task: Task,
    strategy: Strategy,
    host: Host,
    state: ServerState,
    timing: Timing,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Runs the rounds from `state`; yields each once it is evaluated. Evaluations run while the next round trains.

    Args:
        stopped: called after each payload; if true, the current round is abandoned.
    Raises:
        ClientError: a client failed.
        FedLQError: the average is not finite, or nothing was learned.
    """
    state = replace(state, memories=host.remember(state.memories))
    rules, pending = Rules.of(task, strategy), None
    published = host.publish(state.weights)
    while state.round < task.config.rounds:
        planned = plan(rules, state)
        probing = begin_probe(rules, host, planned, state)
        fold = Fold(task, planned.offers, planned.jobs, planned.shares, state.tracked)
        models = {job.client: planned.offers[job.client].model for job in planned.jobs}
        starts = {c: published if model is state.weights else host.publish(model) for c, model in models.items()}
        started = time.perf_counter()
        kept: dict[int, Any] = {}  # the memories that this round changes
        for job in planned.jobs:
            host.submit(job, starts[job.client], state.memories.get(job.client))
        while fold.waits:
            job, reply, memory = host.result()
            fold.take(job.client, reply)
            if memory is not None:
                kept[job.client] = memory
            if stopped():
                host.withdraw(planned.jobs)
                break
            if pending and pending.ready():
                yield pending.step(timing)
                pending = None
        if stopped():  # this round does not count; the previous one is the last
            break
        timing.round_s.append(time.perf_counter() - started)
        timing.encode_s.append(sum(reply.encode_s for reply in fold.replies.values()))
        timing.decode_s.append(fold.decode_s)
        if pending:
            yield pending.step(timing)
        measurement = None if probing is None else _timed(probing, timing.probe_s)
        state, record = commit(rules, state, planned, fold, measurement, kept)
        published = host.publish(state.weights)
        regular = state.round % task.config.evaluate_every == 0
        due = regular or state.round == task.config.rounds
        faults = {fault.client: str(fault) for fault in fold.faults}
        pending = Pending(record, state, faults, host.evaluate(published) if due else None, regular or not due)
    if pending:
        yield pending.step(timing)


def begin_probe(rules: Rules, host: Host, planned: Planned, state: ServerState) -> Future | None:
    """Starts the round's probe, on what clients would send: the weights, or the last mean update."""
    if planned.probe is None:
        return None
    sent = PAYLOADS[rules.task.config.strategy.payload].probed(state.weights, state.update)
    return host.probe(planned.probe, state.weights - sent, sent, planned.round)


def commit(
    rules: Rules,
    state: ServerState,
    planned: Planned,
    fold: Fold,
    measurement: Measurement | None,
    kept: Mapping[int, Any],
) -> tuple[ServerState, Record]:
    """Steps along the mean update, advances the clock, and lets the strategy learn; the new state and the record."""
    task, config, round = rules.task, rules.task.config, planned.round
    fold.require_movement()
    work = mean_work(planned, fold)
    # Buffers are averages already. Scaling or a larger step could make a variance negative.
    update, parameters = fold.mean().float(), fold.parameters
    update[:parameters] *= work
    mean, update = update, rules.ask("combine", round, update)
    step, moments = server.step(config.server, state.server, update)
    weights = state.weights + torch.cat([step[:parameters], update[parameters:]])
    if not bool(torch.isfinite(weights).all()):
        raise FedLQError(f"round {round}: the average of the clients is not finite; lower train.lr")
    fetched = {m.client: planned.offers[m.client].model for m in planned.members if m.client in planned.plans}
    times = times_of(task, planned, fold)
    round_time_s, answered = round_time(times), len(fold.replies)
    sent = sum(len(reply.payload) for reply in fold.replies.values())
    sim_time_s = state.sim_time_s + round_time_s
    norm = float(update[:parameters].double().norm())
    error = work * fold.mean_error if update is mean else None
    record = record_of(task, planned, fold, times, norm, error, sim_time_s)
    payload_bytes = sent / answered if answered else None
    news = News(measurement, update, record.train_loss, round_time_s, fold.noise, payload_bytes)
    learned = rules.ask(
        "learn", round, copy.deepcopy(state.strategy), round, news
    )  # a user's strategy may change it in place
    record = replace(record, report=dict(rules.ask("report", round, learned)))
    return ServerState(
        round=round + 1,
        weights=weights,
        update=update,
        sim_time_s=sim_time_s,
        payload_bytes=state.payload_bytes if payload_bytes is None else payload_bytes,
        server=moments,
        held={**state.held, **fetched} if rules.downlink.bits is not None else state.held,
        tracked=fold.tracked,
        strategy=learned,
        memories={**state.memories, **kept},
    ), record


def mean_work(planned: Planned, fold: Fold) -> float:
    """The mean work of the clients that answered, weighted by their shares.

    Each client sends its update per unit of work, and the sum is scaled by the mean work, so that clients that train
    longer do not dominate: FedNova (Wang et al., NeurIPS 2020, eq. 6).
    """
    works = {m.client: m.work for m in planned.members}
    came = [
        (share, works[j.client])
        for share, j in zip(planned.shares, planned.jobs, strict=True)
        if j.client in fold.replies
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

    def ready(self) -> bool:
        return self.evaluation is None or self.evaluation.ready()

    def step(self, timing: Timing) -> Step:
        """Waits for the evaluation."""
        if self.evaluation is None:
            return Step(self.record, self.state, self.faults, self.resumable)
        found = _timed(self.evaluation, timing.evaluation_s)
        record = self.record.evaluated(found.metrics, found.loss if math.isfinite(found.loss) else None)
        return Step(record, self.state, self.faults, self.resumable)


def _timed(future: Future, spent: list[float]) -> Any:
    value, wall_s = future.result()
    spent.append(wall_s)
    return value
