"""When clients are available: a user's file, the daily pattern, and what a run makes of both."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import lognorm
from untrained import Untrained, records_of, timed_task

from fedlq_ray import Config, ConfigError, FedLQError, resume, simulate
from fedlq_ray.federation.availability import Always, Daily, Intervals, availability, merged
from fedlq_ray.federation.rounds import Timing, begin, run
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Worker
from fedlq_ray.runs.checkpoint import pack, unpack
from fedlq_ray.strategies import make
from fedlq_ray.sweeps.reclock import reclockable

HEADER = "client,from_s,to_s\n"


def read(folder: Path, text: str, count: int = 3, names: list[str] | None = None) -> tuple[Intervals, list[str]]:
    file = folder / "there.csv"
    file.write_text(text, encoding="utf-8")
    found, notes = availability(Config(clients={"availability": str(file)}), count, names)
    assert isinstance(found, Intervals)
    return found, notes


def with_times(task, *of_clients):
    """The task with these intervals, one list of (start, stop) per client."""
    config = task.config.model_copy(
        update={"clients": task.config.clients.model_copy(update={"availability": "there.csv"})}
    )
    return replace(task, config=config, availability=Intervals(tuple(merged(spans) for spans in of_clients)))


def test_a_client_is_there_from_its_start_until_before_its_stop(tmp_path):
    found, notes = read(tmp_path, f"{HEADER}0,5,7.5\n 0 ,1,2\n2,0,inf\n")
    asked = [0, 1, 1.5, 2, 4, 5, 7, 7.5, 9]
    assert [found.leaves_s(0, t) for t in asked] == [0, 2, 2, 2, 4, 7.5, 7.5, 7.5, 9]
    assert [found.returns_s(0, t) for t in asked] == [1, 1, 1.5, 5, 5, 5, 7, math.inf, math.inf]
    assert found.leaves_s(1, 3) == 3 and found.returns_s(1, 3) == math.inf
    assert found.leaves_s(2, 1e9) == math.inf and found.returns_s(2, 1e9) == 1e9
    (note,) = notes
    assert note.startswith("clients.availability: 1 of 3 clients have no interval in ")


def test_intervals_that_touch_are_one(tmp_path):
    found, notes = read(tmp_path, f"{HEADER}0,2,4\n0,0,2\n", count=1)
    assert found.leaves_s(0, 0) == 4 and notes == []


def test_clients_that_the_data_names_are_named_in_the_file(tmp_path):
    found, _ = read(tmp_path, "to_s,client,from_s\n9,HAMLET,3\n8,1,2\n", count=2, names=["1", "HAMLET"])
    assert found.returns_s(1, 0) == 3 and found.returns_s(0, 0) == 2
    with pytest.raises(ConfigError, match="there is no client '0'; known: the ids in clients.csv, such as '1'$"):
        read(tmp_path, f"{HEADER}0,1,2\n", count=2, names=["1", "HAMLET"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,3,2\n", "line 2: to_s must be after from_s, got from_s=3, to_s=2"),
        ("0,3,3\n", "line 2: to_s must be after from_s, got from_s=3, to_s=3"),
        ("0,inf,inf\n", "line 2, column from_s: must be seconds, 0 or more, got 'inf'"),
        ("0,-1,2\n", "line 2, column from_s: must be seconds, 0 or more, got '-1'"),
        ("0,1,soon\n", "line 2, column to_s: must be seconds, 0 or more, or inf, got 'soon'"),
        ("0,nan,2\n", "line 2, column from_s: must be seconds, 0 or more, got 'nan'"),
        ("1,4,6\n0,5,9\n1,0,4.5\n", "line 2: overlaps the client's interval from 0 to 4.5 s"),
        ("3,1,2\n", "line 2, column client: there is no client '3'; known: 0 to 2"),
        ("1.0,1,2\n", "line 2, column client: there is no client '1.0'; known: 0 to 2"),
        ("1,2\n", "line 2: 2 values for 3 columns, client, from_s, to_s"),
        ("", " has no interval of any client, so nobody would ever be available"),
    ],
)
def test_a_wrong_file_is_refused_with_one_sentence_before_anything_is_written(tmp_path, monkeypatch, rows, message):
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text(HEADER + rows, encoding="utf-8")
    clients = {"count": 3, "cohort": 2, "hosting": "serial", "availability": "there.csv"}
    with pytest.raises(ConfigError) as caught:
        simulate(Config(clients=clients, tracking={"uri": None}))
    assert str(caught.value).startswith("clients.availability: there.csv") and message in str(caught.value)
    assert "\n" not in str(caught.value) and not Path("runs").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dayly", "no pattern 'dayly'; known: always, daily, or a path of your own .csv; did you mean 'daily'?"),
        ("no/such.csv", "cannot read no/such.csv: No such file or directory; give always, daily or a CSV file"),
    ],
)
def test_what_is_neither_a_pattern_nor_a_file_is_refused(spec, message):
    with pytest.raises(ConfigError) as caught:
        availability(Config(clients={"availability": spec}), 3, None)
    assert str(caught.value) == f"clients.availability: {message}"


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)


@given(SPANS, st.floats(0, 45))
def test_leaving_and_returning_agree_with_the_intervals(intervals, at_s):
    found = Intervals((merged([(float(a), float(b)) for a, b in intervals]),))

    def there(t):
        return any(a <= t < b for a, b in intervals)

    leaves_s, returns_s = found.leaves_s(0, at_s), found.returns_s(0, at_s)
    assert (leaves_s > at_s) == there(at_s)
    ends = sorted({float(t) for pair in intervals for t in pair})  # nothing changes in between
    if there(at_s):
        assert not there(leaves_s) and all(there(t) for t in ends if at_s <= t < leaves_s)
    assert returns_s == next((t for t in [at_s, *ends] if t >= at_s and there(t)), math.inf)


def daily(seed: int = 0, **pattern: float) -> Daily:
    found, _ = availability(Config(seed=seed, clients={"availability": "daily"}, daily=pattern), 1, None)
    assert isinstance(found, Daily)
    return found


TIMES = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 3e5)), min_size=1, max_size=20)


@settings(deadline=None)
@given(TIMES, st.randoms(use_true_random=False), st.floats(0, 23.9))
def test_the_daily_pattern_is_the_same_in_whatever_order_it_is_asked(times, random, start_hour):
    first, second = (daily(sessions=30, start_hour=start_hour) for _ in range(2))

    def answers(pattern, asked):
        return {(c, t): (pattern.leaves_s(c, t), pattern.returns_s(c, t)) for c, t in asked}

    found = answers(first, times)
    assert answers(second, random.sample(times, len(times))) == found
    for (client, at_s), (leaves_s, returns_s) in found.items():
        if leaves_s > at_s:
            assert returns_s == at_s
            assert first.leaves_s(client, leaves_s) == leaves_s  # it has left
            assert first.leaves_s(client, (at_s + leaves_s) / 2) == leaves_s
        else:
            assert returns_s > at_s and first.leaves_s(client, returns_s) > returns_s
            assert first.returns_s(client, (at_s + returns_s) / 2) == returns_s


def theory(hour: float, pattern: dict[str, float]) -> float:
    """The probability that at least one of a Poisson number of sessions lasts at an hour of the day."""
    ages = (np.arange(24 * 600) + 0.5) / 600  # hours since a session began
    swing = (pattern["swing"] - 1) / (pattern["swing"] + 1)
    rate = pattern["sessions"] / 24 * (1 + swing * np.cos(2 * np.pi * (hour - ages - pattern["peak_hour"]) / 24))
    lasts = lognorm.sf(ages * 60, pattern["sigma"], scale=pattern["minutes"])
    return float(1 - np.exp(-(rate * lasts).sum() / 600))


@pytest.mark.parametrize("day_s", [86400.0, 240.0])
def test_clients_are_there_as_often_at_each_hour_as_the_parameters_say(day_s):
    pattern = {"sessions": 12.0, "minutes": 30.0, "sigma": 1.0, "swing": 4.0, "peak_hour": 2.0}
    found = daily(start_hour=20.0, day_s=day_s, **pattern)
    for hour in (2, 8, 14, 20):
        at_s = (hour - 20) % 24 / 24 * day_s
        share = np.mean([found.leaves_s(client, at_s) > at_s for client in range(2000)])
        assert abs(share - theory(hour, pattern)) < 0.045  # 4 x sqrt(0.25 / 2000)
    assert theory(2, pattern) > 2 * theory(14, pattern)


@pytest.mark.parametrize("sigma", [0.0, 1.32])
def test_the_stated_share_is_that_of_the_time(sigma):
    found = daily(sessions=20, minutes=40, sigma=sigma, swing=1)
    times = np.linspace(0, 20 * 86400, 4000)
    there = np.mean([found.leaves_s(client, t) > t for client in range(10) for t in times])
    assert there == pytest.approx(found.share, abs=0.03)
    assert sigma or found.share == pytest.approx(1 - math.exp(-20 * 40 / 1440))


def test_default_lengths_have_the_cited_quantiles():
    pattern = Config().daily
    assert lognorm.cdf([5, 10], pattern.sigma, scale=pattern.minutes) == pytest.approx([0.5, 0.7], abs=0.005)
    assert daily().share == pytest.approx(0.08, abs=0.005)


def test_a_pattern_in_which_clients_are_always_there_is_refused():
    with pytest.raises(ConfigError, match=r"^daily: with daily.sessions=500 .* is clients.availability=always$"):
        daily(sessions=500, minutes=60)


def test_a_client_that_leaves_during_its_flight_is_billed_for_what_it_transferred():
    task = with_times(timed_task([1.0, 2.0, 3.0], "rounds=2"), [(0, 9)], [(0, 9)], [(0, 2.5), (2.75, 9)])
    host = Untrained(task)
    first, second = records_of(task, host)
    assert first.client_end == ["arrived", "arrived", "left"] and first.answered == [0, 1]
    assert first.sim_time_s == 2.5 and first.client_compute_s == pytest.approx([1, 2, 2.5])
    assert first.client_uplink_bytes[2] == 0 < first.client_uplink_bytes[1]
    assert first.wasted_bytes == first.client_downlink_bytes[2] > 0
    assert (0, 2) not in host.trained  # it could not have sent anything
    assert second.cohort == [0, 1] and second.client_end == ["arrived", "arrived"]  # at 2.5 s the third is away


def test_a_client_that_leaves_while_it_sends_has_sent_a_part():
    task = timed_task([1.0, 1.0], "rounds=1", "network.uplink_free=false")
    links = [replace(p, uplink_mbps=8e-3, latency_ms=0.0) for p in task.profiles]  # 1000 bytes per second
    task = with_times(replace(task, profiles=links), [(0, 99)], [(0, 1.25)])
    host = Untrained(task)
    (record,) = records_of(task, host)
    assert record.client_end == ["arrived", "left"]
    assert record.client_uplink_bytes[1] == 250 and record.client_upload_s[1] == 0.25
    assert record.wasted_bytes == 250 + record.client_downlink_bytes[1]


def test_an_upload_that_ends_as_its_client_leaves_arrives():
    (record,) = records_of(with_times(timed_task([1.0, 2.0], "rounds=1"), [(0, 1)], [(0, 2)]))
    assert record.client_end == ["arrived", "arrived"]


@pytest.mark.parametrize("free", [[], ["server.buffer=1", "server.max_staleness=null"]])
def test_where_nobody_is_there_time_passes_until_somebody_is(free):
    spans = [(5, 6), (50, 52)], []
    records = records_of(with_times(timed_task([1.0, 2.0], "rounds=3", *free), *spans))
    assert [record.sim_time_s for record in records] == [6, 51, 52]
    with pytest.raises(FedLQError) as caught:
        records_of(with_times(timed_task([1.0, 2.0], "rounds=4", *free), *spans))
    assert str(caught.value) == ("step 3: no client is available after 52 simulated seconds (clients.availability)")


def test_asynchronous_clients_are_asked_as_they_come():
    free = ["server.buffer=1", "server.max_staleness=null", "rounds=4"]
    task = with_times(timed_task([1.0, 1.0], *free), [(0, 99)], [(0.25, 1.5), (2.5, 99)])
    records = records_of(task)
    assert [record.sim_time_s for record in records] == [1, 1.25, 2, 3]
    assert [record.cohort for record in records] == [[0], [1], [0, 1], [0]]
    assert records[2].client_end == ["arrived", "left"]


@pytest.mark.parametrize(("own", "how"), [("clients.dropout=1", "dropped_out"), ("clients.dropout=0", "left")])
def test_a_run_in_which_no_update_ever_arrives_ends_with_an_error(own, how):
    free = ["server.buffer=2", "server.max_staleness=null", "rounds=2", own]
    short = [(t, t + 0.5) for t in range(3000)]
    task = timed_task([1.0, 2.0], *free)
    with pytest.raises(FedLQError) as caught:
        records_of(with_times(task, short, short) if how == "left" else task)
    assert str(caught.value) == (
        f"step 0: 2000 clients were asked since the last step, and no update arrived ({how}: 2000); "
        "look at clients.availability and clients.dropout"
    )


AIR = st.fixed_dictionaries(
    {
        "buffer": st.sampled_from([None, 1, 2]),
        "staleness": st.sampled_from([0, 1, None]),
        "deadline": st.sampled_from([None, 1.5]),
        "spans": st.lists(
            st.lists(st.tuples(st.floats(0, 30), st.floats(0.1, 6)), max_size=6), min_size=4, max_size=4
        ),
    }
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(AIR, st.integers(0, 4), st.randoms(use_true_random=False))
def test_what_holds_for_any_intervals_also_after_a_resume(chosen, at, random):
    """No flight continues after its client left. The order of replies and a resume change nothing."""
    if chosen["staleness"] != 0 and chosen["buffer"] is chosen["deadline"] is None:
        return
    own = {"server.buffer": chosen["buffer"], "server.max_staleness": chosen["staleness"]}
    own |= {"server.deadline_s": chosen["deadline"], "rounds": 6, "clients.cohort": 3, "clients.dropout": 0.2}
    text = [f"{key}={'null' if value is None else value}" for key, value in own.items()]
    spans = [[(start, start + length) for start, length in one] for one in chosen["spans"]]
    spans[0].append((40.0, math.inf))  # somebody comes in the end
    task = with_times(timed_task([0.5, 1.0, 2.0, 4.0], *text), *spans)
    records = records_of(task)
    for record in records:
        each = zip(record.cohort, record.client_start_s, record.client_end, record.client_compute_s, strict=True)
        for client, start_s, how, compute_s in each:
            leaves_s = task.availability.leaves_s(client, start_s)
            assert leaves_s > start_s
            if how == "left":
                assert compute_s == pytest.approx(leaves_s - start_s)
            else:
                assert start_s + compute_s <= leaves_s * (1 + 1e-12)
    saved = None
    strategy = make(Worker(task).context)
    for step in run(task, strategy, Untrained(task, lambda n: random.randrange(n)), begin(task, strategy), Timing()):
        if step.state.round == at + 1:
            step.settle()
            saved = pack(step.state.snapshot())
            break
    later = Untrained(task)
    state = ServerState.from_snapshot(unpack(saved), begin(task, strategy), task)
    stored = {flight.key for flight in state.flights}
    assert [*records[: at + 1], *records_of(task, later, state)] == records
    assert not stored & set(later.trained)


def config(folder: Path, out: str, **sections) -> Config:
    """Clients that come and go within a run of some seconds."""
    clients = {"count": 8, "cohort": 4, "availability": str(folder / "there.csv")} | sections.pop("clients", {})
    server = {"buffer": 2, "max_staleness": None}
    base = {"rounds": 8, "target": None, "tracking": {"uri": None}, "strategy": {"name": "uniform", "bits": 4}}
    return Config(**base, server=server, clients=clients, out=str(folder / out), **sections)


@pytest.fixture
def there(tmp_path):
    """Each client comes for 0.05 to 0.3 s, over and over."""
    rng = np.random.default_rng(3)
    with (tmp_path / "there.csv").open("w", encoding="utf-8") as file:
        file.write(HEADER)
        for client in range(8):
            ends = np.cumsum(rng.uniform(0.05, 0.3, 400)).round(3)
            file.writelines(f"{client},{a},{b}\n" for a, b in zip(ends[::2], ends[1::2], strict=True))
    return tmp_path


def same(one: Path, other: Path) -> bool:
    return all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in ("rounds.jsonl", "model.safetensors")
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_packed_run_with_a_file_has_the_bytes_of_a_serial_one_and_says_who_left(there):
    simulate(config(there, "serial", clients={"hosting": "serial"}))
    simulate(config(there, "packed", clients={"hosting": "packed", "actors": 2}))
    assert same(there / "serial", there / "packed")
    records = [json.loads(line) for line in (there / "serial/rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    left = [record for record in records if "left" in record["client_end"]]
    assert left and all(record["wasted_bytes"] > 0 for record in left)


def test_a_run_resumed_from_a_checkpoint_has_the_same_bytes_and_no_other_file(there):
    class Halt(Exception): ...

    def watch(event):
        if getattr(getattr(event, "record", None), "round", None) == 4:
            raise Halt

    serial = {"clients": {"hosting": "serial"}, "checkpoint": {"every_rounds": 2}}
    simulate(config(there, "whole", **serial))
    with pytest.raises(Halt):
        simulate(config(there, "parts", **serial), watch=watch)
    text = (there / "there.csv").read_text(encoding="utf-8")
    (there / "there.csv").write_text(text + "0,1000,1001\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the file of clients.availability was .* and is .*; restore the file$"):
        resume(there / "parts")
    (there / "there.csv").write_text(text, encoding="utf-8")
    resume(there / "parts")
    assert same(there / "whole", there / "parts")


def test_runs_in_which_clients_come_and_go_are_not_synchronous_and_never_reclocked():
    assert Config(strategy={"name": "fedavg"}).synchronous and reclockable(Config(strategy={"name": "fedavg"}))
    for own in ({"clients": {"availability": "daily"}}, {"server": {"buffer": 3}}, {"server": {"deadline_s": 1.0}}):
        other = Config(strategy={"name": "fedavg"}, **own)
        assert not other.synchronous and not reclockable(other)


def test_always_is_always():
    found, notes = availability(Config(), 3, None)
    assert isinstance(found, Always) and notes == []
    assert (found.leaves_s(0, 7.0), found.returns_s(0, 7.0)) == (math.inf, 7.0)
