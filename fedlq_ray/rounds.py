"""The rounds: sample a cohort, plan, train, fold in client order, move the simulated clock, evaluate.

Knows nothing of Ray: a `Host` trains and evaluates. The records are the same whatever the host and the order in
which replies come.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlq_ray import cohorts
from fedlq_ray.checkpoint import Snapshot, fingerprints, remembered, remind, require_unchanged
from fedlq_ray.clock import ClientTime, client_time, conditions, round_time
from fedlq_ray.downlink import Downlink, Offer
from fedlq_ray.errors import ClientError, FedLQError
from fedlq_ray.fold import Fold
from fedlq_ray.models import Layer
from fedlq_ray.quantization.wire import Sent
from fedlq_ray.server import ServerOptimizer
from fedlq_ray.significance import Measurement
from fedlq_ray.strategies import Member, News, Probe, Strategy
from fedlq_ray.strategies.asking import asked
from fedlq_ray.task import Job, Task, Workplace
from fedlq_ray.training import Evaluation, Plan, Reply


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


Record = dict[str, Any]
TIMINGS = ("round_s", "encode_s", "decode_s", "evaluation_s", "probe_s")


@dataclass
class Outcome:
    """What the rounds leave.

    Attributes:
        weights: (d,) float32, after the last record's round.
        update: (d,) float32, that round's mean update, as the strategy combines it; the server may step otherwise.
        completed: all that was asked for was done.
        skipped: why a client was passed over, for the first time.
        timing: wall seconds. round_s: of each round from first dispatch to last payload folded; encode_s, decode_s: of
            its clients' codec, all clients together; evaluation_s, probe_s: of each evaluation and probe, as they run.
    """

    weights: Tensor
    update: Tensor = field(init=False)
    completed: bool = False
    skipped: dict[int, str] = field(default_factory=dict)
    timing: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMINGS})

    def __post_init__(self) -> None:
        self.update = torch.zeros_like(self.weights)


class _Reached(Exception):
    """The target is reached, and the run is to stop there."""


def run(
    task: Task,
    strategy: Strategy,
    host: Host,
    outcome: Outcome,
    stopped: Callable[[], bool] = lambda: False,
    saved: Snapshot | None = None,
    keep: Callable[[Snapshot], None] = lambda snapshot: None,
) -> Iterator[Record]:
    """Each round's record, as soon as it is known; `outcome` has the weights that belong to the last record.

    Args:
        saved: where to go on from; None: from the start.
        keep: called after each record with what a run needs to go on from there, but not after an evaluation that only
            the last round has: with more rounds it has none. Its values are replaced from round to round, never changed
            in place; `memories` are in the host's form.
    Raises:
        ClientError: a client failed.
        FedLQError: the average is not finite.
    """
    config, place = task.config, Workplace(task)
    downlink = Downlink(
        place.setting,
        config.network.downlink_bits,
        config.network.downlink_cap_bits,
        outcome.weights,
        place.broadcast_size(),
    )
    server = ServerOptimizer(config.server)
    start, sim_time_s, payload_bytes, last_evaluation = 0, 0.0, None, None
    tracked: dict[int, Tensor] = {}  # by EF21: what the server has of each client
    pending: tuple[Record, Future | None, Snapshot] | None = None
    if saved is not None:
        start, sim_time_s, payload_bytes = saved["round"], saved["sim_time_s"], saved["payload_bytes"]
        last_evaluation, outcome.weights, outcome.update = saved["test_loss"], saved["weights"], saved["update"]
        server.momentum, server.square = saved["server"]
        downlink.held, tracked = dict(saved["held"]), dict(saved["tracked"])
        host.remember(saved["memories"])
        remind(strategy, saved["strategy"])
    constant = fingerprints(strategy)

    def snapshot(following: int) -> Snapshot:
        return {
            "round": following,
            "weights": outcome.weights,
            "update": outcome.update,
            "sim_time_s": sim_time_s,
            "payload_bytes": payload_bytes,
            "server": (server.momentum, server.square),
            "held": dict(downlink.held),
            "tracked": dict(tracked),
            "strategy": remembered(strategy),
            "memories": {client: memory for client, memory in host.memories.items() if memory is not None},
        }

    def finished(wait: bool) -> Iterator[Record]:
        """The record that waits for its evaluation, if it can be had."""
        nonlocal pending, last_evaluation
        if pending is None or not (wait or pending[1] is None or pending[1].ready()):
            return
        record, future, after = pending
        pending = None
        evaluation: Evaluation | None = None
        if future is not None:
            evaluation, wall_s = future.result()
            outcome.timing["evaluation_s"].append(wall_s)
        record["accuracy"] = evaluation.accuracy if evaluation else None
        record["test_loss"] = evaluation.loss if evaluation and math.isfinite(evaluation.loss) else None
        last_evaluation = record["test_loss"] if record["test_loss"] is not None else last_evaluation
        yield record
        target = config.target_accuracy
        if config.stop_at_target and evaluation and target is not None and evaluation.accuracy >= target:
            raise _Reached  # and nothing is kept to go on from: a resume would train past the target
        # What only the last round evaluates, a run of more rounds would not have.
        if future is None or after["round"] % config.evaluate_every == 0:
            keep(after | {"test_loss": last_evaluation})

    published = host.publish(outcome.weights)
    ask = partial(asked, strategy, config.seed)

    def starting(model: Tensor) -> Any:
        """What a client starts from, where the host can reach it."""
        return published if model is outcome.weights else host.publish(model)

    try:
        for round in range(start, config.rounds):
            if strategy.needs_evaluation:
                yield from finished(wait=True)
            drawn = cohorts.draw(task, round)
            offers = downlink.offer(outcome.weights, {c: cohorts.downlink(task, c) for c in drawn}, round)
            members = [cohorts.member(task, c, offers[c].num_bytes) for c in drawn]
            if config.train.adaptive_work > 1:
                expected = ask("expected_bytes", round, members) or (payload_bytes and [payload_bytes] * len(members))
                members = cohorts.with_own_work(task, members, expected) if expected else members
            plans = ask("plan", round, round, members, last_evaluation)
            answering = [m for m in members if m.client in plans and not cohorts.drops_out(task, round, m.client)]
            jobs = [Job(round, m.client, plans[m.client], _samples(task, m)) for m in answering]
            wanted = ask("probe", round, round)
            if wanted and config.strategy.probe_on == "clients":
                wanted = replace(wanted, clients=tuple(m.client for m in members))
            sent = outcome.weights if config.strategy.payload == "model" else outcome.update
            probing = host.probe(wanted, outcome.weights - sent, sent, round) if wanted else None

            started, decode_s = time.perf_counter(), 0.0
            shares = ask("weights", round, answering) if answering else []
            fold = Fold(task, offers, jobs, shares, tracked)
            for client, reply in host.train(jobs, {j.client: starting(offers[j.client].model) for j in jobs}):
                before = time.perf_counter()
                fold.take(client, reply)
                decode_s += time.perf_counter() - before
                if stopped():
                    break
                yield from finished(wait=False)
            if stopped():  # this round is not counted; the one before it is
                break
            outcome.timing["round_s"].append(time.perf_counter() - started)
            outcome.timing["encode_s"].append(sum(reply.encode_s for reply in fold.replies.values()))
            outcome.timing["decode_s"].append(decode_s)
            fold.require_movement()
            outcome.skipped = {fault.client: str(fault) for fault in fold.faults} | outcome.skipped
            yield from finished(wait=True)

            measurement: Measurement | None = None
            if probing:
                measurement, wall_s = probing.result()
                outcome.timing["probe_s"].append(wall_s)
            # FedNova (Wang et al., NeurIPS 2020, eq. 6): each client sends its update by the unit of work, and the sum
            # is taken for the mean work, so that who trains more does not count more.
            came = [(share, m.work) for share, m in zip(shares, answering, strict=True) if m.client in fold.replies]
            work = sum(share * done for share, done in came) / (fold.answered or 1)
            # Buffers are averages already: scaled or stepped beyond them, a variance could fall below zero.
            update, parameters = fold.mean().float(), sum(layer.size for layer in task.layers if not layer.buffer)
            update[:parameters] *= work
            mean, update = update, ask("combine", round, update)
            outcome.update = update
            outcome.weights = outcome.weights + torch.cat([server.step(update)[:parameters], update[parameters:]])
            if not bool(torch.isfinite(outcome.weights).all()):
                raise FedLQError(f"round {round}: the average of the clients is not finite; lower train.lr")
            for client in set(drawn) & set(plans):
                downlink.fetched(client, offers[client])
            record = _record(task, round, members, plans, fold, offers)
            record["update_norm"] = float(update[:parameters].double().norm())
            record["quantization_error"] = work * fold.mean_error if update is mean else None
            payload_bytes = record["uplink_bytes"] / len(fold.replies) if fold.replies else payload_bytes
            round_time_s = record.pop("round_time_s")
            sim_time_s += round_time_s
            record["sim_time_s"] = sim_time_s
            news = News(measurement, update, record["train_loss"], round_time_s, fold.spread)
            ask("learn", round, round, news)
            record.update(ask("report", round))
            require_unchanged(strategy, constant)
            published = host.publish(outcome.weights)
            due = (round + 1) % config.evaluate_every == 0 or round + 1 == config.rounds
            pending = (record, host.evaluate(published) if due else None, snapshot(round + 1))
        else:
            outcome.completed = True
        yield from finished(wait=True)
    except _Reached:
        outcome.completed = True


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


def _record(
    task: Task,
    round: int,
    members: Sequence[Member],
    plans: Mapping[int, Plan],
    fold: Fold,
    offers: Mapping[int, Offer],
) -> Record:
    replies = fold.replies
    clients = [m.client for m in members]
    # Who has no plan takes no part: nothing is fetched, and nobody waits.
    samples = [_samples(task, m) if m.client in plans else 0 for m in members]
    sent = [len(replies[client].payload) if client in replies else 0 for client in clients]
    received = [offers[client].num_bytes if client in plans else 0 for client in clients]
    times = clock(task, round, clients, samples, sent, received)
    spent = {
        client: {layer.name: _bits(layer, sent) for layer in task.layers}
        for client, sent in zip(replies, fold.sent, strict=True)
    }
    names = [layer.name for layer in task.layers]
    bits = {name: sum(own[name] for own in spent.values()) / max(1, len(spent)) for name in names}
    by_client = {name: [float(f"{spent[c][name]:.3g}") if c in spent else None for c in clients] for name in names}
    shares = {job.client: share for job, share in zip(fold.jobs, fold.shares, strict=True)}
    losses = [shares[client] * reply.train_loss for client, reply in replies.items()]
    return {
        "round": round,
        "cohort": clients,
        "answered": list(replies),
        "skipped": fold.lost,
        "round_time_s": round_time(times),
        "uplink_bytes": sum(sent),
        "downlink_bytes": sum(received),
        "train_loss": sum(losses) * (sum(fold.shares) / fold.answered if fold.lost else 1) if losses else None,
        "bits_per_parameter": bits,
        "client_samples": samples,
        "client_uplink_bytes": sent,
        "client_downlink_bytes": received,
        "client_bits_per_parameter": by_client,
        "client_download_s": [t.download_s for t in times],
        "client_compute_s": [t.compute_s for t in times],
        "client_upload_s": [t.upload_s for t in times],
    }


def _bits(layer: Layer, sent: Sequence[Sent]) -> float:
    """Bits a parameter that a payload spent on a layer, headers included; a piece's elements share its bytes evenly."""
    total = 0.0
    for start, stop, num_bytes in sent:
        shared = min(stop, layer.stop) - max(start, layer.start)
        if shared > 0:
            total += 8 * num_bytes * shared / (stop - start)
    return total / layer.size
