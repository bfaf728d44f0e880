"""A server that imports PyTorch once, and forks a ready Ray worker whenever Ray starts one.

A worker that imports torch itself uses about 150 MB of its own; forked workers share them. Ray starts this file instead
of Python through its public `runtime_env: py_executable` (`placement.py`). The process that Ray starts is a stub: it
passes its arguments, environment and standard streams to the server, then becomes a shell of a few hundred kB that
waits for the worker to end.

Each raylet and package has one server, started by the first stub; its socket is in a folder that only the user can
read. The server ends when the raylet ends, or after a while without workers. It imports Ray before it forks, in the
environment of the raylet's first worker. It defines no actor: `ray.remote` draws a random id, which seeds the process's
generator, and forked workers would then draw the same ids. Only the standard library is imported at the top: the stub
runs without packages.
"""

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

FORKED = "FEDLQ_FORKED"  # set in a forked worker's environment
IDLE_S = 10.0  # time without a worker after which the server ends
_START_S = 60.0  # time that a stub waits for the server
_LENGTH = struct.Struct("<I")


def command() -> str | None:
    """Returns the value for Ray's `py_executable`; None if forking such a process is unsafe or impossible."""
    if sys.platform != "linux":
        return None
    import shlex  # here, so that a stub, which does not need it, starts faster

    return f"{shlex.quote(sys.executable)} -S -E -P {shlex.quote(__file__)} stub"


def _address(raylet: str) -> Path:
    base = tempfile.gettempdir()
    folder = Path(base if len(base) < 60 else "/tmp") / f"fedlq-fork-{os.getuid()}"  # socket paths: at most 107 bytes
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    key = f"{raylet} {sys.executable} {__file__}"
    # Not hash(), which differs between processes.
    return folder / f"{raylet}-{sum(i * b for i, b in enumerate(key.encode(), 1)):x}"


def stub(arguments: list[str]) -> NoReturn:
    """Has a worker forked, and waits for it to end; starts it as an ordinary process if forking fails."""
    link = None
    with contextlib.suppress(OSError, KeyError):
        raylet = os.environ["RAY_RAYLET_PID"]
        for _ in range(3):  # an idle server may end just as a stub connects
            link = _ask(_address(raylet), raylet, arguments)
            if link is not None:
                break
    if link is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    os.dup2(link.fileno(), 3)
    os.set_inheritable(3, True)  # dup2 does not set this if the descriptor was already 3
    # The server writes the exit status when the worker ends; if it closes without a status, it was killed.
    os.execv("/bin/sh", ["sh", "-c", "read status <&3; exit ${status:-1}"])


def _ask(address: Path, raylet: str, arguments: list[str]) -> socket.socket | None:
    """Returns a connection on which the server has confirmed that the worker runs, or None."""
    link = _connect(address) or _start(address, raylet)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    data = json.dumps(request).encode()
    try:
        socket.send_fds(link, [_LENGTH.pack(len(data))], [0, 1, 2])
        link.sendall(data)
        return link if link.recv(1) == b"+" else None
    except OSError:
        return None


def _connect(address: Path) -> socket.socket | None:
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(str(address))
        return link
    except OSError:
        link.close()
        return None


def _start(address: Path, raylet: str) -> socket.socket:
    """Starts the server, unless another stub does; returns a connection to it."""
    with address.with_suffix(".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        link = _connect(address)
        if link is not None:
            return link
        with address.with_suffix(".log").open("ab") as log:
            server = subprocess.Popen(
                [sys.executable, "-P", __file__, "serve", str(address), raylet],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + _START_S
        while time.monotonic() < end and server.poll() is None:
            link = _connect(address)
            if link is not None:
                return link
            time.sleep(0.05)
    raise OSError("the fork server did not start")


def serve(address: Path, raylet: int) -> None:
    """Forks workers on request, until the raylet ends or no worker has run for a while."""
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # no threads before a fork
    import gc
    import resource

    import ray  # noqa: F401
    import torch

    import fedlq_ray.federation.rounds
    import fedlq_ray.tracking.log  # noqa: F401  (what actors need, except the modules that define them: see above)

    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))  # each worker has a link
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection in a worker would touch, and therefore copy, every object
    signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes select
    _clear(address.parent)
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(1024)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    workers: dict[int, socket.socket] = {}
    last = time.monotonic()
    while time.monotonic() < last + IDLE_S and Path(f"/proc/{raylet}").exists():
        for event, _ in waiting.select(timeout=1.0):
            link: Any = event.fileobj
            if link is listener:
                _accept(listener, waiting, workers, files)
            else:  # a stub sends nothing more, so it has ended; its worker must end too
                for pid in [pid for pid, its in workers.items() if its is link]:
                    os.kill(pid, signal.SIGKILL)
                waiting.unregister(link)
        _reap(waiting, workers)
        if workers:
            last = time.monotonic()
    address.unlink(missing_ok=True)
    for pid in workers:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _clear(address.parent)


def _clear(folder: Path) -> None:
    """Removes files of servers whose raylets have ended."""
    for file in folder.iterdir():
        if not Path(f"/proc/{file.name.partition('-')[0]}").exists():
            file.unlink(missing_ok=True)


def _accept(
    listener: socket.socket,
    waiting: selectors.BaseSelector,
    workers: dict[int, socket.socket],
    files: tuple[int, int],
) -> None:
    """Forks the worker that a stub requests; a stub whose link is closed without a reply starts its worker itself."""
    try:
        link, _ = listener.accept()
    except OSError:  # out of file descriptors: the stub waits until a worker ends
        time.sleep(0.1)
        return
    link.settimeout(5.0)
    try:
        request, streams = _request(link)
    except (OSError, ValueError, struct.error):
        link.close()
        return
    try:
        pid = os.fork()
    except OSError:
        pid = -1
    if pid == 0:
        for other in [listener, *workers.values()]:
            other.close()
        _become_worker(request, streams, link, files)
    for stream in streams:
        os.close(stream)
    if pid < 0:
        link.close()
        return
    link.settimeout(None)
    with contextlib.suppress(OSError):
        link.sendall(b"+")
    workers[pid] = link
    waiting.register(link, selectors.EVENT_READ)


def _request(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receives a stub's request and its standard streams."""
    head, streams, _, _ = socket.recv_fds(link, _LENGTH.size, 3)
    try:
        (length,) = _LENGTH.unpack(head)
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


def _reap(waiting: selectors.BaseSelector, workers: dict[int, socket.socket]) -> None:
    while workers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        link = workers.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(OSError):
            link.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
        with contextlib.suppress(KeyError):
            waiting.unregister(link)
        link.close()


def _become_worker(
    request: dict[str, Any], streams: list[int], link: socket.socket, files: tuple[int, int]
) -> NoReturn:
    """Becomes the process that Ray meant to start: runs its script as __main__, with its arguments and environment."""
    import resource
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


if __name__ == "__main__":
    if sys.argv[1] == "stub":
        stub(sys.argv[2:])
    sys.path.insert(0, str(Path(__file__).parents[3]))
    serve(Path(sys.argv[2]), int(sys.argv[3]))
