"""What MLflow has of a run, and that runs share a store."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from faults import round_of
from safetensors.torch import load_file
from tracked import QUICK, rows, run

from fedlq_ray import ClientError, ConfigError, resume, simulate
from fedlq_ray.cli import main as cli
from fedlq_ray.config.load import load
from fedlq_ray.federation.metrics import METRICS
from fedlq_ray.runs import rundir
from fedlq_ray.runs.interrupts import Terminated
from fedlq_ray.runs.rundir import journal
from fedlq_ray.tracking import log as tracking
from fedlq_ray.tracking import stores

pytestmark = pytest.mark.usefixtures("own_folder")

FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]


def test_layers_of_any_name_have_metrics():
    from mlflow.utils.validation import _validate_metric_name

    for layer in ("(root)", "(root).buffers", "block.0.conv+1", "été"):
        _validate_metric_name(tracking.named(f"bits_per_parameter/{layer}"))
    assert tracking.named("significance/block.0.conv-1") == "significance/block.0.conv-1"


def test_a_run_is_there_with_its_files_its_pictures_and_its_data():
    result = run("tracking.log_model=true")
    ((run_id, where),) = rows("select run_uuid, artifact_uri from runs")
    folder = Path(where.removeprefix("file://"))
    assert folder.is_relative_to(Path.cwd() / "mlruns")
    assert {f.name for f in folder.iterdir()} == {
        *("clients.csv", "rounds.jsonl", "summary.json", "timing.json", "model.safetensors", "config.yaml"),
        *("labels.png", "accuracy.png", "model"),
    }
    assert (folder / "model.safetensors").read_bytes() == (result.path / "model.safetensors").read_bytes()
    assert rows("select name from datasets") == [("digits",)]
    tags = dict(rows("select key, value from tags"))
    assert {"version.ray", "fedlq.config_sha256", "fedlq.run_key"} <= set(tags)
    keys = {key for (key,) in rows("select distinct key from metrics")}
    assert {"accuracy", "sim_time_s", "uplink_mb", "downlink_mb", "bits_per_parameter/fc1"} <= keys


def test_a_run_that_goes_on_runs_and_then_is_finished():
    def stop(event):
        if round_of(event) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        simulate(load(None, [*QUICK, "rounds=8", "out=cut"]), watch=stop)
    assert rows("select status from runs") == [("KILLED",)] and len(journal(Path("cut"))) < 8
    resume("cut", ["rounds=9"])
    assert rows("select status from runs") == [("FINISHED",)]
    assert rows("select value from tags where key = 'fedlq.resumed.rounds'") == [("9",)]
    assert rows("select count(*) from metrics where key = 'train_loss'") == [(9,)]


def test_runs_of_one_comparison_are_children_of_one_parent():
    for seed in (0, 1):
        simulate(load(None, [*QUICK, f"seed={seed}"]), parent="somewhere/cmp")
    parents = rows("select value from tags where key = 'mlflow.parentRunId'")
    assert len(parents) == 2 and len(set(parents)) == 1
    assert rows(f"select name, status from runs where run_uuid = '{parents[0][0]}'") == [("cmp", "FINISHED")]


def test_a_failed_run_is_marked_and_keeps_its_records():
    with pytest.raises(ClientError, match="training diverged"):
        run("train.lr=1000", "rounds=20", "out=here")
    assert rows("select status from runs") == [("FAILED",)]
    assert json.loads(Path("here/timing.json").read_text())["status"] == "FAILED"


def test_ui_finds_the_store_of_the_runs():
    Path("mlflow.db").unlink()
    from fedlq_ray.cli.main import _store
    from fedlq_ray.errors import ConfigError

    with pytest.raises(ConfigError, match=r"mlflow\.db: no such MLflow store"):
        _store(None)
    run(f"tracking.uri=sqlite:///{Path.cwd()}/elsewhere.db")
    assert _store(None) == _store("runs/demo-0") == f"sqlite:///{Path.cwd()}/elsewhere.db"
    assert _store("http://localhost:5000") == "http://localhost:5000"
    run("tracking.uri=null", "out=apart")
    with pytest.raises(ConfigError, match="without tracking"):
        _store("apart")


def test_two_processes_may_make_a_store_at_the_same_time():
    Path("mlflow.db").unlink()
    code = "from fedlq_ray.tracking import stores; stores.connect('sqlite:///mlflow.db').search_experiments()"
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    assert stores.connect("sqlite:///mlflow.db").search_experiments()


def test_runs_that_start_at_once_have_one_parent():
    Path("mlflow.db").unlink()
    code = """
import sys
from fedlq_ray.tracking import stores, log as tracking
uri = stores.absolute("sqlite:///mlflow.db")
client = stores.connect(uri)
its = tracking.Tracking(uri, "fedlq", "key", 1, parent="here/both")
print("ready", flush=True)
sys.stdin.readline()
tracking._parent(client, its)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 3
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=200)
    assert [process.returncode for process in both] == [0, 0, 0]
    assert rows("select count(*) from runs") == [(1,)]


def test_the_same_relative_store_in_two_folders_is_two_stores(tmp_path, monkeypatch, new_store):
    Path("mlflow.db").unlink()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        if name == "second":  # the run makes the first one; another empty one does for the second
            shutil.copy(new_store, tmp_path / name / "mlflow.db")
        monkeypatch.chdir(tmp_path / name)
        run(f"tracking.experiment={name}")
        found = stores.connect("sqlite:///mlflow.db").search_experiments(filter_string="name != 'Default'")
        assert [experiment.name for experiment in found] == [name]


def test_every_metric_and_tag_is_documented_with_its_unit():
    run("strategy.name=fedlq", "strategy.probe_every=1", "strategy.probe_samples=32", "target=0.05")
    told = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    others = {"staleness", "lost_clients", "wasted_mb"}  # of runs in which a step does not wait for all
    documented = {metric.shown for metric in METRICS if not metric.of_names}  # those are of other problems
    logged = {re.sub(r"/.*", "/LAYER", key) for (key,) in rows("select distinct key from metrics")}
    assert logged == documented - others
    run("server.buffer=2")
    assert others <= {key for (key,) in rows("select distinct key from metrics")}
    tags = {key for (key,) in rows("select key from tags") if key.startswith("fedlq.")} - {"fedlq.run_key"}
    assert tags <= set(re.findall(r"`(fedlq\.\w+)`", told)) and len(tags) == 6


def test_the_list_reads_well_and_the_model_loads(tmp_path):
    result = simulate(
        load(None, [*QUICK, "name=cmp-fedlq", "seed=3", "strategy.name=fedlq", "tracking.log_model=true"]),
        parent="x/cmp",
    )
    ((run_id,),) = rows("select run_uuid from runs where name = 'cmp-fedlq-3'")
    ((note,),) = rows(f"select value from tags where key = 'mlflow.note.content' and run_uuid = '{run_id}'")
    assert f"accuracy {result.summary['final_accuracy']:.2%}" in note and "**fedlq** on digits" in note
    tracking.conclude(rundir.read(result.path).tracking, "the table", [result.path / "summary.json"])
    ((parent,),) = rows("select run_uuid from tags where key = 'mlflow.note.content' and value = 'the table'")
    assert rows(f"select name from runs where run_uuid = '{parent}'") == [("cmp",)]
    import mlflow
    from mlflow import pytorch

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    model = pytorch.load_model(f"runs:/{run_id}/model")
    weights = load_file(result.path / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_run_in_a_folder_of_any_name_is_found_compared_and_synced_also_when_it_is_moved(tmp_path, monkeypatch):
    folder, moved = tmp_path / "o'brien a?b#c%20[é]", tmp_path / "it's moved"
    folder.mkdir()
    monkeypatch.chdir(folder)
    simulate(load(None, QUICK), parent="it's \"any\" text; /it's `one`\n")
    for file in Path("runs/demo-0").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    noted = json.loads(Path("runs/demo-0/tracking.json").read_text(encoding="utf-8"))
    assert noted["uri"] == "sqlite:///../../mlflow.db"
    assert cli._store(None) == f"sqlite:///{folder}/mlflow.db"
    assert rows("select name from runs order by name") == [("demo-0",), ("it's `one`?",)]
    ((run_id,),) = rows("select run_uuid from runs where name = 'demo-0'")
    compared = CliRunner().invoke(cli.cli, ["compare", run_id, "--tracking-uri", "sqlite:///mlflow.db"])
    assert compared.exit_code == 0 and " demo " in compared.output
    folder.rename(moved)
    monkeypatch.chdir("/")
    for more in ([], ["--experiment", "it's another"], []):
        done = CliRunner().invoke(cli.cli, ["sync", str(moved / "runs/demo-0"), *more], catch_exceptions=False)
        assert done.exit_code == 0 and f"are in sqlite:///{moved}/mlflow.db" in done.output
    monkeypatch.chdir(moved)
    assert rows("select e.name, count(*) from runs r join experiments e using (experiment_id) group by e.name") == [
        ("fedlq", 2),
        ("it's another", 2),
    ]
    now = json.loads(Path("runs/demo-0/tracking.json").read_text(encoding="utf-8"))
    assert now == noted | {"experiment": "it's another"}
    wrong = CliRunner().invoke(cli.cli, ["sync", "runs/demo-0", "--uri", "mlruns"]).exception
    assert isinstance(wrong, ConfigError) and str(wrong).startswith("--uri: 'mlruns'")
    for command in (["compare", run_id], ["watch", run_id]):
        wrong = CliRunner().invoke(cli.cli, [*command, "--tracking-uri", "sqlite:///none.db"]).exception
        assert isinstance(wrong, ConfigError) and "none.db: no such MLflow store" in str(wrong)
    assert not Path("none.db").exists()


def test_a_run_that_another_version_began_is_read_with_its_absolute_store_and_parent(tmp_path):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("rounds: 3\n", encoding="utf-8")
    noted = {"uri": "sqlite:////srv/x.db", "experiment": "e", "run_key": "k", "started_ms": 1, "parent": "/srv/out/cmp"}
    Path("run/tracking.json").write_text(json.dumps(noted), encoding="utf-8")
    found = rundir.read("run").tracking
    assert (found.uri, found.parent, tracking._plain(found.parent)) == ("sqlite:////srv/x.db", *["/srv/out/cmp"] * 2)
    Path("run/tracking.json").write_text(json.dumps(noted | {"uri": "sqlite:///../x.db"}), encoding="utf-8")
    Path("aside/deep").mkdir(parents=True)
    rundir.move(Path("run"), Path("aside/deep/run"))
    assert rundir.read("aside/deep/run").tracking.uri == f"sqlite:///{tmp_path}/x.db"
