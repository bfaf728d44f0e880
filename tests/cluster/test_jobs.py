"""Jobs of a real cluster, started as people start one: `ray start`, a second node, tokens, `fedlq submit`."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from fedlq_ray import simulate
from fedlq_ray.config.load import load

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]
FULL = pytest.mark.skipif("FEDLQ_CLUSTER" not in os.environ, reason="takes minutes; FEDLQ_CLUSTER=1 runs it")
FEDLQ = [sys.executable, "-m", "fedlq_ray.cli"]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
CONFIG = "name: small\nrounds: 3\nclients: {count: 5, cohort: 3, hosting: packed, actors: 2}\n"
LONG = 30  # rounds of a run that is stopped: it takes a second for each until the file `fast` is there
SLOW = """
import time
from pathlib import Path

from fedlq_ray.strategies import Strategy


class Slow(Strategy):
    def __init__(self, context, fast):
        self.context, self.fast = context, Path(fast)

    def plan(self, state, round, cohort):
        time.sleep(0 if self.fast.exists() else 1)
        return {m.client: self.context.at_levels([4] * len(self.context.quantized)) for m in cohort}
"""


def free_ports(count):
    """Below those that connections are given, and above those of Ray's workers: they stay free until they are used."""
    found = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            tried, port = held.enter_context(socket.socket()), 20_000 + secrets.randbelow(12_000)
            with contextlib.suppress(OSError):
                tried.bind(("127.0.0.1", port))
                found.append(port)
    return found


class Cluster:
    """A head and a second node that does not see the folder `private`; both end with the processes started here."""

    def __init__(self, folder):
        self.folder, self.private = folder, folder / "private"
        self.private.mkdir()
        (folder / "home").mkdir()
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "HOME": str(folder / "home")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **own, "PATH": path, "RAY_ADDRESS": "", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        self.processes, self.logs = [], {}

    def start(self):
        for left in (2, 1, 0):  # Ray chooses ports of its own beside these, and ends where another has taken one
            self._start_head()
            ended = self.ended_before(lambda: self.jobs() is not None)
            if not ended:
                break
            assert left, ended
            self.close()

    def _start_head(self):
        self.port, dashboard, agent, client = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        ports = {"": self.port, "dashboard-": dashboard, "dashboard-agent-listen-": agent, "ray-client-server-": client}
        named = [f"--{name}port={port}" for name, port in ports.items()]
        self.processes = [self._start("--head", *named, f"--temp-dir={self.folder}/r")]

    def add_node(self):
        blind = f'mount -t tmpfs none {self.private} && exec "$@"'
        before = ["unshare", "--mount", "sh", "-c", blind, "sh"] if os.geteuid() == 0 else []
        node = [f"--address=127.0.0.1:{self.port}", f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
        self.processes.append(self._start(*node, before=before))

    def _start(self, *options, before=()):
        said = self.folder / f"ray-{time.monotonic_ns()}.log"
        command = [*before, *RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options]
        with said.open("w") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.logs[process] = said
        return process

    def ended_before(self, condition):
        """Waits for the condition; what `ray start` said, where that ends before."""
        end = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < end, "the cluster did not start"
            if ended := [process for process in self.processes if process.poll() is not None]:
                return f"ray start ended: {self.logs[ended[0]].read_text()[-2000:]}"
            time.sleep(0.5)
        return None

    def call(self, *command, **options):
        return subprocess.run(
            command, env=self.environment, cwd=self.folder / "project", capture_output=True, text=True, timeout=400,
            check=False, **options,
        )  # fmt: skip

    def submit(self, *arguments, **options):
        return self.call(*FEDLQ, "submit", *arguments, "--address", self.address, **options)

    def ask(self, path):
        """What the dashboard answers; None while it does not."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.address + path, headers=token), timeout=30
            ) as answer:
                return json.load(answer)
        except OSError:
            return None

    def jobs(self):
        """Each job's status by its id."""
        found = self.ask("/api/jobs/")
        return None if found is None else {job["submission_id"]: job["status"] for job in found if job["submission_id"]}

    def nodes(self):
        return len(((self.ask("/nodes?view=summary") or {}).get("data") or {}).get("summary") or [])

    def close(self):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):  # what it has left behind
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="fq-", dir="/tmp"))  # short: the paths of sockets are at most 107 bytes
    project = folder / "project"
    project.mkdir()
    (project / "small.yaml").write_text(CONFIG)
    (project / "slow.py").write_text(SLOW)
    started = Cluster(folder)
    try:
        started.start()
        yield started
    finally:
        started.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def expected(cluster):
    """weights_sha256 of this configuration without a cluster."""
    settings = [f"out={cluster.folder}/serial", "clients.hosting=serial", "tracking.uri=null"]
    return simulate(load(cluster.folder / "project/small.yaml", settings)).summary["weights_sha256"]


def sha256(folder):
    return json.loads((Path(folder) / "summary.json").read_text())["weights_sha256"]


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["small.yaml", "roundss=1"], None, "did you mean rounds?"),
        (["small.yaml", "--driver", "CPU"], None, "--driver CPU: must be a resource and an amount"),
        (["--attach", "other-1"], None, "Job other-1 does not exist"),
        (["small.yaml"], "ab" * 32, "authentication failed"),
        (["small.yaml"], "", "authentication required"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_before_anything_is_submitted(arguments, token, message, cluster):
    before = cluster.jobs()
    environment = cluster.environment if token is None else {**cluster.environment, "RAY_AUTH_TOKEN": token}
    if token == "":
        environment.pop("RAY_AUTH_MODE")
    command = [*FEDLQ, "submit", *arguments, "--address", cluster.address]
    cwd = cluster.folder / "project"
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2 and cluster.jobs() == before


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_without_a_server_a_line_says_so(address, tmp_path):
    done = subprocess.run(
        [*FEDLQ, "submit", "--address", address], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith(f"error: --address {address}: "), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_is_submitted_shown_and_fetched_and_its_name_is_then_taken(cluster, expected):
    done = cluster.submit("small.yaml")
    assert done.returncode == 0, done.stderr
    project = cluster.folder / "project"
    assert "small-0 round 3/3" in done.stderr and "small-1: results in runs/small-0" in done.stdout
    assert sha256(project / "runs/small-0") == expected
    assert json.loads((project / "runs/small-0/tracking.json").read_text())["uri"] == "sqlite:///../../mlflow.db"
    assert (project / "mlflow.db").exists()
    again = cluster.submit("small.yaml")
    assert again.returncode == 2 and "small-1 has succeeded, and its results are on a single node" in again.stderr
    fetched = cluster.submit("--attach", "small-1")
    assert fetched.returncode == 0 and "results in runs/small-0-2" in fetched.stdout, fetched.stderr
    assert set(cluster.jobs().values()) == {"SUCCEEDED"}


@FULL
def test_a_failed_run_gives_its_exit_code(cluster):
    done = cluster.submit("small.yaml", "name=fails", "train.lr=1000", "rounds=20", "tracking.uri=null")
    assert done.returncode == 1 and "training diverged" in done.stderr
    assert "fails-1: failed, exit code 1; results in runs/fails-0" in done.stderr


def wait_for(file, seconds=300):
    end = time.monotonic() + seconds
    while not file.exists() or not file.stat().st_size:
        assert time.monotonic() < end, f"no {file}"
        time.sleep(0.3)


def test_a_stopped_run_goes_on_where_its_results_lie_on_shared_storage(cluster, monkeypatch):
    """`ray job stop`, and Ctrl-C answered with yes; the third attempt ends with the bytes of an undisturbed run."""
    out, store, fast = cluster.folder / "shared/run", cluster.folder / "mlflow.db", cluster.folder / "fast"
    slow = ["small.yaml", "name=shared", f"rounds={LONG}", "strategy.name=slow:Slow", f"strategy.args.fast={fast}"]
    arguments = [*slow, f"out={out}", f"tracking.uri=sqlite:///{store}", "checkpoint.every_rounds=1"]

    def in_mlflow():
        with contextlib.closing(sqlite3.connect(store)) as database:
            return database.execute("select status from runs").fetchall()

    command = [*FEDLQ, "submit", *arguments, "--address", cluster.address]
    options = {"env": cluster.environment, "cwd": cluster.folder / "project", "text": True}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)

    first = subprocess.Popen(command, **options, **pipes)
    assert "submitted" in first.stderr.readline()
    busy = cluster.submit(*arguments)
    assert busy.returncode == 2 and re.search("shared-1 is (pending|running); wait for it", busy.stderr), busy.stderr
    wait_for(out / "rounds.jsonl")
    assert cluster.call(*RAY, "job", "stop", "--address", cluster.address, "shared-1").returncode == 0
    _, told = first.communicate(timeout=200)
    assert first.returncode == 143 and "shared-1: stopped" in told
    assert list((out / "checkpoints").iterdir()) and in_mlflow() == [("KILLED",)]

    second = subprocess.Popen(command, **options, **pipes)
    assert any("resumes after round" in line for line in second.stderr)
    second.send_signal(signal.SIGINT)
    _, told = second.communicate("y\n", timeout=300)
    assert second.returncode == 143 and "shared-2: stop it? [y/N]" in told, told

    fast.touch()
    third = cluster.submit(*arguments)
    assert third.returncode == 0 and f"shared-3: results in {out}" in third.stdout, third.stderr
    monkeypatch.syspath_prepend(cluster.folder / "project")
    alone = [*slow[1:], f"out={cluster.folder}/alone", "clients.hosting=serial", "tracking.uri=null"]
    simulate(load(cluster.folder / "project/small.yaml", alone))
    assert sha256(out) == sha256(cluster.folder / "alone") and in_mlflow() == [("FINISHED",)]
    other = cluster.submit(*arguments)
    assert other.returncode == 2 and "the run is finished" in other.stderr


@FULL
def test_rays_own_job_command_runs_it(cluster, expected):
    """As README.md has it, with what is installed on the nodes."""
    (cluster.folder / "home/bin").mkdir(exist_ok=True)
    fedlq = cluster.folder / "home/bin/fedlq"  # of this checkout, whatever is installed
    fedlq.write_text(f'#!/bin/sh\nexec {" ".join(FEDLQ)} "$@"\n')
    fedlq.chmod(0o755)
    out = cluster.folder / "plain"
    source = str(Path(__file__).parent.parent.parent)
    environment = json.dumps({"env_vars": {"PATH": f"{fedlq.parent}:{os.environ['PATH']}", "PYTHONPATH": source}})
    submit = [*RAY, "job", "submit", "--address", cluster.address, "--runtime-env-json", environment]
    run = ["--working-dir", ".", "--", "fedlq", "run", "small.yaml", f"out={out}", "tracking.uri=null"]
    done = cluster.call(*submit, *run)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert sha256(out) == expected


@FULL
def test_a_run_left_alone_goes_on_and_is_taken_up_later_with_its_driver_on_another_node(cluster, expected):
    """Also: results on storage that a node does not see are refused."""
    cluster.add_node()
    assert not cluster.ended_before(lambda: cluster.nodes() == 2)
    left = cluster.submit("small.yaml", "name=left", "--no-wait", "--driver", "CPU=1")
    assert left.returncode == 0 and "fedlq submit --attach left-1" in left.stdout
    done = cluster.submit("--attach", "left-1")
    assert done.returncode == 0, done.stderr
    where = re.search(r"results in (\S+)", done.stdout)[1]
    assert sha256(cluster.folder / "project" / where) == expected
    if os.geteuid() == 0:
        blind = cluster.submit("small.yaml", "name=blind", f"out={cluster.private}/run")
        assert blind.returncode == 2 and re.search(r"out: node \S+ does not see", blind.stderr), blind.stderr
