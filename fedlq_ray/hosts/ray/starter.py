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
from collections.abc import Iterator

from fedlq_ray.hosts.ray import stub

_VARIABLES = {stub.PIPE: "1", "RAY_prestart_worker_first_driver": "0"}  # no workers that nobody asked for
_count = itertools.count()
_started: tuple[str, int] | None = None  # the address of the servers for the next Ray, and their process


def start() -> str | None:
    """Starts the servers of this process, unless they run; returns their address, None if they cannot run here.

    It returns at once: the servers import Ray while this process does other things.
    """
    if sys.platform != "linux":
        return None
    global _started
    try:
        if _started is None or os.waitpid(_started[1], os.WNOHANG)[0]:
            path = f"{stub.address(os.getpid())}-{next(_count)}"
            _started = path, stub.launch(path, os.getpid(), "session")
    except (OSError, NotImplementedError):
        return None
    return _started[0]


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
