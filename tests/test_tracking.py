"""MLflow: a server that is down or hangs costs no result, and what it missed can be logged later."""

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from faults import in_child
from safetensors.torch import load_file

from fedlq_ray import ClientError, FedLQError, cli, resume, rundir, simulate, tracking
from fedlq_ray.config import load
from fedlq_ray.rundir import journal
from fedlq_ray.simulation import Terminated

FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]
QUICK = ["rounds=3", "clients.hosting=serial", "clients.count=8", "clients.cohort=4"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*overrides):
    return simulate(load(None, [*QUICK, *overrides]))


def rows(query):
    return sqlite3.connect("mlflow.db").execute(query).fetchall()


def test_layers_of_any_name_have_metrics():
    from mlflow.utils.validation import _validate_metric_name

    for layer in ("(root)", "(root).buffers", "block.0.conv+1", "été"):
        _validate_metric_name(tracking._metric("bits_per_parameter", layer))
    assert tracking._metric("significance", "block.0.conv-1") == "significance/block.0.conv-1"


def test_a_run_is_there_with_its_files_its_pictures_and_its_data():
    result = run()
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
        if event.get("record", {}).get("round") == 2:
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


@pytest.mark.parametrize("hangs", [False, True], ids=["down", "hangs"])
def test_a_server_that_does_not_answer_costs_seconds_and_no_result(hangs):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if hangs:
            server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.warns(UserWarning, match="fedlq sync"):
            result = run(f"tracking.uri={uri}")
        assert time.monotonic() - start < 60
    plain = run("tracking.uri=null")
    for name in ("rounds.jsonl", "summary.json"):
        assert (result.path / name).read_bytes() == (plain.path / name).read_bytes()
    where = json.loads((result.path / "tracking.json").read_text())
    (result.path / "tracking.json").write_text(json.dumps(where | {"uri": f"sqlite:///{Path.cwd()}/mlflow.db"}))
    counts = []
    for _ in range(2):
        subprocess.run([*FEDLQ, "sync", str(result.path)], check=True, capture_output=True)
        counts.append([rows(f"select count(*) from {table}") for table in ("runs", "metrics", "inputs", "params")])
    assert counts[0] == counts[1] and counts[0][0] == [(1,)] and counts[0][1][0][0] > 20
    assert rows("select status from runs") == [("FINISHED",)]
    client = tracking.connect(f"sqlite:///{Path.cwd()}/mlflow.db")
    (run_id,) = rows("select run_uuid from runs")[0]
    assert "model/MLmodel" in {file.path for file in client.list_artifacts(run_id, "model")}


@pytest.mark.parametrize("during", ["rounds", "end"])
def test_a_second_interrupt_leaves_at_once_while_mlflow_hangs(during):
    second = []

    def interrupt():
        second.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    def stop(event):
        if "record" in event and not second:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(1, interrupt).start() if during == "end" else interrupt()

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        config = load(
            None, [*QUICK, "rounds=99", "out=cut", f"tracking.uri=http://127.0.0.1:{server.getsockname()[1]}"]
        )
        with pytest.warns(UserWarning, match="did not answer for 2 s.; fedlq sync"), pytest.raises(KeyboardInterrupt):
            simulate(config, watch=stop)
        assert time.monotonic() - second[0] < 8
    assert json.loads(Path("cut/timing.json").read_text())["status"] == "KILLED"


@pytest.mark.parametrize("status", [500, 429, 404])
def test_a_server_that_answers_with_errors_costs_seconds_and_no_result(status, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "_WAIT_S", 5)

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Retry-After", "600")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_PATCH = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        start = time.monotonic()
        uri = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(sys, "argv", ["fedlq", "run", *QUICK, "out=here", f"tracking.uri={uri}"])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            warnings.simplefilter("default")
            cli.main()
        assert time.monotonic() - start < 60
        server.shutdown()
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning:")]
    assert ended.value.code == 0 and "fedlq sync here" in warning
    where = rundir.read(Path("here")).tracking
    Path("here/tracking.json").write_text(json.dumps(asdict(where) | {"uri": f"sqlite:///{Path.cwd()}/mlflow.db"}))
    require_complete("here", 3)


def require_complete(folder, rounds):
    """`fedlq sync` completes a run in the store of this folder."""
    assert CliRunner().invoke(cli.cli, ["sync", folder]).exit_code == 0
    assert rows("select status from runs") == [("FINISHED",)]
    assert rows("select count(*) from metrics where key = 'train_loss'") == [(rounds,)]


def logged():
    """Rounds that MLflow has of a run that is going on."""
    with contextlib.suppress(sqlite3.OperationalError):  # no such table yet
        return rows(
            "select count(*) from metrics join runs using (run_uuid) where status = 'RUNNING' and key = 'train_loss'"
        )[0][0]
    return 0


def wait_until(true):
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    assert true()


@pytest.fixture
def mlflow_server(monkeypatch):
    """Starts MLflow's own server on a port, with a store in this folder."""
    from mlflow.server import app, handlers
    from werkzeug.serving import make_server

    tracking.connect("sqlite:///mlflow.db").search_experiments()  # makes the store
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{Path.cwd()}/mlflow.db")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", f"{Path.cwd()}/mlruns")
    monkeypatch.setattr(handlers, "_tracking_store", None)
    servers = []

    def start(port):
        servers.append(make_server("127.0.0.1", port, app, threaded=True))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("back", [True, False], ids=["and back", "for good"])
def test_a_server_that_is_lost_in_mid_run_costs_no_result(back, mlflow_server):
    server = mlflow_server(0)
    uri = f"http://127.0.0.1:{server.server_port}"

    def lose(event):
        if event.get("record", {}).get("round") == 1:
            wait_until(logged)
            server.shutdown()
            server.server_close()
        if event.get("record", {}).get("round") == 3 and back:
            time.sleep(3)  # more than MLflow's client waits until it tries again
            mlflow_server(server.server_port)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        start = time.monotonic()
        result = simulate(load(None, [*QUICK, "rounds=6", "out=lost", f"tracking.uri={uri}"]), watch=lose)
    assert time.monotonic() - start < 60
    (warning,) = [str(warning.message) for warning in told if warning.category is UserWarning]
    assert f"MLflow at {uri} failed" in warning and warning.endswith("fedlq sync lost")
    assert 0 < logged() < 6
    plain = run("rounds=6", "tracking.uri=null")
    assert (result.path / "rounds.jsonl").read_bytes() == (plain.path / "rounds.jsonl").read_bytes()
    if back:
        require_complete("lost", 6)
    else:
        failed = CliRunner().invoke(cli.cli, ["sync", "lost"]).exception
        assert isinstance(failed, FedLQError) and str(failed).startswith(f"MLflow at {uri} failed")


def test_a_run_that_was_left_running_by_a_kill_is_put_right():
    def kill(event):
        if event.get("record", {}).get("round") == 1:
            wait_until(logged)
            os.kill(os.getpid(), signal.SIGKILL)

    more = ["rounds=5", "out=cut", "checkpoint.every_rounds=1"]
    assert in_child(lambda: simulate(load(None, [*QUICK, *more]), watch=kill)) == -signal.SIGKILL
    assert rows("select status from runs") == [("RUNNING",)]
    resume("cut")
    assert rows("select status from runs") == [("FINISHED",)]
    assert rows("select count(*) from metrics where key = 'train_loss'") == [(5,)]


@pytest.mark.parametrize("locked_s", [1, 20])
def test_a_locked_store_delays_a_run_by_a_bounded_time(locked_s, monkeypatch):
    """Locked before the run begins: 1 s is waited out, more than the longest wait is not, and a sync makes good."""
    run("rounds=1", "out=first")  # makes the store
    monkeypatch.setattr(tracking, "_WAIT_S", 8)
    lock = sqlite3.connect("mlflow.db", isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    free = threading.Timer(locked_s, lock.rollback)
    free.start()
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = run("out=second")
    assert time.monotonic() - start < 30
    assert len([w for w in told if "fedlq sync" in str(w.message)]) == (locked_s == 20)
    free.join()
    subprocess.run([*FEDLQ, "sync", "second"], check=True, capture_output=True)
    count = rows("select count(*) from metrics join runs using (run_uuid) where key = 'train_loss'")
    assert count == [(1 + len(result.history),)]
    assert rows("select status from runs") == [("FINISHED",)] * 2


def test_ui_finds_the_store_of_the_runs():
    from fedlq_ray.cli import _store
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
    code = "from fedlq_ray import tracking; tracking.connect('sqlite:///mlflow.db').search_experiments()"
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    assert tracking.connect("sqlite:///mlflow.db").search_experiments()


def test_runs_that_start_at_once_have_one_parent():
    code = """
import sys
from fedlq_ray import tracking
uri = tracking.absolute("sqlite:///mlflow.db")
client = tracking.connect(uri)
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
    assert [process.wait(timeout=200) for process in both] == [0, 0, 0]
    assert rows("select count(*) from runs") == [(1,)]


def test_the_same_relative_store_in_two_folders_is_two_stores(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run(f"tracking.experiment={name}")
        found = tracking.connect("sqlite:///mlflow.db").search_experiments(filter_string="name != 'Default'")
        assert [experiment.name for experiment in found] == [name]


def test_every_metric_and_tag_is_documented_with_its_unit():
    run("strategy.name=fedlq", "strategy.probe_every=1", "strategy.probe_samples=64", "target_accuracy=0.05")
    told = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
    documented = set(re.findall(r"^\| `([\w/]+)` \| [^|]+ \|", told, re.MULTILINE))
    logged = {re.sub(r"/.*", "/LAYER", key) for (key,) in rows("select distinct key from metrics")}
    assert logged == documented
    tags = {key for (key,) in rows("select key from tags") if key.startswith("fedlq.")} - {"fedlq.run_key"}
    assert tags <= set(re.findall(r"`(fedlq\.\w+)`", told)) and len(tags) == 6


def test_the_list_reads_well_and_the_model_loads(tmp_path):
    result = simulate(load(None, [*QUICK, "name=cmp-fedlq", "seed=3", "strategy.name=fedlq"]), parent="x/cmp")
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
