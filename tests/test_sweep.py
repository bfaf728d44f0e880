"""Sweeps: what is refused, how tuning chooses, and that a run that fails stops no other."""

import json
import subprocess
import sys

import pytest

from fedlq_ray import ConfigError
from fedlq_ray.analysis import compare
from fedlq_ray.simulation import simulate
from fedlq_ray.sweep import Outcome, load, run

BASE = "base: {rounds: 3, name: s, tracking: {uri: null}, clients: {hosting: serial, count: 8, cohort: 4}}\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sweep(tmp_path, text, told):
    (tmp_path / "s.yaml").write_text(BASE + text)
    comparison = load(tmp_path / "s.yaml")
    return run(comparison, tmp_path / "out", lambda config, parent: simulate(config, parent=parent), told.append)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {}", "a sweep has base, tune, runs, seeds"),
        ("runs: {a: [train.lrr=1]}", r"run a:\n.*train.lrr: unknown key"),
        ("runs: {a: []}\ntune: {train.lr: 0.1}", "tune is a list of values"),
        ("runs: {a: []}\ntune: {train.lr: [-1]}", "train.lr: .*greater than 0"),
        ("runs: [a", "while parsing"),
    ],
)
def test_a_wrong_file_is_told_before_anything_runs(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path, text, [])
    assert not (tmp_path / "out").exists()


def test_tuning_takes_what_does_best_on_held_out_samples_of_another_seed(tmp_path):
    told = []
    found = sweep(tmp_path, "runs: {a: [strategy.name=fedavg]}\ntune: {train.lr: [0.0001, 0.1]}\nseeds: [0, 1]", told)
    assert found.tuned == {"a": "train.lr=0.1"} and "train.lr=0.1 did best" in told[0]
    assert [done.config.train.lr for done in found.runs["a"]] == [0.1, 0.1]
    tried = load_config(tmp_path / "out/tune/a/train.lr=0.0001")
    assert "evaluate_on: holdout" in tried and "seed: 2" in tried
    assert "evaluate_on: test" in load_config(tmp_path / "out/a-0")


def load_config(folder):
    return (folder / "config.yaml").read_text()


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path):
    told = []
    text = "runs: {bad: [train.lr=1000, rounds=20], fedavg: [strategy.name=fedavg]}\nseeds: [0, 1]"
    found = sweep(tmp_path, text, told)
    assert found.failed == 2 and sum("training diverged" in line for line in told) == 2
    bad, good = compare.rows(found)
    assert (bad["failed"], bad["final_accuracy"], good["failed"]) == (2, None, 0)
    assert good["final_accuracy_sd"] is not None and good["by_seed"][1]["seed"] == 1
    compare.plot(found, tmp_path / "a.png")
    again = sweep(tmp_path, text, told)
    assert again.runs["fedavg"] == found.runs["fedavg"] and len(list((tmp_path / "out").glob("*.unfinished-*"))) == 2


def test_a_target_counts_where_every_seed_reached_it():
    def done(seconds):
        return {
            "final_accuracy": 0.5,
            "time_to_target_s": seconds,
            "uplink_bytes_to_target": seconds and 1_000_000,
            "uplink_bytes": 2_000_000,
        }

    class Seed:
        seed = 0

    def runs(*seconds):
        from fedlq_ray.sweep import Finished

        return [Finished(Seed, [], done(s)) for s in seconds]

    table = compare.rows(Outcome({"fedavg": runs(10.0, 30.0), "a": runs(4.0, 6.0), "b": runs(1.0, None)}, {}))
    assert [row["time_to_target_s"] for row in table] == [20.0, 5.0, None]
    assert [row["speed_up"] for row in table] == [1.0, 4.0, None]
    assert table[0]["uplink_mb_to_target"] == 1.0 and table[2]["uplink_mb_to_target"] is None


def test_the_table_carries_what_made_it_and_a_failure_is_exit_code_1(tmp_path):
    (tmp_path / "s.yaml").write_text(BASE + "runs: {bad: [train.lr=1000, rounds=20], good: []}")
    command = [sys.executable, "-m", "fedlq_ray.cli", "sweep", "s.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "1 of the sweep's runs" in done.stderr and "1 of 1" in done.stdout
    table = json.loads((tmp_path / "runs/s/table.json").read_text())
    assert table["sweep"].startswith("base:") and table["command"] == "fedlq sweep s.yaml"
    assert {"commit", "machine", "versions"} < set(table) and [r["failed"] for r in table["rows"]] == [1, 0]
