"""Who trains how much: as long as the others, not as much; and what becomes of the late."""

import json

import pytest
import torch

from fedlq_ray import simulate
from fedlq_ray.config.load import load
from fedlq_ray.config.schemes import strategy_config
from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.federation import cohorts
from fedlq_ray.federation.selection import draw
from fedlq_ray.federation.task import prepare
from fedlq_ray.quantization import Absent
from fedlq_ray.strategies import Member
from fedlq_ray.strategies.budgets import taking_part
from fedlq_ray.training.sgd import samples_of

pytestmark = pytest.mark.usefixtures("own_folder")

QUICK = ["rounds=4", "clients.hosting=serial", "clients.count=8", "clients.cohort=4", "tracking.uri=null"]


def records(*overrides):
    result = simulate(load(None, [*QUICK, *overrides]))
    return [json.loads(line) for line in (result.path / "rounds.jsonl").read_text().splitlines()], result


@pytest.mark.parametrize("limit", [1.5, 3.0, 10.0])
def test_members_train_for_as_long_as_each_other_and_as_much_in_the_mean(limit):
    task = prepare(load(None, [*QUICK, f"train.adaptive_work={limit}", "clients.profiles=thin", "train.batch_size=1"]))
    members = [cohorts.member(task, client, 0) for client in draw(task, 0)]
    own = cohorts.with_own_work(task, members, [500.0] * 4)
    bases = [cohorts.base_work(task, m.samples) for m in members]
    assert bases == [2 * samples_of(len(task.shards[m.client]), TrainConfig()) for m in members]
    ends = []
    for before, after, base in zip(members, own, bases, strict=True):
        sample_s = task.flops / (task.profiles[before.client].compute_gflops * 1e9)
        assert limit**-0.5 - 1 / base <= after.work <= limit and after.work * base == pytest.approx(
            round(after.work * base)
        )
        assert after.fixed_s == pytest.approx(before.fixed_s + (after.work - 1) * base * sample_s)
        ends.append(after.fixed_s + 500 / after.uplink_bytes_per_s)
    total = sum(m.work * base for m, base in zip(own, bases, strict=True))
    goal = limit**0.5 * sum(bases)
    assert goal - len(own) <= total <= goal * (1 + 1e-9)  # each rounds down to a whole step of a sample
    free = [end for end, m in zip(ends, own, strict=True) if 1.01 * limit**-0.5 < m.work < 0.99 * limit]
    assert len(free) < 2 or max(free) - min(free) < 0.1 * max(free)


def test_steps_are_whole_and_nobody_does_nothing():
    task = prepare(load(None, [*QUICK, "train.adaptive_work=100", "clients.profiles=thin"]))
    members = [cohorts.member(task, client, 0) for client in range(8)]
    for m in cohorts.with_own_work(task, members, [2000.0] * 8):
        samples = m.work * cohorts.base_work(task, m.samples)
        assert samples > min(16, m.samples) - 1e-6 and (abs(samples - 16 * round(samples / 16)) < 1e-6 or m.work == 1)


@pytest.mark.parametrize("name", ["fedavg", "eden", "fedlq", "fedlq_rd", "kimad"])
def test_own_work_is_more_work_a_second(name):
    own, result = records(f"strategy.name={name}", "train.adaptive_work=2", "train.batch_size=4")
    base, plain = records(f"strategy.name={name}", "train.batch_size=4")
    # The first round knows no payload's size yet, except where the strategy says it.
    for mine, theirs in zip(own[1:], base[1:], strict=True):
        assert 1.3 < sum(mine["client_samples"]) / sum(theirs["client_samples"]) < 1.42
    assert result.summary["sim_time_s"] < 1.4 * plain.summary["sim_time_s"]


def test_alone_a_client_does_the_mean():
    base, _ = records("clients.cohort=1", "train.batch_size=1")
    more, _ = records("clients.cohort=1", "train.batch_size=1", "train.adaptive_work=4")
    assert [r["client_samples"][0] for r in more[1:]] == [2 * r["client_samples"][0] for r in base[1:]]


def member(client, fixed_s, rate=100.0):
    return Member(client, 10, fixed_s, rate)


def test_the_late_wait_or_drop_or_send_in_part():
    cohort, limits = [member(0, 1.0), member(1, 8.0), member(2, 9.9)], [900.0, 200.0, 10.0]

    def taking(late, limits=limits, **other):
        config = strategy_config(budget="deadline", deadline_s=10.0, late=late, **other)
        return taking_part(config, cohort, limits, least=300.0, scrap=50.0)

    assert taking("wait") == {0: 900, 1: 300, 2: 300}
    assert taking("drop") == {0: 900}
    assert taking("partial") == {0: 900, 1: 200}
    assert taking("drop", [0.0, 0.0, 0.0]) == {0: 300} and taking("partial", [0.0, 0.0, 0.0]) == {0: 50}
    config = strategy_config(budget="cohort", late="drop")
    assert taking_part(config, cohort, limits, 300.0, 50.0) == {0: 900, 1: 200, 2: 10}


@pytest.mark.parametrize("name", ["fedlq", "fedlq_rd"])
def test_a_fixed_deadline_with_each_policy(name):
    base = ["strategy.budget=deadline", f"strategy.name={name}", "clients.profiles=thin", "rounds=6"]
    base.append("strategy.floor_bits=2")  # fedlq_rd: who cannot send at this rate is late
    waiting, _ = records(*base, "strategy.deadline_s=0.15")
    dropping, _ = records(*base, "strategy.deadline_s=0.15", "strategy.late=drop")
    parts, _ = records(*base, "strategy.deadline_s=0.15", "strategy.late=partial")
    assert all(r["answered"] == r["cohort"] for r in waiting)
    missing = sum(len(r["cohort"]) - len(r["answered"]) for r in dropping)
    assert missing > 0 and missing >= sum(len(r["cohort"]) - len(r["answered"]) for r in parts)
    for r in dropping:
        for client, samples, sent in zip(r["cohort"], r["client_samples"], r["client_uplink_bytes"], strict=True):
            assert (samples > 0) == (sent > 0) == (client in r["answered"])
    if all(len(r["answered"]) > 1 for r in dropping):
        assert dropping[-1]["sim_time_s"] <= waiting[-1]["sim_time_s"]


def test_an_absent_layer_takes_no_bytes_and_is_zero():
    x = torch.ones(5)
    assert Absent().encode(x, torch.Generator()) == b"" and Absent().size(5) == 0
    assert torch.equal(Absent().decode(memoryview(b""), 5), torch.zeros(5))
