"""Makes the processes of a Ray that this package starts fork from a server, in place of importing Ray each.

Ray starts five Python processes of its own, and each worker, with the interpreter that `sys.executable` names at
`ray.init`. Each would import Ray, which takes one to two core-seconds. While `ray.init` runs, `sys.executable` is a
script that starts `stub.py`. Where Ray asks for something unexpected, the stub becomes the real interpreter.
"""

import contextlib
import itertools
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from fedlq_ray.hosts.ray import forkserver, stub

_VARIABLES = {stub.PIPE: "1", "RAY_prestart_worker_first_driver": "0"}  # no workers that nobody asked for
_count = itertools.count()


@dataclass
class _Servers:
    """The servers for the next Ray: their address, and the processes of the one for Ray and the one for workers."""

    path: str
    ray: int
    workers: int | None = None

    def run(self) -> bool:
        return not any(os.waitpid(pid, os.WNOHANG)[0] for pid in (self.ray, self.workers) if pid)


_started: _Servers | None = None


def start(workers: bool = True) -> str | None:
    """Starts the servers of this process, unless they run; returns their address, None if they cannot run here.

    It returns at once: the servers import Ray and PyTorch while this process does other things.

    Args:
        workers: False to start only the server for Ray's own processes, because `fork` follows.
    """
    if sys.platform != "linux":
        return None
    global _started
    try:
        if _started is None or not _started.run():
            path = f"{stub.address(os.getpid())}-{next(_count)}"
            _started = _Servers(path, stub.launch(path + stub.RAY, os.getpid()))
        if workers and _started.workers is None:
            _started.workers = stub.launch(_started.path, os.getpid())
    except (OSError, NotImplementedError):
        return None
    return _started.path


def fork() -> None:
    """Forks the workers' server from this process, which saves importing PyTorch twice.

    For a program of this package, after its imports and before its work. It does nothing if the server runs, or if this
    process has threads or has imported Ray (see `forkserver.py`): then `start` starts the server.
    """
    if _started is None or _started.workers or threading.active_count() > 1 or "ray" in sys.modules:
        return
    owner, path = os.getpid(), _started.path
    with contextlib.suppress(OSError), stub.listen(path) as listener:
        sys.stdout.flush()
        sys.stderr.flush()
        _started.workers = os.fork()
        if _started.workers == 0:
            forkserver.become(path, owner, listener)


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Processes of a Ray that starts meanwhile fork from the servers, if these can run."""
    global _started
    path, python = start(), sys.executable
    script = path and _script(path, python)
    if not script:
        yield
        return
    had = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ |= _VARIABLES
    sys.executable = script
    try:
        yield
    finally:
        _started = None  # they serve one Ray
        sys.executable = python
        for name, value in had.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _script(path: str, python: str) -> str | None:
    """Writes the script that stands for Python; None if this machine does not run such files."""
    words = [python, "-S", "-E", "-P", stub.__file__, "session", path, python]
    script = f"{path}.sh"
    try:
        with open(script, "w", encoding="utf-8") as file:
            file.write(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        os.chmod(script, 0o700)
    except OSError:
        return None
    return script if os.access(script, os.X_OK) else None
