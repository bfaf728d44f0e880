"""Sweeps: what is refused, how tuning chooses, and that a run that fails stops no other."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from faults import round_of
from pydantic import BaseModel

from fedlq_ray import ConfigError, FedLQError
from fedlq_ray.analysis import compare
from fedlq_ray.analysis.conclude import conclude
from fedlq_ray.config.load import load as load_settings
from fedlq_ray.config.load import to_yaml
from fedlq_ray.federation.events import Resumed
from fedlq_ray.federation.record import Record
from fedlq_ray.runs.rundir import journal
from fedlq_ray.runs.simulation import run_or_resume, simulate
from fedlq_ray.sweeps import reclock
from fedlq_ray.sweeps.many import in_turn
from fedlq_ray.sweeps.sweep import Outcome, load, run

pytestmark = pytest.mark.usefixtures("own_folder")

BASE = "base: {rounds: 3, name: s, tracking: {uri: null}, clients: {hosting: serial, count: 8, cohort: 4}}\n"


def sweep(tmp_path, text, told):
    (tmp_path / "s.yaml").write_text(BASE + text)
    comparison = load(tmp_path / "s.yaml")
    return run(
        comparison, tmp_path / "out", in_turn(lambda config, parent: run_or_resume(config, parent=parent)), told.append
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: {}", "a sweep has base, tune, tuning, runs, populations, seeds, targets"),
        ("runs: {a: [train.lrr=1]}", r"run a:\n.*train.lrr: unknown key"),
        ("runs: {a: []}\ntune: {train.lr: 0.1}", "tune is a list of values"),
        ("runs: {a: []}\ntune: {train.lr: [-1]}", "train.lr: .*greater than 0"),
        ("runs: [a", "while parsing"),
        ("runs: {a: [strategy.levels=[1]}", "while parsing"),
        ("runs: {a: ['train.lr=[0.1']}", r"run a: .*while parsing"),
        ("runs: {a: train.lr=0.1}", "each of runs is a list"),
        ("runs: {a: []}\nseeds: 3", "seeds and tuning are lists"),
        ("runs: {a: []}\nseeds: [one]", "seeds are whole numbers"),
        ("runs: {a: []}\ntuning: rounds=3", "seeds and tuning are lists"),
        ("runs: {a: []}\npopulations: [thin]", "populations are a list"),
        ("runs: {a: []}\npopulations: {x: [clients.profiles=3]}\ntargets: [80]", "targets are accuracies"),
        ("runs: {a: [stop_at_target=true]}\ntargets: [0.95]", "exceed target=0.93"),
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


def test_tuning_takes_lists_and_nothing_and_a_run_without_a_folder_is_a_failed_one(tmp_path):
    text = "runs: {a: [strategy.name=fedlq, strategy.probe_samples=32, train.local_epochs=1]}\n"
    text += "tune: {strategy.levels: [[1, 2], [4, 8]], train.max_grad_norm: [null]}"
    found = sweep(tmp_path, text, [])
    assert found.tuned["a"] in (
        "strategy.levels=[1, 2] train.max_grad_norm=null",
        "strategy.levels=[4, 8] train.max_grad_norm=null",
    )
    levels = [int(bits) for bits in found.tuned["a"].partition("[")[2].partition("]")[0].split(", ")]
    assert list(found.runs["a"][0].config.strategy.levels) == levels

    def start(configs, parent):
        for config in configs:
            failed = config.strategy.name == "fedavg"
            yield config, FedLQError("its worker was killed") if failed else run_or_resume(config) and None

    (tmp_path / "s.yaml").write_text(BASE + "runs: {b: [strategy.name=fedavg], c: [strategy.name=uniform]}")
    found = run(load(tmp_path / "s.yaml"), tmp_path / "out", start, [].append)
    assert found.failed == 1 and found.runs["b"][0].records == [] and found.runs["c"][0].summary
    assert conclude(found, tmp_path / "out", "", "").failure is None
    assert "no result" in (tmp_path / "out/report.html").read_text()


def test_where_runs_diverge_the_next_best_settings_take_their_place(tmp_path):
    told = []
    text = "runs: {a: [strategy.name=fedavg]}\ntune: {train.lr: [0.05, 0.2, 1000]}\nseeds: [0, 1]"
    (tmp_path / "s.yaml").write_text(BASE + text)

    def start(config, parent):
        # 0.2 does best in its trial, and diverges in one of its two runs.
        trial, lr = config.evaluate_on == "holdout", config.train.lr
        trained = {0.05: 0.001 if trial else 0.05, 0.2: 1e6 if config.seed == 1 else 0.2, 1000: 1000}[lr]
        try:
            train = BaseModel.model_copy(config.train, update={"lr": trained})  # unchecked: beyond what settings allow
            simulate(config.model_copy(update={"train": train}))
        finally:  # the folder of the run that was asked for
            (Path(config.out) / "config.yaml").write_text(to_yaml(config))

    found = run(load(tmp_path / "s.yaml"), tmp_path / "out", in_turn(start), told.append)
    assert [line.split()[1] for line in told if "did best" in line] == ["train.lr=0.2", "train.lr=0.05"]
    assert found.tuned == {"a": "train.lr=0.05"} and found.failed == 0 and len(found.runs["a"]) == 2
    assert {f.name for f in (tmp_path / "out/diverged/a/train.lr=0.2").iterdir()} == {"a-0", "a-1"}
    (tmp_path / "out/tune/a/train.lr=1000").rename(tmp_path / "elsewhere")  # failed, so that it would be tried again
    again = run(load(tmp_path / "s.yaml"), tmp_path / "out", in_turn(start), told.append)
    assert again.tuned == found.tuned and again.failed == 0


def test_trials_have_settings_of_their_own_and_some_runs_can_be_done_alone(tmp_path):
    text = "runs: {a: [], b: []}\ntune: {train.lr: [0.1, 0.2]}\ntuning: [rounds=2]"
    (tmp_path / "s.yaml").write_text(BASE + text)
    found = load(tmp_path / "s.yaml", only=["b"])
    assert list(found.runs) == ["b"] and found.runs["b"][0].rounds == 3
    assert [trial.rounds for trial in found.tuning["b"].values()] == [2, 2]
    with pytest.raises(ConfigError, match=r"has no run c; it has a, b"):
        load(tmp_path / "s.yaml", only=["b", "c"])
    (tmp_path / "s.yaml").write_text(BASE + text + "\npopulations: {thin: [], mixed: []}")
    assert list(load(tmp_path / "s.yaml", only=["a@mixed", "b"]).runs) == ["a@mixed", "b@thin", "b@mixed"]
    with pytest.raises(ConfigError, match=r"has no run a@thick; it has a, b, each with @thin, @mixed"):
        load(tmp_path / "s.yaml", only=["a@thick"])


def load_config(folder):
    return (folder / "config.yaml").read_text()


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path):
    told = []
    bad = "[strategy.floor_bits=2, train.lr=1000, rounds=20]"  # diverges after its first round
    text = f"runs: {{bad: {bad}, fedavg: [strategy.name=fedavg]}}\nseeds: [0, 1]"
    found = sweep(tmp_path, text, told)
    assert found.failed == 2 and sum("training diverged" in line for line in told) == 2
    bad, good = compare.rows(found)
    assert (bad.failed, bad.mean("final_accuracy"), good.failed) == (2, None, 0)
    assert good.values["final_accuracy"].sd is not None and good.by_seed[1]["seed"] == 1
    compare.plot(found, tmp_path / "a.png")
    again = sweep(tmp_path, text, told)
    assert again.runs["fedavg"] == found.runs["fedavg"]
    assert again.failed == 2 and len(journal(tmp_path / "out/bad-0")) == 1  # it went on, and failed as before


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    text = "runs: {fedavg: [strategy.name=fedavg, rounds=6, checkpoint.every_rounds=1]}"
    whole = sweep(tmp_path, text, [])
    shutil.rmtree(tmp_path / "out")

    def cut(event):
        if round_of(event) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    comparison = load(tmp_path / "s.yaml")
    with pytest.raises(KeyboardInterrupt):
        run(comparison, tmp_path / "out", in_turn(lambda config, parent: simulate(config, watch=cut)), [].append)
    assert 0 < len(journal(tmp_path / "out/fedavg-0")) < 6
    resumed = []
    again = run(
        comparison, tmp_path / "out", in_turn(lambda config, _: run_or_resume(config, watch=resumed.append)), [].append
    )
    assert again.runs == whole.runs and any(isinstance(event, Resumed) for event in resumed)
    left = tmp_path / "out/fedavg-0/checkpoints"  # as if killed at its very end
    left.mkdir()
    (left / "00000006.ckpt").touch()
    assert sweep(tmp_path, text, []).runs == whole.runs and not left.exists()


def test_a_target_counts_where_every_seed_reached_it():
    def done(seconds):
        return {
            "final_accuracy": 0.5,
            "time_to_target_s": seconds,
            "uplink_bytes_to_target": seconds and 1_000_000,
            "uplink_bytes": 2_000_000,
        }

    class Seed:
        def __init__(self, seed):
            self.seed, self.problem = seed, "classification"

    def runs(*seconds):
        from fedlq_ray.sweeps.sweep import Finished

        return [Finished(Seed(i), [], done(s), Path()) for i, s in enumerate(seconds)]

    table = compare.rows(Outcome({"fedavg": runs(10.0, 30.0), "a": runs(4.0, 6.0), "b": runs(1.0, None)}, {}))
    assert [row.mean("time_to_target_s") for row in table] == [20.0, 5.0, None]
    assert [row.speed_up and row.speed_up.mean for row in table] == [
        1.0,
        pytest.approx(12.5**0.5),
        None,
    ]  # of 2.5 and 5
    assert table[0].mean("uplink_mb_to_target") == 1.0 and table[2].mean("uplink_mb_to_target") is None
    found = {"fedavg@x": runs(10.0), "limit@x": runs(2.0), "a@x": runs(5.0), "fedavg@y": runs(1.0), "a@y": runs(0.5)}
    table = compare.rows(Outcome(found, {}))
    assert [row.speed_up.mean for row in table] == pytest.approx([1.0, 5.0, 2.0, 1.0, 2.0])
    assert [row.to_limit for row in table] == [5.0, 1.0, 2.5, None, None]


def test_time_to_an_accuracy_is_that_of_the_first_evaluation_that_shows_it():
    records = [
        Record.from_json(
            {"round": i, "accuracy": a, "sim_time_s": 2.0 * i, "uplink_bytes": 1_000_000, "downlink_bytes": 3_000_000}
        )
        for i, a in enumerate([0.1, None, 0.5, 0.4])
    ]
    assert compare.time_to(records, 0.3) == (4.0, 3.0, 9.0) and compare.time_to(records, 0.6) is None


POPULATIONS = """populations:
  mixed: [clients.profiles=mixed]
  thin: [clients.profiles=thin, clients.variation=0.5, network.bill=both]
"""


def same_folder(one, other):
    """Whether two runs left the same results."""
    names = ("config.yaml", "clients.csv", "rounds.jsonl", "summary.json", "model.safetensors")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["clients.dropout=0.4", "network.downlink_bits=4"],
        ["stop_at_target=true", "target=0.5", "rounds=9"],
    ],
)
def test_what_ignores_time_trains_once_and_leaves_what_training_anew_would(changes, tmp_path):
    stopping = "stop_at_target=true" in changes
    changes = changes if stopping else [*changes, "train.local_epochs=1"]
    runs = {
        "uniform": ["strategy.name=uniform", "strategy.bits=2.5", *changes],
        "eden": ["strategy.name=eden", "strategy.bits=1", *changes],
        "fedlq": ["strategy.name=fedlq", "strategy.probe_samples=32", *changes],
        "fedavg": ["strategy.name=fedavg", *changes],
        "limit": ["strategy.name=fedavg", "network.uplink_free=true", *changes],
    }
    trained = []
    (tmp_path / "s.yaml").write_text(f"{BASE}runs: {json.dumps(runs)}\n{POPULATIONS}targets: [0.15]")

    def start(config, parent):
        trained.append(config.name)
        simulate(config, parent=parent)

    comparison = load(tmp_path / "s.yaml")
    found = run(comparison, tmp_path / "out", in_turn(start), lambda line: None)
    assert trained == ["s-uniform-mixed", "s-eden-mixed", "s-fedlq-mixed", "s-fedlq-thin", "s-fedavg-mixed"]
    recomputed = {label: config for label, (config,) in comparison.runs.items() if config.name not in trained}
    assert len(recomputed) == 5
    for label, config in recomputed.items():
        simulate(config.model_copy(update={"out": f"anew/{label}-0"}))
        assert same_folder(tmp_path / "out" / f"{label}-0", tmp_path / "anew" / f"{label}-0"), label
    origin = json.loads((tmp_path / "out/limit@thin-0/timing.json").read_text())["reclocked_from"]
    assert (tmp_path / "out/limit@thin-0" / origin / "summary.json").samefile("out/fedavg@mixed-0/summary.json")
    thin, mixed = found.runs["eden@thin"][0], found.runs["eden@mixed"][0]
    assert thin.summary["sim_time_s"] != mixed.summary["sim_time_s"]
    assert thin.config.clients.profiles == "thin" and "profiles: thin" in load_config(tmp_path / "out/eden@thin-0")
    assert (1 < len(thin.records) < 9) if stopping else len(thin.records) == 3
    for row in compare.rows(found):
        first = compare.time_to(found.runs[row.run][0].records, 0.15)
        told = row.targets["0.15"]
        assert (told.seeds, told.seconds.mean, told.mb) == ((1, *first[:2]) if first else (0, None, None))
    if stopping:
        assert len(compare.plot(found, tmp_path / "a.png")) == 2 and (tmp_path / "a@thin.png").exists()
    (tmp_path / "out/eden@thin-0/summary.json").unlink()  # cut short: taken up from the finished one
    assert run(comparison, tmp_path / "out", in_turn(start), lambda line: None).runs == found.runs and len(trained) == 5


def test_tuning_chooses_by_each_populations_own_clock_and_trains_once(tmp_path):
    told = []
    text = "runs: {a: [strategy.name=eden, strategy.bits=1]}\ntune: {train.lr: [0.0001, 0.1]}\n" + POPULATIONS
    found = sweep(tmp_path, text, told)
    assert set(found.tuned) == {"a@mixed", "a@thin"}
    assert sum("only its times are recomputed" in line for line in told) == 3
    tried = [
        json.loads((tmp_path / f"out/tune/a@{p}/train.lr=0.1/summary.json").read_text()) for p in ("mixed", "thin")
    ]
    assert tried[0]["weights_sha256"] == tried[1]["weights_sha256"]
    assert tried[0]["sim_time_s"] != tried[1]["sim_time_s"]


def test_a_users_own_strategy_is_clocked_anew_only_if_it_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "own_timeless.py").write_text(
        "from fedlq_ray.strategies.fedavg import FedAvg\n"
        "class Silent(FedAvg): pass\nclass Sworn(FedAvg): timeless = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["fedavg", "fedlq", "own_timeless:Silent", "own_timeless:Sworn"]
    found = [reclock.reclockable(load_settings(None, [f"strategy.name={name}"])) for name in names]
    assert found == [True, False, False, True]
    coded = ["network.downlink_bits=1"]
    for timed in (["train.adaptive_work=4"], coded):
        assert not reclock.reclockable(load_settings(None, ["strategy.name=fedavg", *timed]))


def test_the_table_carries_what_made_it_and_a_failure_is_exit_code_1(tmp_path):
    (tmp_path / "s.yaml").write_text(BASE + "runs: {bad: [train.lr=1000, rounds=20], good: []}")
    command = [sys.executable, "-m", "fedlq_ray.cli", "sweep", "s.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "1 of the sweep's runs" in done.stderr and "1 of 1" in done.stdout
    assert (tmp_path / "runs/s/accuracy.png").exists()
    table = json.loads((tmp_path / "runs/s/table.json").read_text())
    assert table["sweep"].startswith("base:") and table["command"] == "fedlq sweep s.yaml"
    assert {"commit", "machine", "versions"} < set(table) and [r["failed"] for r in table["rows"]] == [1, 0]


def test_a_sweep_in_any_folder_finds_its_parent_in_mlflow_again(tmp_path, monkeypatch):
    folder = tmp_path / "o'brien?"
    folder.mkdir()
    monkeypatch.chdir(folder)
    tracked = BASE.replace("{uri: null}", "{experiment: e}")

    def runs(names):
        (folder / "s.yaml").write_text(tracked + f"runs: {names}\n", encoding="utf-8")
        start = in_turn(lambda config, parent: run_or_resume(config, parent=parent))
        return run(load("s.yaml"), Path("out"), start, [].append)

    runs("{a: []}")
    rest = runs("{b: [], a: []}")
    database = sqlite3.connect("mlflow.db")
    parents = database.execute(
        "select value, count(*) from tags where key = 'mlflow.parentRunId' group by value"
    ).fetchall()
    assert [count for _, count in parents] == [2]
    assert database.execute("select name from runs where run_uuid = ?", (parents[0][0],)).fetchall() == [("s",)]
    database.close()
    for finished in rest.runs.values():
        assert str(tmp_path) not in (finished[0].folder / "tracking.json").read_text(encoding="utf-8")


def test_a_sweep_is_refused_where_one_of_its_runs_could_not_be_tracked(tmp_path):
    started = []
    (tmp_path / "s.yaml").write_text(BASE + "runs: {a: [], b: [tracking.uri=mlruns]}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="^tracking.uri: 'mlruns': MLflow has no stores in folders"):
        run(load("s.yaml"), Path("out"), lambda configs, parent: started.extend(configs) or [], [].append)
    assert not started and not Path("out").exists()
