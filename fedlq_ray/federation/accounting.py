"""Accounts for a round: bytes, simulated seconds, and the record."""

from collections.abc import Sequence

from fedlq_ray.federation.clock import ClientTime, client_time, conditions
from fedlq_ray.federation.fold import Fold
from fedlq_ray.federation.planning import Planned, samples_of_member
from fedlq_ray.federation.record import Record
from fedlq_ray.federation.task import Task
from fedlq_ray.models import Layer
from fedlq_ray.quantization.wire import Sent


def clock(
    task: Task,
    round: int,
    clients: Sequence[int],
    samples: Sequence[int],
    uplink_bytes: Sequence[int],
    downlink_bytes: Sequence[int],
) -> list[ClientTime]:
    """Each client's times in a round, under the conditions drawn for that round."""
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


def times_of(task: Task, planned: Planned, fold: Fold) -> list[ClientTime]:
    """Each member's times. Clients without a plan fetch nothing and do not delay the round."""
    clients, samples = [m.client for m in planned.members], _client_samples(task, planned)
    return clock(task, planned.round, clients, samples, _sent(planned, fold), _received(planned))


def _client_samples(task: Task, planned: Planned) -> list[int]:
    return [samples_of_member(task, m) if m.client in planned.plans else 0 for m in planned.members]


def _sent(planned: Planned, fold: Fold) -> list[int]:
    return [len(fold.replies[m.client].payload) if m.client in fold.replies else 0 for m in planned.members]


def _received(planned: Planned) -> list[int]:
    return [planned.offers[m.client].num_bytes if m.client in planned.plans else 0 for m in planned.members]


def record_of(
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
    """A payload's bits per parameter of a layer, headers included. A segment's elements share its bytes evenly."""
    total = 0.0
    for start, stop, num_bytes in sent:
        shared = min(stop, layer.stop) - max(start, layer.start)
        if shared > 0:
            total += 8 * num_bytes * shared / (stop - start)
    return total / layer.size
