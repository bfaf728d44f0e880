"""Bandwidth over time: transfers at rates that change, and the files that say when."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from untrained import Untrained, records_of, timed_task

from fedlq_ray import Config, ConfigError, simulate
from fedlq_ray.federation.bandwidth import Bandwidth, Course, Rates, bandwidth
from fedlq_ray.federation.profiles import Profile
from fedlq_ray.sweeps.reclock import reclockable

HEADER = "client,t_s,uplink_mbps,downlink_mbps\n"
PROFILES = [Profile(2.0, 10.0, 50.0, 4.0), Profile(3.0, 15.0, 50.0, 4.0)]


def read(folder: Path, text: str, names: list[str] | None = None) -> Bandwidth:
    file = folder / "rates.csv"
    file.write_text(text, encoding="utf-8")
    return bandwidth(str(file), PROFILES, names)


def test_a_transfer_takes_the_rates_of_its_own_time():
    course = Course((0.0, 10.0, 12.0), (1.0, 0.5, 4.0))
    assert course.seconds(3, 0) == 3  # all at the first rate
    assert course.seconds(3, 8) == 2 + 2  # 2 Mb, then 1 Mb at half the rate
    assert course.seconds(7, 8) == 2 + 2 + 1
    assert course.seconds(1, 10) == 2 and course.seconds(8, 100) == 2
    assert course.seconds(2, 8) == 2 and course.seconds(0, 8) == 0
    assert [course.megabits(8, t) for t in (7, 8, 10, 11, 12, 13)] == [0, 0, 2, 2.5, 3, 7]


COURSES = st.builds(
    lambda gaps, rates: Course(tuple(float(sum(gaps[:i])) for i in range(len(rates))), tuple(rates)),
    st.lists(st.integers(1, 9), min_size=6, max_size=6), st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
)  # fmt: skip


@given(COURSES, st.floats(0, 50), st.floats(0, 100), st.floats(0, 100))
def test_seconds_and_megabits_are_inverse_and_add_up(course, at_s, first, second):
    took_s = course.seconds(first, at_s)
    assert course.megabits(at_s, at_s + took_s) == pytest.approx(first, abs=1e-9)
    together = took_s + course.seconds(second, at_s + took_s)
    assert course.seconds(first + second, at_s) == pytest.approx(together, abs=1e-9)
    assert first / max(course.mbps) - 1e-9 <= took_s <= first / min(course.mbps) + 1e-9
    assert course.seconds(first + 1, at_s) > took_s


def test_rows_in_any_order_hold_from_their_time_on_and_profiles_before_and_without_them(tmp_path):
    found = read(tmp_path, f"{HEADER}0,30,1,4\n0,20,0.5,1e1\n")
    assert found.of_clients == {
        0: Rates(Course((0.0, 20.0, 30.0), (2.0, 0.5, 1.0)), Course((0.0, 20.0, 30.0), (10.0, 10.0, 4.0)))
    }
    assert read(tmp_path, f"{HEADER}0,0,7,8\n").of_clients[0] == Rates(Course((0.0,), (7.0,)), Course((0.0,), (8.0,)))
    assert set(read(tmp_path, f"{HEADER}HAMLET,0,7,8\n", ["IAGO", "HAMLET"]).of_clients) == {1}
    assert bandwidth(None, PROFILES, None) == Bandwidth()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,-1,1,1", "line 3, column t_s: must be seconds, 0 or more, got '-1'"),
        ("0,inf,1,1", "line 3, column t_s: must be seconds, 0 or more, got 'inf'"),
        ("0,1,0,1", "line 3, column uplink_mbps: must be more than 0, got '0'"),
        ("0,1,1,fast", "line 3, column downlink_mbps: must be more than 0, got 'fast'"),
        ("0,1,1,inf", "line 3, column downlink_mbps: must be more than 0, got 'inf'"),
        ("2,1,1,1", "line 3, column client: there is no client '2'; known: 0 to 1"),
        ("1,5.0,2,2", "line 3: the client's rates at 5 s are given twice"),
    ],
)
def test_a_wrong_row_is_refused_with_one_sentence_before_anything_is_written(tmp_path, monkeypatch, row, message):
    monkeypatch.chdir(tmp_path)
    Path("rates.csv").write_text(f"{HEADER}1,5,1,1\n{row}\n", encoding="utf-8")
    clients = {"count": 2, "cohort": 2, "hosting": "serial"}
    with pytest.raises(ConfigError) as caught:
        simulate(Config(clients=clients, network={"bandwidth": "rates.csv"}, tracking={"uri": None}))
    assert str(caught.value) == f"network.bandwidth: rates.csv, {message}" and not Path("runs").exists()


def with_rates(task, **of_clients):
    """The task with these uplinks by client, as [(from_s, Mb/s), ...]; downlinks are as fast."""
    made = {}
    for name, pieces in of_clients.items():
        course = Course(*(tuple(float(piece[i]) for piece in pieces) for i in (0, 1)))
        made[int(name[1:])] = Rates(course, course)
    return replace(task, bandwidth=Bandwidth(made))


def linked_task(seconds, *overrides):
    """Tasks whose clients train so long, and send and fetch 1 Mb/s without latency."""
    task = timed_task(seconds, "network.uplink_free=false", "network.bill=both", *overrides)
    links = [replace(p, uplink_mbps=1.0, downlink_mbps=1.0, latency_ms=0.0) for p in task.profiles]
    return replace(task, profiles=links)


def test_each_transfer_of_a_flight_starts_when_the_one_before_ends():
    (plain,) = records_of(linked_task([1.0], "rounds=1"))
    down_s, up_s = plain.client_download_s[0], plain.client_upload_s[0]
    assert down_s == pytest.approx(8e-6 * plain.downlink_bytes) and up_s == pytest.approx(8e-6 * plain.uplink_bytes)
    task = with_rates(linked_task([1.0], "rounds=2"), c0=[(0, 1), (down_s / 2, 2), (1.0, 0.25), (100, 4)])
    first, second = records_of(task)
    down = down_s / 2 + down_s / 4  # the second half at twice the rate
    assert (first.client_download_s, first.client_upload_s) == (pytest.approx([down]), pytest.approx([4 * up_s]))
    assert first.sim_time_s == pytest.approx(down + 1 + 4 * up_s)
    assert second.client_download_s == pytest.approx([4 * down_s])


def test_a_file_with_the_rates_of_the_profiles_changes_no_more_than_rounding():
    plain = linked_task([0.3, 0.7, 0.2], "rounds=6", "server.buffer=2", "server.max_staleness=null",
                        "clients.variation=0.5")  # fmt: skip
    flat = [(0, 1), (0.5, 1), (2, 1)]
    for one, other in zip(records_of(plain), records_of(with_rates(plain, c0=flat, c2=flat)), strict=True):
        assert other.sim_time_s == pytest.approx(one.sim_time_s, rel=1e-12)
        assert (other.cohort, other.client_staleness) == (one.cohort, one.client_staleness)


def test_what_a_stopped_flight_has_sent_is_the_integral_of_its_rate():
    task = linked_task([0.5, 1.0], "rounds=1", "server.buffer=1", "network.bill=upload")
    slow = [(0, 1), (1.0, 0.008), (1.5, 0.0008), (2.5, 0.016)]
    task = with_rates(task, c0=slow, c1=slow)
    fast = replace(task.profiles[0], compute_gflops=task.profiles[0].compute_gflops * 1e6)
    (alone,) = records_of(replace(task, profiles=[fast, task.profiles[1]]))
    assert alone.client_end == ["arrived", "stopped"] and alone.client_uplink_bytes[1] == 0
    (record,) = records_of(with_rates(task, c0=[(0, 1e-3), (2.0, 1000)], c1=slow))
    assert record.client_end == ["arrived", "stopped"] and 2 < record.sim_time_s < 2.1
    sent = 1e6 / 8 * (0.5 * 0.008 + (record.sim_time_s - 1.5) * 0.0008)
    assert record.client_uplink_bytes[1] == int(sent) and record.wasted_bytes >= int(sent)


RATES = st.lists(st.floats(0.02, 20), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(st.lists(RATES, min_size=3, max_size=3), st.sampled_from([None, 1, 2]), st.randoms(use_true_random=False))
def test_the_order_of_real_replies_changes_nothing(rates, buffer, random):
    free = ["server.max_staleness=null", f"server.buffer={buffer}"] if buffer else []
    task = linked_task([0.1, 0.2, 0.4], "rounds=5", *free)
    task = with_rates(task, **{f"c{i}": [(0.25 * n, r) for n, r in enumerate(own)] for i, own in enumerate(rates)})
    records = records_of(task)
    assert all(one.sim_time_s < other.sim_time_s for one, other in pairwise(records)) or buffer == 1
    assert records_of(task, Untrained(task, lambda n: random.randrange(n))) == records


def test_a_run_has_other_times_and_the_same_training_and_is_never_reclocked(tmp_path):
    rates = tmp_path / "rates.csv"
    rates.write_text(HEADER + "".join(f"{client},0,0.01,0.01\n" for client in range(6)), encoding="utf-8")
    base = {"rounds": 2, "target": None, "tracking": {"uri": None}, "strategy": {"name": "fedavg"}}
    clients = {"count": 6, "cohort": 3, "hosting": "serial"}
    simulate(Config(**base, clients=clients, out=str(tmp_path / "fast")))
    slow = Config(**base, clients=clients, out=str(tmp_path / "slow"), network={"bandwidth": str(rates)})
    simulate(slow)
    fast, late = (
        [json.loads(line) for line in (tmp_path / name / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("fast", "slow")
    )
    assert [record["accuracy"] for record in fast] == [record["accuracy"] for record in late]
    for record in late:
        sent = record["client_uplink_bytes"]
        assert record["client_upload_s"] == pytest.approx([0.05 + 8e-4 * num_bytes for num_bytes in sent])
    assert not reclockable(slow) and reclockable(slow.model_copy(update={"network": {}}))
