"""The rounds: plan, collect, commit, one after another.

Knows nothing of Ray: a `Host` trains and evaluates. The records are the same whatever the host and the order in
which replies arrive.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlq_ray import cohorts, server
from fedlq_ray.checkpoint import fingerprints, remembered, remind, require_unchanged
from fedlq_ray.clock import ClientTime, client_time, conditions, round_time
from fedlq_ray.downlink import Downlink, Offer
from fedlq_ray.errors import ClientError, FedLQError
from fedlq_ray.fold import Fold
from fedlq_ray.models import Layer
from fedlq_ray.quantization.wire import Sent
from fedlq_ray.record import Record
from fedlq_ray.server import Moments
from fedlq_ray.significance import Measurement
from fedlq_ray.state import ServerState
from fedlq_ray.strategies import Member, News, Probe, Strategy
from fedlq_ray.strategies.asking import asked
from fedlq_ray.task import Job, Task, Workplace
from fedlq_ray.training import Plan, Reply


class Future(Protocol):
    """Something under way elsewhere."""

    def ready(self) -> bool: ...

    def result(self) -> Any: ...


class Host(Protocol):
    """Where clients live. `publish` makes weights known to all; the others take what it gave.

    `train` gives each job's reply, in any order, or why a client failed where the round may go on without it.
    The futures of `evaluate` and `probe` give a `Timed`. `memories` has what clients keep for error feedback, in the
    host's own form; `recall` gives it as tensors, and `remember` puts such tensors in its place.
    """

    memories: dict[int, Any]

    def recall(self, memories: Mapping[int, Any]) -> dict[int, Tensor]: ...

    def remember(self, memories: Mapping[int, Tensor]) -> None: ...

    def publish(self, weights: Tensor) -> Any: ...

    def train(self, jobs: Sequence[Job], weights: Mapping[int, Any]) -> Iterator[tuple[int, Reply | ClientError]]: ...

    def evaluate(self, weights: Any) -> Future: ...

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> Future: ...


@dataclass
class Timing:
    """Wall seconds, which go to timing.json alone.

    Attributes:
        round_s: of each round, from its first dispatch to its last payload.
        encode_s, decode_s: of each round's quantizing at clients and at the server, all clients together.
        evaluation_s, probe_s: of each evaluation and probe, as they run.
    """

    round_s: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    evaluation_s: list[float] = field(default_factory=list)
    probe_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Planned:
    """A round before it trains.

    Attributes:
        members: the cohort, in order.
        offers: what each may fetch of the model.
        plans: what each is to send; clients without a plan skip the round and do not delay it.
        jobs: of the members that have a plan and do not drop out, in order.
        shares: of each job's update in the sum.
        probe: what the strategy wants measured while the round trains.
    """

    round: int
    members: Sequence[Member]
    offers: Mapping[int, Offer]
    plans: Mapping[int, Plan]
    jobs: Sequence[Job]
    shares: Sequence[float]
    probe: Probe | None


@dataclass(frozen=True)
class Step:
    """A round that is over.

    Attributes:
        record: with its evaluation, where one was due.
        state: what the next round begins from.
        faults: why each skipped client failed.
        resumable: a run of more rounds would have this record too: it was not evaluated only because it is the last.
    """

    record: Record
    state: ServerState
    faults: Mapping[int, str]
    resumable: bool


@dataclass(frozen=True)
class Rules:
    """What stays the same over rounds: the task, the strategy, and how the model is sent down."""

    task: Task
    strategy: Strategy
    downlink: Downlink
    constant: Mapping[str, bytes]  # digests of what the strategy must not change

    @staticmethod
    def of(task: Task, strategy: Strategy) -> "Rules":
        place, network = Workplace(task), task.config.network
        initial = place.initial_weights() if network.downlink_bits is not None else torch.empty(0)
        down = Downlink(
            place.setting, network.downlink_bits, network.downlink_cap_bits, initial, place.broadcast_size()
        )
        return Rules(task, strategy, down, fingerprints(strategy))

    def ask(self, method: str, round: int, *arguments: Any) -> Any:
        """What a method of the strategy returns."""
        return asked(self.strategy, self.task.config.seed, method, round, *arguments)


def begin(weights: Tensor, strategy: Strategy) -> ServerState:
    """The state before the first round."""
    return ServerState(
        round=0,
        weights=weights,
        update=torch.zeros_like(weights),
        sim_time_s=0.0,
        payload_bytes=None,
        server=Moments(),
        held={},
        tracked={},
        strategy=remembered(strategy),
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
    """The rounds from `state` on, each as soon as its evaluation is done; evaluations run while the next round trains.

    Args:
        stopped: asked after each payload; the round under way is then abandoned.
    Raises:
        ClientError: a client failed.
        FedLQError: the average is not finite, or nothing was learned.
    """
    remind(strategy, state.strategy)
    host.remember(state.memories)
    rules, pending = Rules.of(task, strategy), None
    published = host.publish(state.weights)
    while state.round < task.config.rounds:
        planned = plan(rules, state)
        probing = begin_probe(rules, host, planned, state)
        fold = Fold(task, planned.offers, planned.jobs, planned.shares, state.tracked)
        models = {job.client: planned.offers[job.client].model for job in planned.jobs}
        starts = {c: published if model is state.weights else host.publish(model) for c, model in models.items()}
        started = time.perf_counter()
        for client, reply in host.train(planned.jobs, starts):
            fold.take(client, reply)
            if stopped():
                break
            if pending and pending.ready():
                yield pending.step(timing)
                pending = None
        if stopped():  # this round does not count; the one before it is the last
            break
        timing.round_s.append(time.perf_counter() - started)
        timing.encode_s.append(sum(reply.encode_s for reply in fold.replies.values()))
        timing.decode_s.append(fold.decode_s)
        if pending:
            yield pending.step(timing)
        measurement = probing and _timed(probing, timing.probe_s)
        state, record = commit(rules, state, planned, fold, measurement, host.memories)
        published = host.publish(state.weights)
        regular = state.round % task.config.evaluate_every == 0
        due = regular or state.round == task.config.rounds
        faults = {fault.client: str(fault) for fault in fold.faults}
        pending = Pending(record, state, faults, host.evaluate(published) if due else None, regular or not due)
    if pending:
        yield pending.step(timing)


def plan(rules: Rules, state: ServerState) -> Planned:
    """Draw a cohort, and ask the strategy what each member is to send."""
    task, round = rules.task, state.round
    drawn = cohorts.draw(task, round)
    rates = {client: cohorts.downlink(task, client) for client in drawn}
    offers = rules.downlink.offer(state.held, state.weights, rates, round)
    members = [cohorts.member(task, client, offers[client].num_bytes) for client in drawn]
    if task.config.train.adaptive_work > 1:
        known = state.payload_bytes and [state.payload_bytes] * len(members)
        expected = rules.ask("expected_bytes", round, members) or known
        members = cohorts.with_own_work(task, members, expected) if expected else members
    plans = rules.ask("plan", round, round, members)
    answering = [m for m in members if m.client in plans and not cohorts.drops_out(task, round, m.client)]
    jobs = [Job(round, m.client, plans[m.client], _samples(task, m)) for m in answering]
    probe = rules.ask("probe", round, round)
    if probe and task.config.strategy.probe_on == "clients":
        probe = replace(probe, clients=tuple(drawn))
    shares = rules.ask("weights", round, answering) if answering else []
    return Planned(round, members, offers, plans, jobs, shares, probe)


def begin_probe(rules: Rules, host: Host, planned: Planned, state: ServerState) -> Future | None:
    """Have the round's probe measured, of what clients would send: the weights, or the last mean update."""
    if planned.probe is None:
        return None
    sent = state.weights if rules.task.config.strategy.payload == "model" else state.update
    return host.probe(planned.probe, state.weights - sent, sent, planned.round)


def commit(
    rules: Rules,
    state: ServerState,
    planned: Planned,
    fold: Fold,
    measurement: Measurement | None,
    memories: Mapping[int, Any],
) -> tuple[ServerState, Record]:
    """Step along the mean update, move the clock, and let the strategy learn; the new state, and the round's record."""
    task, config, round = rules.task, rules.task.config, planned.round
    fold.require_movement()
    work = mean_work(planned, fold)
    # Buffers are averages already: scaled or stepped beyond them, a variance could fall below zero.
    update, parameters = fold.mean().float(), fold.parameters
    update[:parameters] *= work
    mean, update = update, rules.ask("combine", round, update)
    step, moments = server.step(config.server, state.server, update)
    weights = state.weights + torch.cat([step[:parameters], update[parameters:]])
    if not bool(torch.isfinite(weights).all()):
        raise FedLQError(f"round {round}: the average of the clients is not finite; lower train.lr")
    fetched = {m.client: planned.offers[m.client].model for m in planned.members if m.client in planned.plans}
    times = _times(task, planned, fold)
    round_time_s, answered = round_time(times), len(fold.replies)
    sent = sum(len(reply.payload) for reply in fold.replies.values())
    sim_time_s = state.sim_time_s + round_time_s
    norm = float(update[:parameters].double().norm())
    error = work * fold.mean_error if update is mean else None
    record = _record(task, planned, fold, times, norm, error, sim_time_s)
    rules.ask("learn", round, round, News(measurement, update, record.train_loss, round_time_s, fold.spread))
    record = replace(record, report=dict(rules.ask("report", round)))
    require_unchanged(rules.strategy, rules.constant)
    return ServerState(
        round=round + 1,
        weights=weights,
        update=update,
        sim_time_s=sim_time_s,
        payload_bytes=sent / answered if answered else state.payload_bytes,
        server=moments,
        held={**state.held, **fetched} if rules.downlink.bits is not None else state.held,
        tracked=fold.tracked,
        strategy=remembered(rules.strategy),
        memories={client: memory for client, memory in memories.items() if memory is not None},
    ), record


def mean_work(planned: Planned, fold: Fold) -> float:
    """The mean of the work of those that answered, by their shares.

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
    """A record that waits for its evaluation; None: it needs none."""

    record: Record
    state: ServerState
    faults: Mapping[int, str]
    evaluation: Future | None
    resumable: bool

    def ready(self) -> bool:
        return self.evaluation is None or self.evaluation.ready()

    def step(self, timing: Timing) -> Step:
        """Wait for the evaluation."""
        if self.evaluation is None:
            return Step(self.record, self.state, self.faults, self.resumable)
        found = _timed(self.evaluation, timing.evaluation_s)
        record = self.record.evaluated(found.accuracy, found.loss if math.isfinite(found.loss) else None)
        return Step(record, self.state, self.faults, self.resumable)


def _timed(future: Future, spent: list[float]) -> Any:
    value, wall_s = future.result()
    spent.append(wall_s)
    return value


def _samples(task: Task, member: Member) -> int:
    """Samples that a member goes through in a round."""
    return int(0.5 + member.work * cohorts.base_work(task, member.samples))


def clock(
    task: Task,
    round: int,
    clients: Sequence[int],
    samples: Sequence[int],
    uplink_bytes: Sequence[int],
    downlink_bytes: Sequence[int],
) -> list[ClientTime]:
    """How long each client's part of a round took, under the round's own conditions."""
    config = task.config
    return [
        client_time(
            conditions(task.profiles[client], seed=config.seed, round=round, client=client),
            flops=task.flops * done,
            uplink_bytes=up,
            downlink_bytes=down,
            bill=config.network.bill,
            uplink_free=config.network.uplink_free,
        )
        for client, done, up, down in zip(clients, samples, uplink_bytes, downlink_bytes, strict=True)
    ]


def _times(task: Task, planned: Planned, fold: Fold) -> list[ClientTime]:
    """How long each member's part took. Clients without a plan fetch nothing, and do not delay the round."""
    clients, samples = [m.client for m in planned.members], _client_samples(task, planned)
    return clock(task, planned.round, clients, samples, _sent(planned, fold), _received(planned))


def _client_samples(task: Task, planned: Planned) -> list[int]:
    return [_samples(task, m) if m.client in planned.plans else 0 for m in planned.members]


def _sent(planned: Planned, fold: Fold) -> list[int]:
    return [len(fold.replies[m.client].payload) if m.client in fold.replies else 0 for m in planned.members]


def _received(planned: Planned) -> list[int]:
    return [planned.offers[m.client].num_bytes if m.client in planned.plans else 0 for m in planned.members]


def _record(
    task: Task,
    planned: Planned,
    fold: Fold,
    times: Sequence[ClientTime],
    update_norm: float,
    quantization_error: float | None,
    sim_time_s: float,
) -> Record:
    replies = fold.replies
    clients = [m.client for m in planned.members]
    sent, received = _sent(planned, fold), _received(planned)
    spent = {
        client: {layer.name: _bits(layer, sent) for layer in task.layers}
        for client, sent in zip(replies, fold.sent, strict=True)
    }
    names = [layer.name for layer in task.layers]
    bits = {name: sum(own[name] for own in spent.values()) / max(1, len(spent)) for name in names}
    by_client = {name: [float(f"{spent[c][name]:.3g}") if c in spent else None for c in clients] for name in names}
    shares = {job.client: share for job, share in zip(fold.jobs, fold.shares, strict=True)}
    losses = [shares[client] * reply.train_loss for client, reply in replies.items()]
    return Record(
        round=planned.round,
        cohort=clients,
        answered=list(replies),
        skipped=fold.lost,
        uplink_bytes=sum(sent),
        downlink_bytes=sum(received),
        train_loss=sum(losses) * (sum(fold.shares) / fold.answered if fold.lost else 1) if losses else None,
        bits_per_parameter=bits,
        client_samples=_client_samples(task, planned),
        client_uplink_bytes=sent,
        client_downlink_bytes=received,
        client_bits_per_parameter=by_client,
        client_download_s=[t.download_s for t in times],
        client_compute_s=[t.compute_s for t in times],
        client_upload_s=[t.upload_s for t in times],
        update_norm=update_norm,
        quantization_error=quantization_error,
        sim_time_s=sim_time_s,
        report={},
        accuracy=None,
        test_loss=None,
    )


def _bits(layer: Layer, sent: Sequence[Sent]) -> float:
    """Bits a parameter that a payload spent on a layer, headers included; a piece's elements share its bytes evenly."""
    total = 0.0
    for start, stop, num_bytes in sent:
        shared = min(stop, layer.stop) - max(start, layer.start)
        if shared > 0:
            total += 8 * num_bytes * shared / (stop - start)
    return total / layer.size
