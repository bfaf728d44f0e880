"""Flights on the clock: exact times, and what holds for any clients, settings and order of real replies."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from untrained import SMALL, Untrained, records_of, steps_of, timed_task

from fedlq_ray import simulate
from fedlq_ray.config.load import load
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.rounds import Timing, begin, run
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Worker
from fedlq_ray.runs.checkpoint import pack, unpack
from fedlq_ray.strategies import make


def test_two_clients_and_a_step_per_update_have_these_times_and_this_staleness():
    """One takes 1 s, the other 2.5 s: the fast one's updates are 0 old, unless the slow one's came in between."""
    task = timed_task([1.0, 2.5], "server.buffer=1", "server.max_staleness=null", "rounds=7")
    records = records_of(task)
    assert [record.sim_time_s for record in records] == pytest.approx([1, 2, 2.5, 3, 4, 5, 5])
    assert [record.client_staleness for record in records] == [[0], [0], [2], [1], [0], [0], [3]]
    assert [record.cohort for record in records] == [[0], [0], [1], [0], [0], [0], [1]]


def test_over_selection_lasts_as_long_as_the_kth_client_and_stops_the_rest():
    task = timed_task([5.0, 1.0, 3.0, 2.0, 4.0], "server.buffer=3", "rounds=2")
    records = records_of(task)
    assert [record.sim_time_s for record in records] == pytest.approx([3, 6])
    for record in records:
        assert record.cohort == [0, 1, 2, 3, 4] and record.answered == [1, 2, 3]
        assert record.client_end == ["stopped", "arrived", "arrived", "arrived", "stopped"]
        assert record.client_compute_s == pytest.approx([3, 1, 3, 2, 3])
        assert record.client_uplink_bytes[0] == 0 < record.client_uplink_bytes[1]
        assert record.wasted_bytes == record.client_downlink_bytes[0] + record.client_downlink_bytes[4]


def test_clients_that_are_always_under_way_arrive_as_often_as_their_time_allows():
    seconds = [0.7, 1.1, 1.9, 3.1]
    task = timed_task(seconds, "server.buffer=2", "server.max_staleness=null", "rounds=60")
    records = records_of(task)
    came = Counter(client for record in records for client in record.answered)
    end = records[-1].sim_time_s
    for client, own in enumerate(seconds):
        assert abs(came[client] - math.floor(end / own * (1 + 1e-9))) <= 1  # at equal times one may be of the next step


@pytest.mark.parametrize(("size", "rounds"), [(1, 300), (4, 200), (16, 100)])  # ratios are right to 4 to 8 %
def test_with_exponential_times_not_waiting_wins_by_a_harmonic_number(size, rounds):
    """All M under way, exponential times: a barrier lasts H_M means, and without one M updates take one mean."""
    from fedlq_ray.federation import flight

    rng = torch.Generator().manual_seed(1)
    drawn: dict[tuple[int, int], float] = {}

    def exponential(task, one, uplink_bytes):
        if one.key not in drawn:
            drawn[one.key] = float(torch.empty(1, dtype=torch.float64).exponential_(generator=rng))
        return flight.ClientTime(0.0, drawn[one.key], 0.0)

    whole = timed_task([1.0] * size, f"rounds={rounds}")
    free = timed_task([1.0] * size, f"rounds={rounds}", f"server.buffer={size}", "server.max_staleness=null")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flight, "times", exponential)
        barrier = records_of(whole)[-1].sim_time_s
        drawn.clear()
        none = records_of(free)[-1].sim_time_s
    harmonic = sum(1 / n for n in range(1, size + 1))
    assert barrier / none == pytest.approx(harmonic, rel=0.15)


def test_a_deadline_takes_what_has_arrived_or_else_the_first():
    task = timed_task([1.0, 2.0, 10.0], "server.deadline_s=2.5", "rounds=2")
    first, second = records_of(task)
    assert (first.sim_time_s, second.sim_time_s) == pytest.approx((2.5, 5.0))
    assert first.client_end == ["arrived", "arrived", "stopped"]
    (late,) = records_of(timed_task([3.0, 4.0], "server.deadline_s=2.5", "rounds=1"))
    assert late.sim_time_s == pytest.approx(3) and late.client_end == ["arrived", "stopped"]
    (exact,) = records_of(timed_task([2.5, 1.0], "server.deadline_s=2.5", "rounds=1"))
    assert exact.client_end == ["arrived", "arrived"]  # to the last bit is in time


def test_a_deadline_that_nobody_can_meet_is_refused(tmp_path):
    settings = [*SMALL, "server.deadline_s=0.0000001", "clients.cohort=4", f"out={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"^server\.deadline_s: no client can meet 1e-07 s; the fastest, client \d+"):
        simulate(load(None, settings))
    assert not (tmp_path / "run").exists()


def test_asynchronous_clients_fly_on_over_a_deadline():
    task = timed_task([1.0, 3.5], "server.deadline_s=2", "server.max_staleness=null", "rounds=3")
    records = records_of(task)
    assert [record.sim_time_s for record in records] == pytest.approx([2, 4, 6])
    assert [record.cohort for record in records] == [[0, 0], [0, 0, 1], [0, 0]]
    assert [record.client_staleness for record in records] == [[0, 0], [0, 0, 1], [0, 0]]


def test_what_is_stale_counts_less_and_shares_are_not_scaled_up():
    task = timed_task([1.0, 2.5], "server.buffer=1", "server.max_staleness=null", "rounds=3")
    steps = steps_of(task)
    before = [begin(task, make(Worker(task).context)), *[step.state for step in steps]]
    moved = [steps[i].state.weights - before[i].weights for i in (0, 2)]
    assert float(moved[0].mean()) == pytest.approx(1e-3, rel=1e-4)
    assert float(moved[1].mean()) == pytest.approx(2e-3 * 3**-0.5, rel=1e-4)  # two steps old


AIR = st.fixed_dictionaries(
    {
        "cohort": st.integers(1, 5),
        "buffer": st.one_of(st.none(), st.integers(1, 5)),
        "staleness": st.one_of(st.none(), st.integers(0, 3)),
        "deadline": st.one_of(st.none(), st.floats(0.3, 4)),
        "dropout": st.sampled_from([0.0, 0.3]),
        "seconds": st.lists(st.floats(0.1, 5), min_size=5, max_size=7),
        "variation": st.sampled_from([0.0, 0.8]),
        "failure": st.sampled_from(["skip_client", "fail"]),
        "free": st.booleans(),
    }
)


def air(chosen, rounds=8):
    """A task of these settings, or None if they exclude each other."""
    if chosen["buffer"] is not None and chosen["buffer"] > chosen["cohort"]:
        return None
    if chosen["staleness"] != 0 and chosen["buffer"] is None and chosen["deadline"] is None:
        return None
    own = {
        "clients.cohort": chosen["cohort"], "server.buffer": chosen["buffer"], "clients.dropout": chosen["dropout"],
        "server.max_staleness": chosen["staleness"], "server.deadline_s": chosen["deadline"], "rounds": rounds,
        "clients.variation": chosen["variation"], "clients.on_failure": chosen["failure"],
        "network.uplink_free": str(chosen["free"]).lower(),
    }  # fmt: skip
    text = [f"{key}={'null' if value is None else value}" for key, value in own.items()]
    return timed_task(chosen["seconds"], *text)


MANY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@MANY
@given(AIR, st.randoms(use_true_random=False), st.sets(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=4))
def test_what_holds_for_all_flights(chosen, random, failing):
    task = air(chosen)
    if task is None:
        return
    failing = failing if chosen["failure"] == "skip_client" else set()
    host = Untrained(task)
    host.failing = failing
    steps = steps_of(task, host)
    records, total = [step.record for step in steps], Counter()
    limit, before, flights, kept = task.config.server.max_staleness, 0.0, 0, []
    for step, record in zip(steps, records, strict=True):
        assert record.sim_time_s >= before
        before = record.sim_time_s
        under_way = step.state.flights
        assert len({flight.client for flight in under_way}) == len(under_way) <= task.config.clients.cohort
        if not task.config.synchronous:
            total.update(record.client_end)
            kept += [(flight.client, flight.dispatch) for flight in under_way]
            assert all(s >= 0 and (limit is None or s <= limit) for s, how in
                       zip(record.client_staleness, record.client_end, strict=True) if how == "arrived")  # fmt: skip
            assert all(start <= record.sim_time_s for start in record.client_start_s)
            # A flight is as many steps old at its end as there were steps over which it went on.
            ages = dict.fromkeys(zip(record.cohort, record.client_start_s, strict=True), 0)
            assert len(ages) == len(record.cohort)  # no client flies twice at once
        flights += len(record.cohort)
        assert record.uplink_bytes == sum(record.client_uplink_bytes)
        assert record.downlink_bytes == sum(record.client_downlink_bytes)
        assert total["arrived"] == sum(len(r.answered) for r in records[: record.round + 1]) or task.config.synchronous
    if not task.config.synchronous:
        staleness = sum(sum(record.client_staleness) for record in records)
        last = sum(task.config.rounds - 1 - flight.version + 1 for flight in steps[-1].state.flights)
        assert staleness + last == len(kept)  # each step makes each flight that continues one step older
        assert total.total() == flights
    # The order of real replies changes nothing.
    again = Untrained(task, lambda n: random.randrange(n))
    again.failing = failing
    assert records_of(task, again) == records


@MANY
@given(AIR, st.integers(0, 6), st.randoms(use_true_random=False))
def test_a_run_that_is_killed_and_resumed_is_the_same_and_trains_no_flight_again(chosen, at, random):
    task = air(chosen)
    if task is None:
        return
    records, strategy = records_of(task), make(Worker(task).context)
    host, saved = Untrained(task, lambda n: random.randrange(n)), None
    for step in run(task, strategy, host, begin(task, strategy), Timing()):
        if step.state.round == at + 1:
            step.settle()
            saved = pack(step.state.snapshot())
            break
    later, initial = Untrained(task), begin(task, strategy)
    state = ServerState.from_snapshot(unpack(saved), initial, task)
    stored = {flight.key for flight in state.flights}
    assert [*records[: at + 1], *records_of(task, later, state)] == records
    assert not stored & set(later.trained)


@settings(MANY, max_examples=15)
@given(AIR, st.sampled_from([0.25, 2.0, 8.0]))
def test_all_times_scale_with_the_rates(chosen, factor):
    task = air(chosen | {"free": True})
    if task is None:
        return
    slow = replace(
        task,
        profiles=[replace(p, compute_gflops=p.compute_gflops / factor) for p in task.profiles],
        config=task.config.model_copy(
            update={"server": task.config.server.model_copy(update={
                "deadline_s": chosen["deadline"] and chosen["deadline"] * factor})}
        ),
    )  # fmt: skip
    for one, other in zip(records_of(task), records_of(slow), strict=True):
        assert other.sim_time_s == one.sim_time_s * factor and other.cohort == one.cohort


def test_the_learning_rate_falls_by_steps_not_by_how_often_clients_are_asked():
    task = timed_task([1.0, 1.5, 2.0], "server.buffer=2", "server.max_staleness=null", "rounds=6")
    host = Untrained(task)
    seen = []
    host.pick = lambda n: seen.append((host.waiting[0][0].step, host.waiting[0][0].round)) or 0
    steps_of(task, host)
    assert {step for step, _ in seen} <= set(range(6)) and max(dispatch for _, dispatch in seen) > 6
