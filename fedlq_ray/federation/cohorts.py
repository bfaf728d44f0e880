"""What a plan knows about each client, and how much each trains."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.clock import client_time
from fedlq_ray.federation.task import Task
from fedlq_ray.seeding import numpy_rng
from fedlq_ray.strategies import Member
from fedlq_ray.training.sgd import samples_of


def drops_out(task: Task, dispatch: int, client: int) -> bool:
    """Whether a client that is asked in a dispatch does not answer."""
    chance = task.config.clients.dropout
    return chance > 0 and float(numpy_rng(task.config.seed, "dropout", dispatch, client).random()) < chance


def downlink(task: Task, client: int) -> float:
    """A client's mean downlink, bytes per second."""
    return task.profiles[client].downlink_mbps * 1e6 / 8


def base_work(task: Task, samples: int) -> int:
    """Samples that a client processes in a round, over all passes, at the base amount of work."""
    return samples * task.config.train.local_epochs


def member(task: Task, client: int, downlink_bytes: int) -> Member:
    """Returns a client as seen by a plan, with the means of its profile."""
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
    server = task.config.server
    server_lr = server.lr if server.optimizer == "none" else 1.0
    return Member(client, samples, time.total_s + latency, rate, updates=task.config.updates, server_lr=server_lr)


def require_deadline(task: Task) -> None:
    """Requires that a client can meet `server.deadline_s`, where a step stops those that do not.

    Raises:
        ConfigError: not even the fastest client could, with an upload of no bytes.
    """
    deadline_s = task.config.server.deadline_s
    if deadline_s is None or task.config.continuous or task.config.clients.variation or task.bandwidth.of_clients:
        return
    first = min((member(task, client, 0) for client in range(task.clients.count)), key=lambda m: m.fixed_s)
    if first.fixed_s > deadline_s:
        raise ConfigError(
            f"server.deadline_s: no client can meet {deadline_s:g} s; the fastest, client {first.client}, needs "
            f"{first.fixed_s:.3g} s without any bytes; raise it, or let clients be under way over several steps "
            "(server.max_staleness=null)"
        )


def samples_of_member(task: Task, member: Member) -> int:
    """Samples that a member trains on in a round, over all passes."""
    return int(0.5 + member.work * base_work(task, member.samples))


def with_own_work(task: Task, members: Sequence[Member], payload_bytes: Sequence[float]) -> list[Member]:
    """Returns members that train for equal time instead of equal work: slow clients less, fast clients more.

    Each does 1/sqrt(w) to w times the base work in whole steps, w = `train.adaptive_work`, and the round ends as soon
    as the mean over the cohort (by samples) is sqrt(w). A lower mean does not pay: updates are scaled to the mean work,
    and the noise of a step is scaled along.

    Args:
        payload_bytes: bytes that each client will send; the rest of its time is for training.
    """
    limit, batch = task.config.train.adaptive_work, task.config.train.batch_size
    bases = np.array([base_work(task, m.samples) for m in members], float)
    sample_s = np.array([task.flops / (task.profiles[m.client].compute_gflops * 1e9) for m in members])
    upload_s = np.array([sent / m.uplink_bytes_per_s for m, sent in zip(members, payload_bytes, strict=True)])
    other_s = np.array([m.fixed_s for m in members]) + upload_s - bases * sample_s

    def work(deadline: float) -> NDArray[np.float64]:
        works: NDArray[np.float64] = np.clip((deadline - other_s) / (bases * sample_s), limit**-0.5, limit)
        return works

    # The mean rises with the deadline: bisect between one that no client can meet and one that all can.
    low, high = float(other_s.min()), float((other_s + limit * bases * sample_s).max())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if np.average(work(middle), weights=bases) >= limit**0.5 else (middle, high)

    def at(m: Member, base: float, second: float, wanted: float) -> Member:
        steps = math.floor(base * wanted / batch + 1e-6)
        samples = base if abs(wanted - 1) < 1e-6 else max(min(base, batch), batch * steps)
        return replace(m, work=samples / base, fixed_s=m.fixed_s + (samples - base) * second)

    each = zip(members, bases.tolist(), sample_s.tolist(), work(high).tolist(), strict=True)
    return [at(*one) for one in each]
