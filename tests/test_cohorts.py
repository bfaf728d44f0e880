"""Who trains how much: a cohort's spare time as work, and what becomes of the late."""

import json

import pytest
import torch

from fedlq_ray import cohorts, simulate
from fedlq_ray.config import StrategyConfig, TrainConfig, load
from fedlq_ray.quantization import Absent
from fedlq_ray.strategies import Member
from fedlq_ray.strategies.budgets import taking_part
from fedlq_ray.task import prepare
from fedlq_ray.training import samples_of

QUICK = ["rounds=4", "clients.hosting=serial", "clients.count=8", "clients.cohort=4", "tracking.uri=null"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def records(*overrides):
    result = simulate(load(None, [*QUICK, *overrides]))
    return [json.loads(line) for line in (result.path / "rounds.jsonl").read_text().splitlines()], result


def test_spare_time_becomes_work_and_the_deadline_stays():
    task = prepare(load(None, [*QUICK, "train.adaptive_work=3", "clients.profiles=thin"]))
    members = [cohorts.member(task, client, 0) for client in cohorts.draw(task, 0)]
    longer = cohorts.with_more_work(task, members, 500.0)
    ends = [m.fixed_s + 500 / m.uplink_bytes_per_s for m in members]
    assert len(members) == 4 and all(m.work == 1 for m in members)
    for before, after, end in zip(members, longer, ends, strict=True):
        base = cohorts.base_work(task, before.samples)
        step_s = task.flops * 16 / (task.profiles[before.client].compute_gflops * 1e9)
        assert base == 2 * samples_of(len(task.shards[before.client]), TrainConfig())
        more = (after.work - 1) * base
        assert more % 16 == pytest.approx(0, abs=1e-9) and after.work <= 3
        spare = max(ends) - end - more / 16 * step_s
        assert spare >= -1e-9 and (spare < step_s or after.work * base > 3 * base - 16)
        assert after.fixed_s == pytest.approx(before.fixed_s + more / 16 * step_s)
    assert max(m.fixed_s + 500 / m.uplink_bytes_per_s for m in longer) == pytest.approx(max(ends))


@pytest.mark.parametrize("name", ["fedavg", "eden", "fedlq", "fedlq_rd", "kimad"])
def test_more_work_takes_no_longer_where_payloads_keep_their_size(name):
    more, result = records(f"strategy.name={name}", "train.adaptive_work=3")
    base, plain = records(f"strategy.name={name}")
    # The first round knows no payload's size yet, except where the strategy says it.
    assert sum(sum(r["client_samples"]) for r in more[1:]) > 1.2 * sum(sum(r["client_samples"]) for r in base[1:])
    assert result.summary["sim_time_s"] <= 1.02 * plain.summary["sim_time_s"]


def test_without_spare_time_more_work_changes_nothing():
    base, _ = records("clients.profiles=equal", "clients.cohort=1")
    more, _ = records("clients.profiles=equal", "clients.cohort=1", "train.adaptive_work=3")
    assert base == more


def member(client, fixed_s, rate=100.0):
    return Member(client, 10, fixed_s, rate)


def test_the_late_wait_or_drop_or_send_in_part():
    cohort, limits = [member(0, 1.0), member(1, 8.0), member(2, 9.9)], [900.0, 200.0, 10.0]

    def taking(late, limits=limits, **other):
        config = StrategyConfig(budget="deadline", deadline_s=10.0, late=late, **other)
        return taking_part(config, cohort, limits, least=300.0, scrap=50.0)

    assert taking("wait") == {0: 900, 1: 300, 2: 300}
    assert taking("drop") == {0: 900}
    assert taking("partial") == {0: 900, 1: 200}
    assert taking("drop", [0.0, 0.0, 0.0]) == {0: 300} and taking("partial", [0.0, 0.0, 0.0]) == {0: 50}
    config = StrategyConfig(budget="cohort", late="drop")
    assert taking_part(config, cohort, limits, 300.0, 50.0) == {0: 900, 1: 200, 2: 10}


@pytest.mark.parametrize("name", ["fedlq", "fedlq_rd"])
def test_a_fixed_deadline_with_each_policy(name):
    base = ["strategy.budget=deadline", f"strategy.name={name}", "clients.profiles=thin", "rounds=6"]
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
