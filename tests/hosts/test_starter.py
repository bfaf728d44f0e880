"""Ray's processes and its workers fork from servers that start before it. Without them, Ray starts as it always did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlq_ray.hosts.ray import starter, stub

pytestmark = pytest.mark.skipif(stub.command() is None, reason="forks on Linux alone")
SCRIPT = """
import contextlib, json, os, signal, sys, time
import psutil
from fedlq_ray.hosts.ray import starter, stub

def seen():
    import ray
    with starter.forking():
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    class Told:
        def get(self):
            return os.getppid(), "torch" in sys.modules, os.environ["RAY_JOB_ID"]
    ours = ray.remote(Told).options(runtime_env={"py_executable": stub.command()}).remote()
    plain = ray.remote(Told).options(runtime_env={"env_vars": {"A": "b"}}).remote()
    found = ray.get([ours.get.remote(), plain.get.remote()])
    servers, end = {}, time.monotonic() + 30
    while mode != "not run" and 5 not in servers.values() and time.monotonic() < end:  # Ray's agents start last
        servers = {}
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # it ends meanwhile
                if "forkserver" in " ".join(child.cmdline()):
                    servers[child.pid] = len(child.children())
    ray.shutdown()
    return {"workers": found, "servers": servers}

mode = sys.argv[1]
if mode in ("fork", "threads"):
    import threading
    starter.start(workers=False)
    import torch
    done = threading.Event()
    if mode == "threads":
        threading.Thread(target=done.wait).start()
    starter.fork()
    done.set()
if mode == "killed":
    starter.start()
    os.kill(starter._started.ray, signal.SIGKILL)
if mode == "not run":
    starter.os.access = lambda *_: False
print(json.dumps([seen() for _ in range(2 if mode == "twice" else 1)]))
"""


def run(tmp_path, mode):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", mode]
    environment = {**os.environ, "PYTHONPATH": str(Path(starter.__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_processes_of_each_ray_of_a_program_are_forked(tmp_path):
    first, second = run(tmp_path, "twice")
    for found in (first, second):
        (ours, torch, job), (plain, _, _) = found["workers"]
        assert torch and ours == plain and job == "01000000"
        # Ray's: the monitor, the log's, the dashboard's, two agents; and the two workers.
        assert found["servers"].pop(str(ours)) >= 2 and 5 in found["servers"].values()
    assert all(second["servers"].get(server, 0) == 0 for server in first["servers"])  # each Ray has its own


def test_a_server_that_died_is_replaced_and_where_none_can_run_ray_starts_as_always(tmp_path):
    (found,) = run(tmp_path, "killed")
    assert found["workers"][0][1] and 5 in found["servers"].values()
    (found,) = run(tmp_path, "not run")
    (ours, torch, _), (plain, _, _) = found["workers"]
    assert torch and ours != plain and not set(found["servers"].values()) - {0}


def test_a_command_forks_the_workers_server_from_itself_unless_it_has_threads(tmp_path):
    (found,) = run(tmp_path, "fork")
    (ours, torch, job), (plain, _, _) = found["workers"]
    assert torch and ours == plain and job == "01000000"
    assert str(ours) not in found["servers"]  # its command line is the program's
    (found,) = run(tmp_path, "threads")
    (ours, torch, _), (plain, _, _) = found["workers"]
    assert torch and ours == plain and str(ours) in found["servers"]


def context(**changes):
    made = {"command_prefix": [], "env_vars": {"A": "b"}, "py_executable": sys.executable}
    made |= {"override_worker_entrypoint": None, "java_jars": []} | changes
    return [f"--serialized-runtime-env-context={json.dumps(made)}", "--language=PYTHON", "default_worker.py", "--x=1"]


@pytest.mark.parametrize("executable", [sys.executable, stub.command()])
def test_a_worker_gets_its_environment_and_arguments(executable):
    environment = {"B": "c"}
    wanted = stub._worker(context(py_executable=executable), environment, sys.executable)
    assert wanted == ["default_worker.py", "--x=1"]
    assert environment == {"A": "b", "B": "c"}


@pytest.mark.parametrize(
    "arguments",
    [
        context(py_executable="python3 -O"), context(command_prefix=["nice"]), context(env_vars={"A": "$HOME"}),
        context(override_worker_entrypoint="x"), [*context()[:1], "--language=CPP", "worker"], ["default_worker.py"],
        ["--serialized-runtime-env-context={", "--language=PYTHON", "default_worker.py"],
        ["--serialized-runtime-env-context={}", "--language=PYTHON", "default_worker.py"],
    ],
)  # fmt: skip
def test_what_is_not_ours_to_start_is_left_to_ray(arguments):
    environment = {}
    assert stub._worker(arguments, environment, sys.executable) == [] and environment == {}
