"""Comparisons: who is a row, what is paired with what, intervals by hand, and the three forms."""

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from fedlq_ray import Config, ConfigError, simulate
from fedlq_ray.analysis import budget, compare, report, runs, tables
from fedlq_ray.config.load import load
from fedlq_ray.federation.record import Record
from fedlq_ray.sweeps.sweep import Finished, Outcome

pytestmark = pytest.mark.usefixtures("own_folder")

QUICK = ["rounds=2", "clients.hosting=serial", "clients.count=8", "clients.cohort=4"]


def done(folder, accuracies, seconds, mb=2.0):
    """Runs of seeds 0, 1, ... that never trained."""
    made = []
    for seed, (accuracy, time) in enumerate(zip(accuracies, seconds, strict=True)):
        summary = {"final_accuracy": accuracy, "time_to_target_s": time, "uplink_bytes": mb * 1e6}
        summary["uplink_bytes_to_target"] = time and mb * 5e5
        made.append(Finished(Config(seed=seed), [], summary, folder))
    return made


def test_a_speed_up_is_a_geometric_mean_of_ratios_by_seed_and_its_interval_that_of_logarithms(tmp_path):
    outcome = Outcome(
        {"fedavg": done(tmp_path, [0.5, 0.6], [10.0, 30.0]), "a": done(tmp_path, [0.53, 0.61], [5.0, 10.0])}
    )
    base, row = compare.rows(outcome)
    # ln 2 and ln 3: mean 0.8959, standard deviation 0.2867; t(0.975, 1 degree) = 12.706, over the root of 2.
    mean, reach = (math.log(2) + math.log(3)) / 2, 12.7062 * (math.log(1.5) / math.sqrt(2)) / math.sqrt(2)
    assert row.speed_up.mean == pytest.approx(math.sqrt(6))
    assert row.speed_up.low == pytest.approx(math.exp(mean - reach), rel=1e-4)
    assert row.speed_up.high == pytest.approx(math.exp(mean + reach), rel=1e-4)
    # Differences .03 and .01: mean .02, deviation .01414.
    assert row.accuracy_gain.mean == pytest.approx(0.02)
    assert row.accuracy_gain.low == pytest.approx(0.02 - 12.7062 * 0.01, rel=1e-4)
    assert base.speed_up.mean == 1.0


def test_nothing_is_paired_where_seeds_differ_or_one_did_not_arrive(tmp_path):
    outcome = Outcome(
        {
            "fedavg": done(tmp_path, [0.5, 0.6], [10.0, 30.0]),
            "one": done(tmp_path, [0.5], [1.0]),
            "late": done(tmp_path, [0.5, 0.6], [1.0, None]),
        }
    )
    _, one, late = compare.rows(outcome)
    assert one.speed_up is None and one.accuracy_gain is None
    assert late.speed_up is None and late.accuracy_gain.mean == 0
    assert tables.columns(compare.rows(outcome), 0.9)["s to 0.9"][2] == "by 1 of 2"


def test_the_front_has_what_nothing_beats_in_both(tmp_path):
    figures = {"best": (0.9, 8), "cheap": (0.8, 1), "worse": (0.85, 9), "equal": (0.9, 8), "dearer": (0.8, 2)}
    outcome = Outcome({name: done(tmp_path, [a], [1.0], mb) for name, (a, mb) in figures.items()})
    assert [row.run for row in compare.rows(outcome) if row.front] == ["best", "cheap", "equal"]
    apart = {f"{name}@{i}": run for i, (name, run) in enumerate(outcome.runs.items())}
    assert all(row.front for row in compare.rows(Outcome(apart)))  # each alone in its population


def test_the_reference_is_who_is_asked_for(tmp_path):
    outcome = Outcome({"a": done(tmp_path, [0.5], [6.0]), "b": done(tmp_path, [0.4], [2.0])})
    assert [row.speed_up.mean for row in compare.rows(outcome)] == pytest.approx([1, 3])
    assert [row.speed_up.mean for row in compare.rows(outcome, "b")] == pytest.approx([1 / 3, 1])
    with pytest.raises(ConfigError, match="there is no run c; the runs are a, b"):
        compare.rows(outcome, "c")


def run(*settings):
    return simulate(load(None, [*QUICK, *settings]))


def test_runs_that_differ_in_seed_alone_are_a_row_and_named_by_what_differs(tmp_path):
    for seed in (0, 1):
        run("strategy.name=fedavg", f"seed={seed}", "tracking.uri=null")
        run("strategy.name=uniform", f"seed={seed}", "tracking.uri=null")
        run("strategy.name=uniform", "strategy.bits=2", f"seed={seed}", "tracking.uri=null")
    found = runs.find(["runs"], None, tmp_path)
    assert {label: [r.config.seed for r in one] for label, one in found.runs.items()} == {
        "fedavg": [0, 1],
        "uniform strategy.bits=4.0": [0, 1],
        "uniform strategy.bits=2.0": [0, 1],
    }
    assert not runs.unlike(found)
    bits = [row.bits_per_parameter for row in compare.rows(found)]
    assert bits[0] == pytest.approx(32, rel=0.01) and bits[1:] == pytest.approx([4, 2], rel=0.05)
    run("strategy.name=fedavg", "seed=5", "clients.cohort=3", "name=other", "tracking.uri=null")
    assert runs.unlike(runs.find(["runs"], None, tmp_path)) == {"clients.cohort": ["4", "3"]}


def test_what_holds_no_run_or_twice_the_same_with_other_results_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder; .*--tracking-uri"):
        runs.find(["nowhere"], None, tmp_path)
    with pytest.raises(ConfigError, match="holds no run"):
        runs.find([str(tmp_path)], None, tmp_path)
    for _ in range(2):
        run("tracking.uri=null")
    assert [len(one) for one in runs.find(["runs"], None, tmp_path).runs.values()] == [1]
    summary = tmp_path / "runs/demo-0-2/summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"weights_sha256": "0"}))
    with pytest.raises(ConfigError, match="same settings and seed, but different results"):
        runs.find(["runs"], None, tmp_path)


def test_mlflow_gives_the_same_comparison_as_the_folders(tmp_path):
    for seed in (0, 1):
        for name in ("fedavg", "signsgd"):
            settings = [f"strategy.name={name}", f"seed={seed}", f"name=cmp-{name}", f"out=cmp/{name}-{seed}"]
            simulate(load(None, [*QUICK, *settings]), parent="x/cmp")
    run("evaluate_on=holdout")  # a trial: not compared
    local = compare.rows(runs.find(["cmp"], None, tmp_path))
    fetched = runs.find(["fedlq"], "sqlite:///mlflow.db", tmp_path / "scratch")
    assert set(fetched.runs) == {"cmp-fedavg", "cmp-signsgd"}
    fetched = {
        row.run.removeprefix("cmp-"): replace(row, run="", reference="") for row in compare.rows(fetched, "cmp-fedavg")
    }
    assert fetched == {row.run: replace(row, run="", reference="") for row in local}
    with pytest.raises(ConfigError, match="no such run or experiment"):
        runs.find(["missing"], "sqlite:///mlflow.db", tmp_path / "scratch")


def curve(folder, seed, accuracies, seconds, mb, target_s=None, evaluated=None):
    """A run of rounds that take so many seconds and MB each; `evaluated`: the rounds that have an accuracy."""
    records = [
        Record.from_json(
            {"round": i, "sim_time_s": seconds * (i + 1), "uplink_bytes": int(mb * 1e6), "downlink_bytes": 0}
            | ({"accuracy": a} if evaluated is None or i in evaluated else {})
        )
        for i, a in enumerate(accuracies)
    ]
    summary = {"final_accuracy": accuracies[-1], "time_to_target_s": target_s, "uplink_bytes": mb * len(accuracies)}
    summary["uplink_bytes_to_target"] = target_s and mb * 1e6 * target_s / seconds
    return Finished(Config(seed=seed), records, summary, folder)


def test_quality_under_budget_is_paired_at_what_both_reach(tmp_path):
    # After 4 MB and 40 s, fedavg is at 0.4; the other sends 0.5 MB per round, so both reach 2 MB and 20 s.
    base = [curve(tmp_path, seed, [0.1, 0.2 + seed / 10, 0.3, 0.4], 10.0, 1.0) for seed in (0, 1)]
    other = [curve(tmp_path, seed, [0.2, 0.4, 0.6, 0.8], 5.0, 0.5) for seed in (0, 1)]
    reference, row = compare.rows(Outcome({"fedavg": base, "a": other}))
    found = row.qualities["equal_mb"]
    assert found.budget == 2.0 and found.mean == pytest.approx(0.8)
    # 0.8 - 0.2 and 0.8 - 0.3: mean .55, deviation .0707, times 12.7062 / sqrt(2).
    assert found.gain == pytest.approx((0.55, 0.55 - 12.7062 * 0.05, 0.55 + 12.7062 * 0.05), rel=1e-4)
    assert row.qualities["equal_s"].budget == 20.0 and row.qualities["equal_s"].gain.mean == pytest.approx(0.55)
    assert reference.qualities["equal_mb"].gain.mean == 0
    told = tables.columns([reference, row], None)
    assert told["points at equal MB"][0] == "reference"
    assert told["points at equal MB"][1].startswith("+55.0 (") and told["points at equal MB"][1].endswith("at 2.00")
    flat = row.to_json()
    assert flat["equal_s"] == 20.0 and flat["gain_at_equal_mb"] == pytest.approx(0.55)
    assert flat["accuracy_at_equal_mb"] == pytest.approx(0.8) and flat["gain_at_equal_s_low"] < 0


def test_quality_is_linear_between_evaluations_and_unknown_before_the_first(tmp_path):
    (run,) = [curve(tmp_path, 0, [0.0, 0.2, 0.0, 0.6], 10.0, 1.0, evaluated=(1, 3))]
    assert budget.quality(run.records, "time", 30.0) == pytest.approx(0.4)
    assert budget.quality(run.records, "bytes", 2.5) == pytest.approx(0.3)
    assert budget.quality(run.records, "time", 19.0) is None and budget.quality(run.records, "time", 41.0) is None
    assert budget.largest([run.records], "time") == 40.0 and budget.largest([run.records, []], "time") is None
    cheap = curve(tmp_path, 0, [0.1], 10.0, 0.5)  # it ends before the other was evaluated
    row = compare.rows(Outcome({"fedavg": [run], "a": [cheap]}))[1]
    assert row.qualities["equal_mb"].mean == 0.1 and row.qualities["equal_mb"].gain is None
    assert "points at equal MB" not in tables.columns(compare.rows(Outcome({"fedavg": [run], "a": [cheap]})), None)


def test_the_gap_closed_and_the_cost_to_target_by_hand(tmp_path):
    times = {"fedavg": (100.0, 200.0), "a": (20.0, 60.0), "limit": (10.0, 20.0), "never": (None, 50.0)}
    made = {
        name: [curve(tmp_path, seed, [0.9], 10.0, 1.0 if name == "fedavg" else 0.25, t) for seed, t in enumerate(of)]
        for name, of in times.items()
    }
    base, a, limit, never = compare.rows(Outcome(made))
    # (100 - 20) / 90 and (200 - 60) / 180
    assert a.gap_closed.mean == pytest.approx((80 / 90 + 140 / 180) / 2)
    assert (base.gap_closed.mean, limit.gap_closed.mean, never.gap_closed) == (0, 1, None)
    # 10 and 20 MB, over 0.5 and 1.5 MB
    assert a.mb_saving.mean == pytest.approx((20 * (20 / 1.5)) ** 0.5) and never.mb_saving is None
    told = tables.columns([base, a, limit, never], 0.9)
    assert told["gap closed, %"][2] == "100 (100 to 100)" and told["gap closed, %"][3] == "–"
    assert told["MB saving"][0] == "reference"
    assert any("closes 83.3% of the gap" in line for line in report.findings([base, a, limit, never], 0.9))
    without = compare.rows(Outcome({name: made[name] for name in ("fedavg", "a")}))
    assert without[1].gap_closed is None


def test_the_three_forms_say_the_same(tmp_path):
    outcome = Outcome(
        {"fedavg": done(tmp_path, [0.5, 0.6], [10.0, 20.0]), "a|b": done(tmp_path, [0.7, 0.8], [1.0, 2.0])}
    )
    table, configs = compare.rows(outcome), {name: Config() for name in outcome.runs}
    text, markdown, comma = (tables.written(table, configs, {}, form) for form in ("text", "markdown", "csv"))
    for told in (text, markdown):
        assert "75.00 ± 7.07" in told and "10 (10 to 10)" in told and "+20.0 (+20.0 to +20.0)" in told
    assert "a\\|b" in markdown and "Student's t, paired by seed" in markdown
    rows = list(csv.DictReader(io.StringIO(comma)))
    assert [float(row["final_accuracy"]) for row in rows] == pytest.approx([0.55, 0.75])
    narrow = tables.written(table, configs, {}, "text", width=60)
    assert max(map(len, narrow.split("\n\nThe")[0].splitlines())) <= 60 and narrow.count("fedavg") > text.count(
        "fedavg"
    )


def test_the_command_writes_a_file_and_tells_wrong_input(tmp_path):
    run("tracking.uri=null")
    command = [sys.executable, "-m", "fedlq_ray.cli", "compare"]
    made = subprocess.run(
        [*command, "runs", "--format", "csv", "--out", "t.csv"], capture_output=True, text=True, timeout=240
    )
    assert made.returncode == 0 and (tmp_path / "t.csv").read_text().startswith("run,"), made.stderr
    wrong = subprocess.run([*command, "nowhere"], capture_output=True, text=True, timeout=240)
    assert wrong.returncode == 2 and "no such folder" in wrong.stderr
