"""Accounts for a round: bytes, simulated seconds, and the record."""

from collections.abc import Sequence
from typing import Any

from fedlq_ray.federation.clock import ClientTime, client_time, conditions
from fedlq_ray.federation.flight import FlightEnd, samples
from fedlq_ray.federation.fold import Fold
from fedlq_ray.federation.record import Record
from fedlq_ray.federation.state import ServerState
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
    """Each client's times in a synchronous round, under the conditions drawn for that round."""
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


def record_of(
    task: Task,
    state: ServerState,
    ended: Sequence[FlightEnd],
    fold: Fold,
    update_norm: float,
    quantization_error: float | None,
    sim_time_s: float,
) -> Record:
    """The record of a step, without its evaluation and the strategy's report.

    Args:
        state: before the step.
        ended: the flights that ended since the last step, in their order.
    """
    spent = {
        key: {layer.name: _bits(layer, sent) for layer in task.layers}
        for key, sent in zip(fold.replies, fold.sent, strict=True)
    }
    keys, names = [e.flight.key for e in ended], [layer.name for layer in task.layers]
    bits = {name: sum(own[name] for own in spent.values()) / max(1, len(spent)) for name in names}
    by_client = {name: [float(f"{spent[k][name]:.3g}") if k in spent else None for k in keys] for name in names}
    shares = {job.key: share for job, share in zip(fold.jobs, fold.shares, strict=True)}
    losses = [shares[key] * reply.train_loss for key, reply in fold.replies.items()]
    return Record(
        round=state.round,
        cohort=[e.flight.client for e in ended],
        answered=[client for _, client in fold.replies],
        skipped=[fault.client for fault in fold.faults],
        uplink_bytes=sum(e.uplink_bytes for e in ended),
        downlink_bytes=sum(e.downlink_bytes for e in ended),
        train_loss=sum(losses) * fold.whole if losses else None,
        bits_per_parameter=bits,
        client_samples=[samples(task, e.flight) for e in ended],
        client_uplink_bytes=[e.uplink_bytes for e in ended],
        client_downlink_bytes=[e.downlink_bytes for e in ended],
        client_bits_per_parameter=by_client,
        client_download_s=[e.times.download_s for e in ended],
        client_compute_s=[e.times.compute_s for e in ended],
        client_upload_s=[e.times.upload_s for e in ended],
        update_norm=update_norm,
        quantization_error=quantization_error,
        sim_time_s=sim_time_s,
        report={},
        accuracy=None,
        test_loss=None,
        **({} if task.config.synchronous else _of_flights(state, ended)),
    )


def _of_flights(state: ServerState, ended: Sequence[FlightEnd]) -> dict[str, Any]:
    """What a record has of flights, where not all of them start and end with the step."""
    return {
        "client_start_s": [e.flight.start_s for e in ended],
        "client_staleness": [state.round - e.flight.version for e in ended],
        "client_end": [e.how for e in ended],
        "wasted_bytes": sum(e.wasted for e in ended),
    }


def _bits(layer: Layer, sent: Sequence[Sent]) -> float:
    """A payload's bits per parameter of a layer, headers included. A segment's elements share its bytes evenly."""
    total = 0.0
    for start, stop, num_bytes in sent:
        shared = min(stop, layer.stop) - max(start, layer.start)
        if shared > 0:
            total += 8 * num_bytes * shared / (stop - start)
    return total / layer.size
