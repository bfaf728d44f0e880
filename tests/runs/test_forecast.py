"""Forecasts: the bytes and seconds that the run then has, exactly or at most; and the command."""

import json
import subprocess
import sys

import pytest
import tiny

import fedlq_ray
from fedlq_ray import ConfigError, simulate
from fedlq_ray.federation.task import Worker, prepare
from fedlq_ray.runs.ceiling import rules_of, walk
from fedlq_ray.runs.forecast import Trial, memory_bytes, wall_s
from fedlq_ray.strategies import make

FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]
QUICK = ["clients.hosting=serial", "clients.count=8", "clients.cohort=4", "rounds=2", "tracking.uri=null"]


def both(tmp_path, **sections):
    """A forecast, and the records of the run."""
    config = tiny.config(tmp_path / "run", rounds=4, **sections)
    return fedlq_ray.plan(config), simulate(config).history


@pytest.mark.parametrize(
    "sections",
    [
        {"strategy": {"name": "fedavg"}, "clients": {"dropout": 0.3, "variation": 0.5}},
        {"strategy": {"name": "uniform", "bits": 2.5}},
        {"strategy": {"name": "eden"}, "server": {"buffer": 2, "max_staleness": None}},
        {"strategy": {"name": "uniform"}, "clients": {"availability": "daily"}},
    ],
    ids=["dropout", "fraction", "asynchronous", "daily"],
)
def test_fixed_levels_are_known_exactly(sections, tmp_path):
    found, history = both(tmp_path, **sections)
    assert found.known == "exactly" and found.steps == found.rounds == 4
    assert found.uplink_bytes == history["uplink_bytes"].mean()
    assert found.downlink_bytes == history["downlink_bytes"].mean()
    assert found.seconds == pytest.approx(history["sim_time_s"].iloc[-1] / 4, rel=1e-12)


@pytest.mark.parametrize("name", ["fedlq_rd", "ecsq", "kimad"])
def test_budgets_bound_bytes_and_seconds(name, tmp_path):
    found, history = both(tmp_path, strategy={"name": name})
    assert found.known == "at most"
    assert history["uplink_bytes"].mean() <= found.uplink_bytes <= 1.3 * history["uplink_bytes"].mean()
    assert history["sim_time_s"].iloc[-1] / 4 <= found.seconds


def test_a_coded_downlink_is_bounded_by_its_rate(tmp_path):
    network = {"downlink_bits": 1.0, "bill": "both"}
    found, history = both(tmp_path, strategy={"name": "uniform"}, network=network)
    assert found.known == "at most" and history["sim_time_s"].iloc[-1] / 4 <= found.seconds
    assert history["downlink_bytes"].mean() <= found.downlink_bytes < 4 * 60_076 / 4
    assert any("downlink is coded" in note for note in found.notes)


@pytest.mark.parametrize(("name", "why"), [("fedlq", "The scheme learns"), ("fedpaq", "Sizes depend on the values")])
def test_what_is_not_known_is_said_to_be_about(name, why, tmp_path):
    found, history = both(tmp_path, strategy={"name": name})
    assert found.known == "about" and any(note.startswith(why) for note in found.notes)
    assert found.uplink_bytes == pytest.approx(history["uplink_bytes"].mean(), rel=0.3)


def test_a_forecast_writes_nothing_and_has_wall_time_and_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = fedlq_ray.plan(tiny.config(strategy={"name": "ecsq"}))
    assert not list(tmp_path.iterdir())
    assert found.wall_s > 0 and found.workers == 1
    assert json.loads(json.dumps(found.to_json()))["ceiling"]["gain"] > 1
    with pytest.raises(ConfigError, match="cohort"):
        fedlq_ray.plan({"clients": {"count": 2, "cohort": 4}})


def test_memory_counts_what_each_client_keeps():
    task = prepare(tiny.config(rounds=2))  # 2 rounds of 4 clients: 8 of the 10 are asked at most
    base, more = (memory_bytes(task, Trial(9, kept, 0.1, 0.1, 0.1, 0.1), 1) for kept in (0, 10**8))
    assert more - base == pytest.approx(8e8, abs=1e7)


def test_wall_time_by_hand():
    task = prepare(tiny.config(rounds=6, evaluate_every=4, strategy={"name": "uniform"}))
    rules = rules_of(task, make(Worker(task).context))
    steps = walk(rules, lambda job: 100)
    trained = sum(e.flight.job.samples for step in steps for e in step.ended)
    # Six rounds of four clients, and evaluations after the fourth round and after the last.
    found = wall_s(rules, steps, Trial(100, 0, 0.5, 0.25, 3.0, 2.0), 1)
    assert found == pytest.approx(0.5 * trained + 24 * (3 + 2) + 2 * 0.25 * len(task.data.y_test))


def test_the_command_prints_a_table_or_json_and_refuses_wrong_input(tmp_path):
    def fedlq(*arguments):
        return subprocess.run([*FEDLQ, "plan", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    shown = fedlq(*QUICK, "strategy.name=uniform")
    assert shown.returncode == 0, shown.stderr
    assert "compression of uploads alone" in shown.stdout and "known exactly" in shown.stdout
    found = json.loads(fedlq(*QUICK, "--json").stdout)
    assert found["known"] == "about" and found["ceiling"]["ratios"]["median"] > 0
    wrong = fedlq("rounds=x")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_run_says_at_its_start_what_compression_can_gain(tmp_path):
    done = subprocess.run([*FEDLQ, "run", *QUICK], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    (line,) = [line for line in done.stderr.splitlines() if "compression of uploads alone" in line]
    assert line.startswith("demo-0: uploading float32 takes ")
