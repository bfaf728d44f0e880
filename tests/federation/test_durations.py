"""Expected durations: links, latency and bytes, by hand, and who is fastest by them."""

from dataclasses import replace

import numpy as np
import pytest
from untrained import arrived, records_of, timed_task

from fedlq_ray.federation.durations import Durations, sizes_of
from fedlq_ray.federation.selection import Asking, chosen
from fedlq_ray.federation.selections import Fastest
from fedlq_ray.federation.task import Worker


def linked(seconds, uplinks, *overrides):
    """Clients of so many seconds of training, and uplinks of so many bytes per second."""
    task = timed_task(seconds, "network.uplink_free=false", *overrides)
    profiles = [
        replace(profile, uplink_mbps=rate * 8e-6, downlink_mbps=2 * rate * 8e-6, latency_ms=100.0)
        for profile, rate in zip(task.profiles, uplinks, strict=True)
    ]
    return replace(task, profiles=profiles)


def test_durations_by_hand():
    seconds, rates = [1.0, 5.0], [1000.0, 500.0]
    durations = Durations(linked(seconds, rates, "network.bill=upload"))
    assert durations((3000.0, 4000.0)) == pytest.approx([1 + 0.1 + 3, 5 + 0.1 + 6])
    durations = Durations(linked(seconds, rates, "network.bill=both"))
    assert durations((3000.0, 4000.0)) == pytest.approx([1 + 0.1 + 3 + 0.1 + 2, 5 + 0.1 + 6 + 0.1 + 4])
    durations = Durations(timed_task(seconds))  # uploads take no time, and downloads are not billed
    assert durations((3000.0, 4000.0)) == pytest.approx(seconds)


def test_sizes_are_those_of_the_last_flights_that_arrived():
    task = linked([1.0, 1.0], [1000.0, 1000.0])
    assert sizes_of([], (7.0, 8.0)) == (7.0, 8.0)
    came = [arrived(task, 0, 1.0, b"x" * 10), arrived(task, 1, 1.0, b"x" * 30)]
    assert sizes_of(came, (7.0, 8.0)) == (20.0, 0.0)
    whole = Worker(task).broadcast_size()
    assert Durations(task).initial == (whole, whole)


def test_the_fastest_depend_on_how_much_is_sent():
    task = linked([1.0, 5.0, 6.0], [100.0, 1e6, 1e6])  # the first computes fast, and sends slowly
    fastest = Fastest(task)

    def asked(state):
        return chosen(fastest, state, Asking(np.arange(3), 1, 0, 0.0, None))

    start = fastest.init()
    assert asked(start) == [1]  # the whole model would take 10 s and more
    small = fastest.learn(start, 0, [arrived(task, 1, 1.0, b"x" * 100)])
    assert asked(small) == [0]  # 1 s of training, 0.1 s of latency, 1 s of sending


def test_a_run_asks_the_clients_of_fast_links():
    task = linked([1.0] * 6, [100.0] * 3 + [1e6] * 3, "clients.cohort=2", "clients.selection=fastest", "rounds=3")
    assert [record.cohort for record in records_of(task)] == [[3, 4]] * 3
