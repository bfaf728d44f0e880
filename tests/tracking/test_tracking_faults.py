"""MLflow: a server that is down or hangs costs no result, and what it missed can be logged later."""

import contextlib
import http.server
import json
import os
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
from click.testing import CliRunner
from faults import in_child, round_of
from tracked import QUICK, rows, run

from fedlq_ray import FedLQError, resume, simulate
from fedlq_ray.cli import main as cli
from fedlq_ray.config.load import load
from fedlq_ray.federation.events import RoundDone
from fedlq_ray.runs import rundir
from fedlq_ray.tracking import log as tracking
from fedlq_ray.tracking import stores

pytestmark = pytest.mark.usefixtures("own_folder")

FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]


@pytest.mark.parametrize("hangs", [False, True], ids=["down", "hangs"])
def test_a_server_that_does_not_answer_costs_seconds_and_no_result(hangs):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if hangs:
            server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.warns(UserWarning, match="fedlq sync"):
            result = run(f"tracking.uri={uri}", f"tracking.log_model={str(hangs).lower()}")
        assert time.monotonic() - start < 60
    plain = run("tracking.uri=null")
    for name in ("rounds.jsonl", "summary.json"):
        assert (result.path / name).read_bytes() == (plain.path / name).read_bytes()
    where = json.loads((result.path / "tracking.json").read_text())
    (result.path / "tracking.json").write_text(json.dumps(where | {"uri": f"sqlite:///{Path.cwd()}/mlflow.db"}))
    counts = []
    for _ in range(2):
        assert CliRunner().invoke(cli.cli, ["sync", str(result.path)]).exit_code == 0
        counts.append([rows(f"select count(*) from {table}") for table in ("runs", "metrics", "inputs", "params")])
    assert counts[0] == counts[1] and counts[0][0] == [(1,)] and counts[0][1][0][0] > 20
    assert rows("select status from runs") == [("FINISHED",)]
    client = stores.connect(f"sqlite:///{Path.cwd()}/mlflow.db")
    (run_id,) = rows("select run_uuid from runs")[0]
    assert hangs == ("model/MLmodel" in {file.path for file in client.list_artifacts(run_id, "model")})


@pytest.mark.parametrize("during", ["rounds", "end"])
def test_a_second_interrupt_leaves_at_once_while_mlflow_hangs(during):
    second = []

    def interrupt():
        second.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    def stop(event):
        if isinstance(event, RoundDone) and not second:
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

    stores.connect("sqlite:///mlflow.db").search_experiments()  # makes the store
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
        if round_of(event) == 1:
            wait_until(logged)
            server.shutdown()
            server.server_close()
        if round_of(event) == 3 and back:
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
        if round_of(event) == 1:
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
    lock.close()
    subprocess.run([*FEDLQ, "sync", "second"], check=True, capture_output=True)
    count = rows("select count(*) from metrics join runs using (run_uuid) where key = 'train_loss'")
    assert count == [(1 + len(result.history),)]
    assert rows("select status from runs") == [("FINISHED",)] * 2
