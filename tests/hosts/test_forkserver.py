"""The fork server: what a forked worker is, who ends whom, and that nothing stays behind."""

import functools
import os
import resource
import shlex
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from fedlq_ray.hosts.ray import forkserver, stub

pytestmark = pytest.mark.skipif(stub.command() is None, reason="forks on Linux alone")
SCRIPT = """
import os, sys, time
assert os.getpgid(0) == os.getpid() or os.environ["MARK"] == "x"
print(os.getpid(), os.getppid(), "torch" in sys.modules, sys.argv[1:], os.environ["MARK"], os.getcwd(), flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


def _raylet():
    """A process that stands for the raylet: the server and the workers end with it."""
    process = subprocess.Popen(["sleep", "600"])
    process.workers = []
    yield process
    process.kill()
    process.wait()
    for worker in process.workers:
        worker.stdout.close()
        worker.wait(30)


raylet = pytest.fixture(_raylet)
# Of tests that leave its server as it is: one imports Ray and PyTorch for four seconds.
shared = pytest.fixture(_raylet, scope="module")


def start(tmp_path, raylet, seconds, code, files=None):
    script = tmp_path / "worker.py"
    if not script.exists():  # another worker may be reading it
        script.write_text(SCRIPT)
    environment = {**os.environ, "RAY_RAYLET_PID": str(raylet.pid), "MARK": "here"}
    command = [*shlex.split(stub.command()), str(script), str(seconds), str(code)]
    limited = files and functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, files)
    worker = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path, preexec_fn=limited
    )
    raylet.workers.append(worker)
    return worker


def told(worker):
    """What a worker prints: its pid, its parent's, and the rest."""
    pid, parent, rest = worker.stdout.readline().split(" ", 2)
    return int(pid), int(parent), rest.strip()


def gone(pid, seconds=20.0):
    """Whether a process has ended, or is about to within these seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_a_worker_is_forked_with_torch_its_own_environment_and_exit_code(tmp_path, shared):
    first, second = start(tmp_path, shared, 0.5, 7), start(tmp_path, shared, 0.0, 0)
    (pid, parent, rest), (other, its_parent, _) = told(first), told(second)
    assert parent == its_parent and len({pid, other, first.pid, second.pid}) == 4
    assert rest == f"True ['0.5', '7'] here {tmp_path}"
    assert (first.wait(30), second.wait(30)) == (7, 0) and gone(pid)


def test_forked_workers_draw_different_ids_of_ray(tmp_path, shared):
    """Two that draw the same ids collide in Ray's object store, and one of them dies."""
    (tmp_path / "worker.py").write_text(
        "import os, sys\n"
        "loaded = 'ray' in sys.modules\n"
        "from ray._raylet import ActorClassID\n"
        "print(os.getpid(), os.getppid(), loaded, ActorClassID.from_random().hex())\n"
    )
    workers = [start(tmp_path, shared, 0.0, 0) for _ in range(3)]
    parents, rests = zip(*(told(worker)[1:] for worker in workers), strict=True)
    ids = [rest.split()[1] for rest in rests]
    assert len(set(parents)) == 1 and len(set(ids)) == 3
    assert all(rest.startswith("True ") for rest in rests) and [worker.wait(30) for worker in workers] == [0] * 3


def test_a_killed_worker_ends_its_stub_and_a_killed_stub_its_worker(tmp_path, shared):
    one, other = start(tmp_path, shared, 60, 0), start(tmp_path, shared, 60, 0)
    one_pid, other_pid = told(one)[0], told(other)[0]
    os.kill(one_pid, signal.SIGKILL)
    assert one.wait(20) == 128 + signal.SIGKILL
    other.terminate()  # as Ray does with a process that it has started
    assert gone(other_pid)


def test_a_stub_that_has_no_other_files_knows_how_its_worker_ends(tmp_path, shared):
    """Its link to a server that runs is then the first free number, 3."""
    for code in (5, 6):
        worker = start(tmp_path, shared, 0.0, code)
        told(worker)
        assert worker.wait(30) == code


def test_a_server_that_is_killed_is_followed_by_another(tmp_path, raylet):
    worker = start(tmp_path, raylet, 60, 0)
    pid, server, _ = told(worker)
    os.kill(server, signal.SIGKILL)
    assert worker.wait(20) == 1  # its stub no longer knows how it ends, and says failure
    again = start(tmp_path, raylet, 0.0, 0)
    assert told(again)[1] != server and again.wait(30) == 0
    os.kill(pid, signal.SIGKILL)


def test_server_and_workers_end_with_the_raylet(tmp_path, raylet):
    worker = start(tmp_path, raylet, 60, 0)
    pid, server, _ = told(worker)
    raylet.kill()
    raylet.wait()
    assert gone(server) and gone(pid) and worker.wait(20) != 0
    assert not list(Path(stub.address(raylet.pid)).parent.glob(f"{raylet.pid}-*"))


def test_an_idle_server_ends(tmp_path, raylet):
    worker = start(tmp_path, raylet, 0.0, 0)
    _, server, _ = told(worker)
    assert worker.wait(30) == 0 and gone(server, forkserver.IDLE_S + 20)


def test_without_a_server_the_worker_is_an_ordinary_process(tmp_path):
    (tmp_path / "worker.py").write_text(SCRIPT)
    environment = {**os.environ, "MARK": "x"}
    environment.pop("RAY_RAYLET_PID", None)  # nobody says whose server to ask
    command = [*shlex.split(stub.command()), str(tmp_path / "worker.py"), "0", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert done.returncode == 3 and "False ['0', '3'] x" in done.stdout, done.stderr
    assert done.stdout.split()[1] == str(os.getpid())


def test_a_server_serves_more_workers_than_it_has_files_at_first(tmp_path, raylet):
    """And a worker has the limit that it would have had."""
    first = start(tmp_path, raylet, 20.0, 4, files=(24, 400))
    server = told(first)[1]
    others = [start(tmp_path, raylet, 1.0, 4) for _ in range(30)]
    assert {told(worker)[1] for worker in others} == {server}
    assert [worker.wait(30) for worker in others] == [4] * 30 and first.wait(60) == 4


def test_the_socket_of_a_long_temporary_folder_lies_elsewhere(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert len(stub.address(1234567)) < 100
