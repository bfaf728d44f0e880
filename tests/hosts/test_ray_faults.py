"""Actors, drivers and nodes that die, hang or fail while a run is going on: the same bytes, or one clear message."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from faults import MARK, left, parent, workers
from ray import cloudpickle
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError

import fedlq_ray
from fedlq_ray.config.load import load
from fedlq_ray.errors import ClientError, FedLQError
from fedlq_ray.federation import rounds
from fedlq_ray.federation.events import Hosting, Restarted, Resumed, RoundDone
from fedlq_ray.federation.task import Parts, Worker, prepare
from fedlq_ray.hosts.ray import hosting as on_ray
from fedlq_ray.hosts.ray.pool import Pool
from fedlq_ray.quantization import MinMax
from fedlq_ray.runs import rundir
from fedlq_ray.strategies import Strategy, make
from fedlq_ray.training.local import Plan

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no other process can import a test
QUICK = [
    "rounds=6", "clients.count=6", "clients.cohort=4", "clients.actors=2", "strategy.name=fedlq_rd",
    "strategy.metric=fisher", "strategy.probe_every=1", "tracking.uri=null", "checkpoint.every_rounds=2",
]  # fmt: skip
UNDER_WAY = ["server.buffer=3", "server.max_staleness=null", "strategy.error_feedback=true"]


def run(*overrides, **given):
    return fedlq_ray.simulate(load(None, [*QUICK, *overrides]), **given)


def records(*overrides, hosting="packed", strategy=None, **given):
    """One after another, of a run whose driver is this process."""
    task = prepare(load(None, [*QUICK, *overrides, f"clients.hosting={hosting}"]), Parts(**given))
    worker = Worker(task)
    host = on_ray.RayHost(Pool(task, hosting))
    made = make(worker.context, strategy)
    for step in rounds.run(task, made, host, rounds.begin(task, made), rounds.Timing()):
        yield step.record


def contents(result):
    return [(result.path / name).read_bytes() for name in ("rounds.jsonl", "summary.json")]


@pytest.fixture(scope="module")
def expected(ray_here):
    return contents(run("clients.hosting=serial"))


def once(after, what):
    """Something to do when so many rounds are done, once."""
    rounds = []

    def watch(event):
        if isinstance(event, RoundDone):
            rounds.append(event.record.round)
            if len(rounds) == after:
                what()

    return watch


def send(number, name):
    hit = workers(name, os.getpid())
    assert hit, f"no {name}"
    for pid in hit:
        os.kill(pid, number)


@pytest.fixture(scope="module")
def killed(ray_here):
    """The folder of a program that was killed between two steps, with clients under way, Ray and all of its own."""
    settings = [*QUICK, *UNDER_WAY, "rounds=40", "out=killed", "clients.hosting=packed"]
    command = [sys.executable, "-m", "fedlq_ray.cli", "run", *settings]
    environment = {**os.environ, "RAY_ADDRESS": "local", MARK: "killed"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(Path("killed").glob("checkpoints/*.ckpt")):
        time.sleep(0.05)
    assert left("killed", 0.0)
    process.kill()
    process.wait()
    return Path("killed")


def test_a_program_that_is_killed_outright_goes_on(killed):
    """On Ray's side the checkpoint holds what is in the object store."""
    done = len(rundir.journal(killed))
    assert 0 < done < 40
    result = fedlq_ray.resume(killed)
    assert contents(result) == contents(run(*UNDER_WAY, "rounds=40", "clients.hosting=serial"))


@pytest.mark.parametrize(("hosting", "number"), [("packed", signal.SIGSTOP), ("dedicated", signal.SIGKILL)])
def test_client_actors_that_die_or_hang_are_replaced(hosting, number, expected):
    """All of them at once, the one that evaluates too."""
    result = run(
        f"clients.hosting={hosting}", "clients.timeout_s=4", watch=once(2, lambda: send(number, "ClientActor"))
    )
    assert contents(result) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
def test_a_fork_server_that_dies_costs_no_result(expected):
    """Its stubs fail, and so its workers are replaced."""
    hit = set()

    def kill():
        for actor in workers("ClientActor", os.getpid()):
            hit.add(parent(actor))
        for server in hit:
            os.kill(server, signal.SIGKILL)

    assert contents(run("clients.hosting=packed", watch=once(2, kill))) == expected
    assert len(hit) == 1 and os.getpid() not in hit


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_driver_that_dies_or_hangs_goes_on_from_its_checkpoint(number, expected):
    events, first = [], []

    def hit():
        first.extend(workers("Driver", os.getpid()))
        send(number, "Driver")

    kill = once(3, hit)

    def watch(event):
        events.append(type(event))
        kill(event)

    assert contents(run("clients.hosting=packed", "clients.timeout_s=8", watch=watch)) == expected
    assert events.count(Restarted) == 1 and events.count(Resumed) == 1
    assert len(first) == 1 and not Path(f"/proc/{first[0]}").exists()


class Choice:
    """Pieces for one client; another's cannot be chosen."""

    def __init__(self, segments, client, bad):
        self.segments, self.client, self.bad = segments, client, bad

    def __call__(self, vector):
        if self.client == self.bad:
            raise RuntimeError("the cat sat on it")
        return self.segments


class Picky(Strategy):
    """Client 3 fails whenever it takes part."""

    def __init__(self, context):
        self.context = context

    def plan(self, state, round, cohort):
        segments = self.context.segments([self.context.quantizer_at(4)] * len(self.context.quantized))
        return {m.client: Plan("update", Choice(segments, m.client, 3)) for m in cohort}


@pytest.mark.parametrize("hosting", ["serial", "packed"])
def test_a_client_that_fails_for_good(hosting):
    with pytest.raises(ClientError, match=r"round \d, client 3: RuntimeError: the cat sat on it"):
        run(f"clients.hosting={hosting}", strategy=Picky)
    with pytest.warns(
        UserWarning,
        match=r"skipped \(clients.on_failure=skip_client\): round \d, client 3: RuntimeError: the cat sat on it",
    ) as told:
        result = run(f"clients.hosting={hosting}", "clients.on_failure=skip_client", strategy=Picky)
    assert len(told) == 1
    for record in result.history.to_dict("records"):
        assert record["skipped"] == [c for c in record["cohort"] if c == 3]
        assert record["answered"] == [c for c in record["cohort"] if c != 3]
    assert result.history["skipped"].map(len).sum() > 0
    assert result.history["train_loss"].notna().all()


class Deadly(Picky):
    """Client 3 ends the actor that it is at; from round 3 on, it stops it."""

    def plan(self, state, round, cohort):
        plans = super().plan(state, round, cohort)
        number = signal.SIGKILL if round < 3 else signal.SIGSTOP
        return {c: Plan("update", Signal(p.segments.segments, number if c == 3 else 0)) for c, p in plans.items()}


class Signal:
    def __init__(self, segments, number):
        self.segments, self.number = segments, number

    def __call__(self, vector):
        os.kill(os.getpid(), self.number)
        return self.segments


def test_who_ends_its_actor_is_skipped_alone_and_who_is_only_silent_is_never_skipped():
    seen = []
    policy = ["clients.on_failure=skip_client", "clients.retries=0", "clients.timeout_s=4"]
    with pytest.raises(ClientError, match=r"round [345], client 3: its actor was silent for 4 s; .*resume"):
        for record in records(*policy, strategy=Deadly):
            seen.append(record)
    assert [r.skipped for r in seen] == [[c for c in r.cohort if c == 3] for r in seen] and len(seen) > 2
    assert sum(len(r.skipped) for r in seen) > 0


class Large(Picky):
    """Finds no room for its plan."""

    def plan(self, state, round, cohort):
        raise OutOfDiskError("local disk is full")


def test_a_full_object_store_is_told_at_once(monkeypatch):
    """In the driver, and before there is one."""
    events = []
    full = r"^Ray.s object store has no room \({}\): .*: fedlq resume "
    with pytest.raises(FedLQError, match=full.format("OutOfDiskError: local disk is full")):
        run("clients.hosting=packed", "out=full", strategy=Large, watch=events.append)
    assert {Hosting} <= {type(event) for event in events} and Restarted not in map(type, events)

    def put(value):
        raise ObjectStoreFullError("Failed to put object")

    monkeypatch.setattr(ray, "put", put)
    with pytest.raises(FedLQError, match=full.format("ObjectStoreFullError: Failed to put object")) as caught:
        run("clients.hosting=packed")
    assert len(str(caught.value).splitlines()) == 1


def test_a_ray_that_cannot_start_or_be_joined_is_told(monkeypatch):
    def init(**options):
        raise ValueError("To be usable, object_store_memory must be at least 79 MB\nfoo")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        FedLQError, match=r"^Ray did not start: To be usable, .* MB; is there room in /dev/shm and in /tmp\?$"
    ):
        run("clients.hosting=packed")
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1")
    with pytest.raises(FedLQError, match=r"^RAY_ADDRESS=nowhere:1: no Ray cluster answers"):
        run("clients.hosting=packed")


class Twice:
    """Loads in the driver, and in no actor after it."""

    def __init__(self, mark):
        self.mark, self.levels = mark, range(1, 9)

    def __call__(self, bits):
        return MinMax(bits)

    def __reduce__(self):
        return _load, (self.mark,)


def _load(mark):
    if mark.exists():
        raise ValueError("the dog ate it")
    mark.touch()
    return Twice(mark)


def test_an_actor_that_cannot_be_made_stops_the_run_at_once(tmp_path):
    started = time.monotonic()
    with pytest.raises(FedLQError, match="the dog ate it") as caught:
        run("clients.hosting=packed", quantizer=Twice(tmp_path / "mark"))
    assert time.monotonic() - started < 60
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


class Fatal(Twice):
    """Kills actors that load it, until there are so many marks."""

    def __init__(self, folder, times):
        super().__init__(folder)
        self.times = times

    def __reduce__(self):
        return _load_or_die, (self.mark, self.times)


def _load_or_die(folder, times):
    if len(marks := list(folder.iterdir())) < times:
        (folder / str(len(marks))).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Fatal(folder, times)


def test_actors_that_are_killed_while_they_start_or_by_ray_for_want_of_memory(tmp_path, expected, monkeypatch):
    """Also one that trains, and the one that evaluates."""
    real, calls = on_ray._get, []

    def get(ref, timeout=None):
        calls.append(timeout)
        if calls.count(timeout) == 2:
            raise OutOfMemoryError("Task was killed due to the node running low on memory.")
        return real(ref, timeout)

    monkeypatch.setattr(on_ray, "_get", get)
    found = [record.to_json() for record in records(quantizer=Fatal(tmp_path, 2))]
    assert found == [json.loads(line) for line in expected[0].splitlines()]
    assert len(list(tmp_path.iterdir())) == 2 and set(calls) == {None, 600.0}
    with pytest.raises(FedLQError, match="actor did not start: ActorDiedError.*too little memory") as caught:
        next(records("clients.retries=1", "clients.actors=1", quantizer=Fatal(tmp_path, 9)))
    assert len(list(tmp_path.iterdir())) == 4 and len(str(caught.value).splitlines()) == 1


def test_nothing_is_left_of_a_program_that_was_killed_outright(killed):
    """Ray's processes, whose agents take up to a minute, actors and the fork server."""
    assert not left(killed.name)
