"""Who takes part in a round, what a plan may know of each, and how much each trains."""

import math
from collections.abc import Sequence
from dataclasses import replace

from fedlq_ray.clock import client_time
from fedlq_ray.seeding import numpy_rng
from fedlq_ray.strategies import Member
from fedlq_ray.task import Task
from fedlq_ray.training import samples_of


def draw(task: Task, round: int) -> list[int]:
    """The clients of a round, in order, drawn without replacement."""
    clients = task.config.clients
    drawn = numpy_rng(task.config.seed, "cohort", round).choice(clients.count, clients.cohort, replace=False)
    return sorted(int(client) for client in drawn)


def drops_out(task: Task, round: int, client: int) -> bool:
    """Whether a client fails to answer in a round."""
    chance = task.config.clients.dropout
    return chance > 0 and float(numpy_rng(task.config.seed, "dropout", round, client).random()) < chance


def base_work(task: Task, samples: int) -> int:
    """Samples that a client goes through in a round, in all passes, where it does no more than it must."""
    return samples * task.config.train.local_epochs


def member(task: Task, client: int, downlink_bytes: int) -> Member:
    """A client as a plan sees it: its profile's means."""
    network, profile = task.config.network, task.profiles[client]
    samples = samples_of(len(task.shards[client]), task.config.train)
    time = client_time(
        profile,
        flops=task.flops * base_work(task, samples),
        uplink_bytes=0,
        downlink_bytes=downlink_bytes,
        bill=network.bill,
        uplink_free=network.uplink_free,
    )
    latency = 0.0 if network.uplink_free else profile.latency_ms / 1e3
    rate = math.inf if network.uplink_free else profile.uplink_mbps * 1e6 / 8
    return Member(client, samples, time.total_s + latency, rate)


def with_more_work(task: Task, members: Sequence[Member], payload_bytes: float) -> list[Member]:
    """Members that would wait for the slowest train on, up to `train.adaptive_work` times what they must.

    Args:
        payload_bytes: what a member sends at least. When the slowest has sent as much, the round may end.
    """
    limit, batch = task.config.train.adaptive_work, task.config.train.batch_size
    deadline = max(m.fixed_s + payload_bytes / m.uplink_bytes_per_s for m in members)

    def longer(m: Member) -> Member:
        base = base_work(task, m.samples)
        sample_s = task.flops / (task.profiles[m.client].compute_gflops * 1e9)
        spare_s = deadline - m.fixed_s - payload_bytes / m.uplink_bytes_per_s
        # Whole steps; the slowest has nothing to spare, which may come out below zero by a rounding.
        more = batch * max(0, math.floor(min((limit - 1) * base, spare_s / sample_s) / batch))
        return replace(m, work=(base + more) / base, fixed_s=m.fixed_s + more * sample_s)

    return [longer(m) for m in members]
