"""A server that imports modules once, and forks a ready process whenever Ray starts one.

A worker that imports torch itself uses about 150 MB of its own; forked workers share them. Ray starts `stub.py` instead
of Python; the stub has the server fork the process. There are two kinds of servers:

- of a raylet, started by its first stub: it forks workers. A cluster that others have started has these.
- of a session, started before Ray itself (`starter.py`): one that has imported Ray alone and forks Ray's own processes,
  and one that has imported PyTorch and this package, and forks workers.

The socket is in a folder that only the user can read. A server ends when its owner (the raylet, or the process that
started Ray) ends, or after a while without work. It imports Ray before it forks. It defines no actor: `ray.remote`
draws a random id, which seeds the generator of the process, and forked workers would then draw the same ids.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fedlq_ray.hosts.ray.stub import FORKED, LENGTH, PIPE, RAY

IDLE_S = 10.0  # time without work after which the server ends
_FIRST_S = 60.0  # the same, before the first process
_RAY = (
    "ray", "ray.autoscaler._private.monitor", "ray.autoscaler.v2.monitor", "ray._private.log_monitor",
    "ray._private.runtime_env.agent.main", "ray._private.runtime_env.agent.runtime_env_agent",
    "ray.dashboard.dashboard", "ray.dashboard.head", "ray.dashboard.agent", "grpc.aio",
    "ray.dashboard.http_server_agent",
)  # fmt: skip
_OF = ("RAY_RAYLET_PID", "RAY_JOB_ID")
# What actors need, except the modules that define them: see above.
_OURS = ("torch", "fedlq_ray.federation.rounds", "fedlq_ray.tracking.log")


class Forked(NamedTuple):
    """A forked process: the link to its stub, and the raylet with which it ends (or the server's owner)."""

    link: socket.socket
    raylet: int


def load(modules: tuple[str, ...]) -> None:
    """Imports what the forked processes need. Other versions of Ray may lack a module of Ray's own."""
    for name in modules:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a forked process would touch, and therefore copy, every object


def serve(listener: socket.socket, address: Path, owner: int) -> None:
    """Forks processes on request, until the owner ends or there was no work for a while."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))  # each process has a link
    signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes select
    _clear(address.parent)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    workers: dict[int, Forked] = {}
    end = time.monotonic() + _FIRST_S
    while time.monotonic() < end and _alive(owner):
        for event, _ in waiting.select(timeout=1.0):
            link: Any = event.fileobj
            if link is listener:
                _accept(listener, address, waiting, workers, files)
            else:  # a stub sends nothing more, so it has ended; its process must end too
                _kill(pid for pid, worker in workers.items() if worker.link is link)
                waiting.unregister(link)
        dead = {raylet for raylet in {worker.raylet for worker in workers.values()} if not _alive(raylet)}
        _kill(pid for pid, worker in workers.items() if worker.raylet in dead)
        _reap(waiting, workers)
        if workers:
            end = time.monotonic() + IDLE_S
    address.unlink(missing_ok=True)  # and the listener ends with this process, after it: no stub waits in vain
    _kill(workers)
    _clear(address.parent)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _clear(folder: Path) -> None:
    """Removes files of servers whose owners have ended."""
    for file in folder.iterdir():
        if not Path(f"/proc/{file.name.partition('-')[0]}").exists():
            file.unlink(missing_ok=True)


def _accept(
    listener: socket.socket,
    address: Path,
    waiting: selectors.BaseSelector,
    workers: dict[int, Forked],
    files: tuple[int, int],
) -> None:
    """Forks the process that a stub requests; a stub whose link is closed without a reply starts its process itself."""
    try:
        link, _ = listener.accept()
    except OSError:  # out of file descriptors: the stub waits until a process ends
        time.sleep(0.1)
        return
    link.settimeout(5.0)
    try:
        request, streams = _request(link)
    except (OSError, ValueError, struct.error):
        link.close()
        return
    pid = -1
    with contextlib.suppress(OSError):
        if address.suffix == RAY or _is_of(request["environment"]) and request["arguments"]:
            pid = os.fork()
    if pid == 0:
        for other in [listener, *(worker.link for worker in workers.values())]:
            other.close()
        _become(request, streams, link, files)
    for stream in streams:
        os.close(stream)
    if pid < 0:
        link.close()
        return
    link.settimeout(None)
    with contextlib.suppress(OSError):
        link.sendall(b"+")
    workers[pid] = Forked(link, int(request["environment"].get("RAY_RAYLET_PID", os.getpid())))
    waiting.register(link, selectors.EVENT_READ)


def _is_of(environment: Mapping[str, str]) -> bool:
    """Whether a worker is of the raylet and the job of this server, which are those of the first request.

    Ray reads these two when it is imported, and never again; so the server imports it with the first request.
    """
    if "ray" not in sys.modules:
        os.environ.update({name: environment.get(name, "") for name in _OF})
        load(("ray",))
    return all(os.environ[name] == environment.get(name, "") for name in _OF)


def _request(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receives a stub's request and its standard streams."""
    head, streams, _, _ = socket.recv_fds(link, LENGTH.size, 3)
    try:
        (length,) = LENGTH.unpack(head)
        data = b""
        while len(data) < length:
            piece = link.recv(length - len(data))
            if not piece:
                raise OSError("the stub has ended")
            data += piece
        return json.loads(data), streams
    except BaseException:
        for stream in streams:
            os.close(stream)
        raise


def _reap(waiting: selectors.BaseSelector, workers: dict[int, Forked]) -> None:
    while workers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        worker = workers.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(OSError):
            worker.link.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
        with contextlib.suppress(KeyError):
            waiting.unregister(worker.link)
        worker.link.close()


def _become(request: dict[str, Any], streams: list[int], link: socket.socket, files: tuple[int, int]) -> NoReturn:
    """Becomes the process that Ray meant to start: runs its script as __main__, with its arguments and environment."""
    import runpy

    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        os.setsid()  # Ray kills the process group of a worker that dies, so the group must hold only this worker
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        link.close()
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"], **{FORKED: "1"})
        with contextlib.suppress(ImportError, AttributeError):  # Ray has read its settings; they may be others here
            importlib.import_module("ray._raylet").Config.initialize("")
        sys.argv = request["arguments"]
        added = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        sys.path[:0] = [str(Path(sys.argv[0]).parent), *added]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main(address: str, owner: int, listener: int) -> None:
    """Runs a server for Ray's own processes, if the address says so, or for workers."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    os.environ.update(threads)  # no threads before a fork
    if address.endswith(RAY):
        os.environ[PIPE] = "1"
        load(_RAY)
    else:
        load(_OURS)
        importlib.import_module("torch").set_num_threads(1)
    serve(socket.socket(fileno=listener), Path(address), owner)


def become(address: str, owner: int, listener: socket.socket) -> NoReturn:
    """Turns this process, a fork of one that has imported what workers need, into their server."""
    try:
        os.setsid()
        for target, (file, flags) in enumerate(
            [(os.devnull, os.O_RDONLY), *[(f"{address}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)] * 2]
        ):
            opened = os.open(file, flags, 0o600)
            os.dup2(opened, target)
            os.close(opened)
        load(())
        importlib.import_module("torch").set_num_threads(1)
        serve(listener, Path(address), owner)
    finally:
        os._exit(0)
