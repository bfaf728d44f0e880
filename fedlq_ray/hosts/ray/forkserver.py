"""A server that has imported PyTorch once, and forks a ready Ray worker whenever Ray starts one.

A worker that imports torch itself has some 150 MB of its own; a forked one shares them. Ray starts this file in place
of Python by its public `runtime_env: py_executable` (`placement.py`). What Ray starts is a stub: it hands its
arguments, environment and standard streams to the server, and then waits, as a shell of a few hundred kB, for the
worker's end.

One server for each raylet and package, started by the first stub; its socket lies in a folder that only the user can
read. It ends when the raylet does, or when no worker has been left for a while. Ray is imported after the fork, since
it reads its environment at import. Only the standard library is imported at the top: the stub runs without packages.
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

FORKED = "FEDLQ_FORKED"  # in a forked worker's environment
IDLE_S = 10.0  # without a worker, until the server ends
_START_S = 60.0  # that a stub waits for the server
_LENGTH = struct.Struct("<I")


def command() -> str | None:
    """What to give to Ray as `py_executable`; None where forking such a process is not safe or not possible."""
    if sys.platform != "linux":
        return None
    import shlex  # a stub, which has no need of it, is to start soon

    return f"{shlex.quote(sys.executable)} -S -E -P {shlex.quote(__file__)} stub"


def _address(raylet: str) -> Path:
    base = tempfile.gettempdir()
    folder = Path(base if len(base) < 60 else "/tmp") / f"fedlq-fork-{os.getuid()}"  # sockets' names have 107 bytes
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    key = f"{raylet} {sys.executable} {__file__}"
    # Not hash(): it differs from process to process.
    return folder / f"{raylet}-{sum(i * b for i, b in enumerate(key.encode(), 1)):x}"


def stub(arguments: list[str]) -> NoReturn:
    """Have a worker forked, and wait for its end; start it as an ordinary process where that fails."""
    link = None
    with contextlib.suppress(OSError, KeyError):
        raylet = os.environ["RAY_RAYLET_PID"]
        for _ in range(3):  # a server may end for idleness just as a stub comes
            link = _ask(_address(raylet), raylet, arguments)
            if link is not None:
                break
    if link is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    os.dup2(link.fileno(), 3)
    os.set_inheritable(3, True)  # which dup2 does not see to where it was 3 before
    # The server writes the exit status when the worker ends; that it closes without a word means that it was killed.
    os.execv("/bin/sh", ["sh", "-c", "read status <&3; exit ${status:-1}"])


def _ask(address: Path, raylet: str, arguments: list[str]) -> socket.socket | None:
    """A connection on which the server has said that the worker runs, or None."""
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
    """Start the server, unless another stub does; a connection to it."""
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
    """Fork workers on request, until the raylet ends or none is left for a while."""
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # no thread before a fork
    import gc
    import resource

    import torch

    import fedlq_ray.federation.task  # noqa: F401  (what a worker needs, but Ray)

    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))  # a link for each worker
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection in a worker would touch, and so copy, every object
    signal.signal(signal.SIGCHLD, lambda *_: None)  # so that select is woken
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
            else:  # a stub says nothing: it has ended, and so shall its worker
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
    """Remove what servers of raylets that have ended left."""
    for file in folder.iterdir():
        if not Path(f"/proc/{file.name.partition('-')[0]}").exists():
            file.unlink(missing_ok=True)


def _accept(
    listener: socket.socket,
    waiting: selectors.BaseSelector,
    workers: dict[int, socket.socket],
    files: tuple[int, int],
) -> None:
    """Fork what a stub asks for; a stub whose link is closed without a word starts its worker itself."""
    try:
        link, _ = listener.accept()
    except OSError:  # no more files: the stub waits until a worker ends
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
    """What a stub asks for, and its standard streams."""
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
    """Be what Ray meant to start: run its script as __main__, with its arguments and environment."""
    import resource
    import runpy

    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        os.setsid()  # Ray ends the process group of a worker that dies: it must be of this one alone
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
