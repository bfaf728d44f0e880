"""Which clients are asked: each selection on cases made by hand, and in runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from untrained import SMALL, Untrained, arrived, records_of, timed_task

from fedlq_ray import ConfigError, FedLQError, simulate
from fedlq_ray.config.load import load
from fedlq_ray.federation import rounds
from fedlq_ray.federation.selection import Asking, Selection, chosen
from fedlq_ray.federation.selections import SELECTIONS, Explored, Oort, PowerOfChoice, selection_of
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Worker
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.runs.checkpoint import pack, unpack
from fedlq_ray.strategies import make
from fedlq_ray.sweeps.reclock import reclockable

TASK = timed_task([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])


def asking(idle=range(10), count=3, step=0, seed=0):
    return Asking(np.array(list(idle)), count, step, 0.0, np.random.default_rng(seed))


def with_selection(task, name, **args):
    clients = task.config.clients.model_copy(update={"selection": name, "selection_args": args})
    return replace(task, config=task.config.model_copy(update={"clients": clients}))


def named(name, task=TASK, **args):
    return selection_of(with_selection(task, name, **args))


@given(
    st.sampled_from(sorted(SELECTIONS)), st.sets(st.integers(0, 9), min_size=1), st.integers(0, 30), st.integers(0, 99)
)
def test_each_returns_as_many_idle_clients_as_are_asked_for(name, idle, step, seed):
    selection = named(name)
    for count in range(1, len(idle) + 1):
        found = chosen(selection, selection.init(), asking(sorted(idle), count, step, seed))
        assert len(set(found)) == count and set(found) <= idle and found == sorted(found)


@pytest.mark.parametrize("name", [*SELECTIONS, f"{__name__}:Careless"])
@pytest.mark.parametrize(
    "steps", [[], ["clients.cohort=5", "server.buffer=3"], ["server.buffer=2", "server.max_staleness=null"]]
)
def test_a_run_that_is_resumed_asks_the_same_clients(name, steps):
    task = timed_task(
        [1.0, 2.5, 1.5, 4.0, 3.0, 2.0], "clients.cohort=3", *steps, f"clients.selection={name}", "rounds=30"
    )
    records, strategy = records_of(task), make(Worker(task).context)
    for step in rounds.run(task, strategy, Untrained(task), rounds.begin(task, strategy), rounds.Timing()):
        if step.state.round == 25:
            step.settle()
            saved = unpack(pack(step.state.snapshot()))
            break
    state = ServerState.from_snapshot(saved, rounds.begin(task, strategy), task)
    assert [*records[:25], *records_of(task, None, state)] == records
    if name == "fastest" and not steps:
        assert {tuple(record.cohort) for record in records} == {(0, 2, 5)}


@pytest.mark.parametrize("name", ["oort", "tifl", "power_of_choice", "fastest"])
@pytest.mark.parametrize("steps", [[], ["server.buffer=2", "server.max_staleness=null", "clients.dropout=0.2"]])
def test_a_run_that_trains_and_is_resumed_after_any_step_has_the_same_records(name, steps):
    settings = ["network.uplink_free=false", "clients.cohort=3", f"clients.selection={name}", "rounds=8", *steps]
    task = timed_task([0.1, 0.25, 0.15, 0.4, 0.3, 0.2, 0.35], *settings)
    if name == "tifl":  # so that it looks often
        task = with_selection(task, name, tiers=3, interval=2, credits=4)
    strategy = make(Worker(task).context)
    records, saved = [], []
    for step in rounds.run(task, strategy, SerialHost(task), rounds.begin(task, strategy), rounds.Timing()):
        step.settle()
        records.append(step.record)
        saved.append(pack(step.state.snapshot()))
    assert len({record.train_loss for record in records}) == 8  # the selections learn from real losses
    for done, kept in enumerate(saved, start=1):
        state = ServerState.from_snapshot(unpack(kept), rounds.begin(task, strategy), task)
        assert records_of(task, SerialHost(task), state) == records[done:]


def test_power_of_choice_takes_the_largest_losses_of_its_candidates():
    selection = named("power_of_choice", candidates=10)
    losses = {client: float(client) for client in range(9)}  # client 9 is not known, and counts as infinite
    assert chosen(selection, losses, asking()) == [7, 8, 9]
    few = PowerOfChoice(TASK, candidates=1)  # as many as are asked: a draw by data alone
    assert len({tuple(chosen(few, losses, asking(seed=seed))) for seed in range(20)}) > 5


def test_oort_s_utility_by_hand():
    oort = Oort(TASK)
    known = Explored({0: 10.0, 1: 10.0, 2: 1000.0}, {0: 1.0, 1: 4.0, 2: 1.0}, {0: 8, 1: 8, 2: 2}, 50.0, (0.0, 0.0))
    found = oort.utilities(known, np.array([0, 1, 2]), 9)
    temporal = [math.sqrt(0.1 * math.log(10) / last) for last in (9, 9, 3)]
    clipped = float(np.quantile([10, 10, 1000], 0.9))
    assert found == pytest.approx([10 + temporal[0], (10 + temporal[1]) * (1 / 4) ** 2, clipped + temporal[2]])


def test_oort_explores_at_first_and_prefers_what_is_useful_later():
    oort = Oort(TASK)
    assert len(chosen(oort, oort.init(), asking(count=10))) == 10
    every = dict.fromkeys(range(8), 1.0)
    state = Explored(every | {3: 50.0, 4: 50.0}, every, dict.fromkeys(range(8), 0), 30.0, (0.0, 0.0))
    late = [chosen(oort, state, asking(count=5, step=200, seed=seed)) for seed in range(20)]
    assert all({3, 4} <= set(found) for found in late)
    assert {len(set(found) & {8, 9}) for found in late} == {1}  # a fifth is new


def test_the_pacer_accepts_slower_clients_when_less_is_gained():
    oort = Oort(TASK, window=2)
    state = replace(oort.init(), gained=(1.0, 5.0))
    assert oort.learn(state, 0, []).percentile == 30 and oort.learn(state, 1, []).percentile == 35
    assert oort.learn(replace(state, gained=(6.0, 5.0)), 1, []).percentile == 30


def test_oort_explores_a_fifth_also_where_clients_are_asked_one_at_a_time():
    oort, some = Oort(TASK), dict.fromkeys(range(5), 1.0)
    state = Explored(some, some, dict.fromkeys(range(5), 0), 30.0, (0.0, 0.0))
    new = [chosen(oort, state, asking(count=1, step=200, seed=seed))[0] >= 5 for seed in range(1000)]
    assert sum(new) == pytest.approx(200, abs=50)  # four standard deviations


def test_oort_takes_negative_losses():
    oort = Oort(TASK)
    flights = [arrived(TASK, client, loss=-1.0 - client) for client in range(10)]
    state = oort.learn(oort.init(), 0, flights)
    assert len(chosen(oort, state, asking(count=5, step=200))) == 5


class Own(Selection[int]):
    """Asks the last idle clients; counts its steps."""

    def __init__(self, step=1):
        self.step = step

    def init(self):
        return 0

    def choose(self, state, asking):
        return asking.idle[-asking.count :]

    def learn(self, state, step, ended):
        return state + self.step


class Careless(Selection[list[int]]):
    """Changes its state in place, and draws from a global generator."""

    def init(self):
        return []

    def choose(self, state, asking):
        state.append(asking.step)
        return np.random.permutation(np.roll(asking.idle, len(state)))[: asking.count]


class Broken(Selection):
    def __init__(self, method):
        self.method = method

    def init(self):
        return self.fail("init")

    def choose(self, state, asking):
        return asking.idle[: asking.count]

    def learn(self, state, step, ended):
        return self.fail("learn")

    def fail(self, method):
        if method == self.method:
            raise ValueError("own")


class Silent(Selection):
    """Has no `choose`."""


class Wrong(Selection):
    def choose(self, state, asking):
        return [0, 0, 1]


def test_your_own_is_found_by_its_path_and_checked():
    task = timed_task([1.0] * 6, "clients.cohort=2", f"clients.selection={__name__}:Own", "rounds=3")
    assert [record.cohort for record in records_of(task)] == [[4, 5]] * 3
    with pytest.raises(FedLQError, match=r"step 0: Wrong.choose returned \[0, 0, 1\]; it must return 3 different"):
        chosen(Wrong(), None, asking())


@pytest.mark.parametrize("method", ["init", "learn"])
def test_what_your_own_raises_is_one_sentence(method):
    own = f"clients.selection={__name__}:Broken", f"clients.selection_args={{method: {method}}}"
    task = timed_task([1.0] * 6, "clients.cohort=2", *own, "rounds=3")
    with pytest.raises(FedLQError, match=f"step 0: Broken.{method} failed: ValueError: own"):
        records_of(task)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["clients.selection=ort"], r"clients\.selection: no 'ort'; known: random, oort, .*did you mean 'oort'"),
        (
            ["clients.selection=tifl", "clients.selection_args={tier: 3}"],
            r"clients\.selection: takes no 'tier'; .*tiers",
        ),
        (["clients.selection=tifl", "clients.selection_args={tiers: 51}"], r"selection_args: tiers must be from 1 to"),
        (["clients.selection=tifl", "clients.selection_args={interval: 0}"], r"selection_args: interval must be"),
        (
            ["clients.selection=tifl", "clients.selection_args={credits: 1.5}"],
            r"credits must be a whole number .* 1\.5",
        ),
        (["clients.selection_args={tiers: 5}"], r"clients\.selection: takes no 'tiers'; it takes nothing"),
        ([f"clients.selection={__name__}:Silent"], r"clients\.selection: .*:Silent has no choose"),
        (["clients.selection=oort", "clients.selection_args={window: 0}"], r"selection_args: oort needs alpha"),
        (["clients.selection=oort", "clients.selection_args={alpha: .nan}"], r"selection_args: oort needs alpha"),
        (["clients.selection=oort", "clients.selection_args={alpha: fast}"], r"oort needs alpha .*, got 'fast', 20"),
        (["clients.selection=fastest", "clients.selection_args={task: 1}"], r"selection_args: 'task' is given by"),
        (
            ["clients.selection=power_of_choice", "clients.selection_args={candidates: 0}"],
            r"candidates must be at least",
        ),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        simulate(load(None, [*SMALL, "clients.cohort=4", *settings, f"out={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_a_clock_is_computed_again_only_where_it_decides_nothing():
    def decided(*settings):
        return not reclockable(load(None, ["strategy.name=fedavg", *settings]))

    assert not decided() and not decided("clients.selection=power_of_choice")
    assert decided("clients.selection=oort") and decided("clients.selection=fastest")
    assert decided("server.buffer=5") and decided("server.deadline_s=3")
