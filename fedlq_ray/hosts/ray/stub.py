"""What Ray starts in place of Python: it has a process forked by a server, and waits for it to end.

Ray runs this file with `python -S -E -P`, which takes 10 to 20 ms; only the standard library is imported. The stub
passes its arguments, environment and standard streams to the server (`forkserver.py`). It then becomes a shell of a few
hundred kB that waits. Without a server, it becomes the Python that Ray wanted, which only takes longer.

- `stub.py raylet ARGUMENTS`: a worker. This is Ray's public `runtime_env: py_executable` (`placement.py`).
- `stub.py session ADDRESS PYTHON ARGUMENTS`: any Python process of a Ray that this package starts (`starter.py`).
"""

import contextlib
import fcntl
import json
import os
import socket
import struct
import sys
from typing import NoReturn

FORKED = "FEDLQ_FORKED"  # set in a forked process's environment
LENGTH = struct.Struct("<I")
RAY = ".ray"  # after an address: the server for Ray's own processes
# Ray's agents then watch a pipe for the end of the raylet, and not their parent, which is the server here.
PIPE = "RAY_enable_pipe_based_agent_to_parent_health_check"
_START_S = 60.0  # time that a stub waits for the server
_AGENT = "/ray/_private/runtime_env/agent/main.py"
_SYSTEM = (
    "/ray/autoscaler/_private/monitor.py", "/ray/autoscaler/v2/monitor.py", "/ray/dashboard/dashboard.py",
    "/ray/dashboard/agent.py", "/ray/_private/log_monitor.py", _AGENT,
)  # fmt: skip
_SETUP = "/ray/_private/workers/setup_worker.py"
_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="


def command() -> str | None:
    """Returns the value for Ray's `py_executable`; None if forking such a process is unsafe or impossible."""
    if sys.platform != "linux":
        return None
    import shlex  # here, so that a stub, which does not need it, starts faster

    return f"{shlex.quote(sys.executable)} -S -E -P {shlex.quote(__file__)} raylet"


def address(owner: int | str, python: str = sys.executable) -> str:
    """Returns the path of a server's socket, in a folder that only the user can read.

    Args:
        owner: The process with which the server ends, and what else distinguishes servers of this process.
        python: The interpreter.
    """
    import tempfile  # here: a stub of a session does not need it

    base = tempfile.gettempdir()
    folder = f"{base if len(base) < 60 else '/tmp'}/fedlq-fork-{os.getuid()}"  # socket paths: at most 107 bytes
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    key = f"{owner} {python} {__file__}".encode()
    # Not hash(), which differs between processes.
    return f"{folder}/{owner}-{sum(i * b for i, b in enumerate(key, 1)):x}"


def connect(path: str) -> socket.socket | None:
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(path)
        return link
    except OSError:
        link.close()
        return None


def listen(path: str) -> socket.socket:
    """Returns a server's socket. Stubs can connect at once; they wait until the server has imported what it needs."""
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1024)
    return listener


def launch(path: str, owner: int | str, python: str = sys.executable) -> int:
    """Starts a server (see `forkserver.py`) and returns its process number."""
    root = os.path.abspath(f"{__file__}/../../../..")
    with listen(path) as listener:
        listener.set_inheritable(True)
        run = f"import sys; sys.path.insert(0, {root!r}); from fedlq_ray.hosts.ray import forkserver; "
        run += f"forkserver.main({path!r}, {int(owner)}, {listener.fileno()})"
        streams = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        ]
        return os.posix_spawn(
            python, [python, "-u", "-P", "-c", run], os.environ,
            file_actions=streams, setsid=True,
        )  # fmt: skip


def raylet(arguments: list[str]) -> NoReturn:
    """Has a worker forked by the server of its raylet; the first stub of a raylet starts it."""
    link = None
    try:
        owner = os.environ["RAY_RAYLET_PID"]
        path = address(f"{owner}-{os.environ.get('RAY_JOB_ID', '')}")
        for _ in range(3):  # an idle server may end just as a stub connects
            link = _ask(connect(path) or _start(path, owner), arguments, dict(os.environ))
            if link is not None:
                break
    except (OSError, KeyError):
        pass
    _wait(link, sys.executable, arguments)


def session(path: str, python: str, arguments: list[str]) -> NoReturn:
    """Has a process of Ray forked by the server of its session."""
    server, wanted, environment = path + RAY, arguments[arguments[:1] == ["-u"] :], dict(os.environ)
    script, link = wanted[0] if wanted else "", None
    if script.endswith(_AGENT):  # the first with the raylet's number: the server for workers can import Ray
        _prepare(path, {**environment, "RAY_JOB_ID": "01000000"})
    if script.endswith(_SETUP):
        server, wanted = path, _worker(wanted[1:], environment, python)
    if wanted and script.endswith((*_SYSTEM, _SETUP)):
        link = _ask(connect(server), wanted, environment)
    _wait(link, python, arguments)


def _prepare(path: str, environment: dict[str, str]) -> None:
    """Announces the environment of a server's workers to it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        _send(link, [], environment)


def _worker(arguments: list[str], environment: dict[str, str], python: str) -> list[str]:
    """Does what Ray's `setup_worker.py` does for a worker of this package or of plain Python.

    Returns:
        The worker's arguments; none if Ray's own script must do this.
    """
    given = {name: a.removeprefix(name) for name in (_CONTEXT, _LANGUAGE) for a in arguments if a.startswith(name)}
    rest = [a for a in arguments if not a.startswith((_CONTEXT, _LANGUAGE))]
    try:
        context = json.loads(given[_CONTEXT])
        variables, wanted = context["env_vars"], context["py_executable"]
        plain = not (context["command_prefix"] or context["override_worker_entrypoint"])
    except (KeyError, ValueError, TypeError):  # another version of Ray
        return []
    if not plain or given.get(_LANGUAGE) != "PYTHON" or any("$" in value for value in variables.values()):
        return []
    if wanted not in (python, command()) or not rest or rest[0].startswith("-"):
        return []
    environment.update(variables)
    return rest


def _wait(link: socket.socket | None, python: str, arguments: list[str]) -> NoReturn:
    """Waits for the process behind this link to end; None: becomes an ordinary Python process."""
    if link is None:
        os.execv(python, [python, *arguments])
    os.dup2(link.fileno(), 3)
    os.set_inheritable(3, True)  # dup2 does not set this if the descriptor was already 3
    # The server writes the exit status when the process ends; if it closes without a status, it was killed.
    os.execv("/bin/sh", ["sh", "-c", "read status <&3; exit ${status:-1}"])


def _ask(link: socket.socket | None, arguments: list[str], environment: dict[str, str]) -> socket.socket | None:
    """Returns the link if the server confirms that the process runs, else None."""
    if link is None:
        return None
    try:
        _send(link, arguments, environment)
        if link.recv(1) == b"+":
            link.settimeout(None)
            return link
    except OSError:
        pass
    link.close()
    return None


def _send(link: socket.socket, arguments: list[str], environment: dict[str, str]) -> None:
    """Sends a request: to fork a process, or, without arguments, to get ready for workers of this environment."""
    link.settimeout(_START_S)
    data = json.dumps({"arguments": arguments, "environment": environment, "folder": os.getcwd()}).encode()
    socket.send_fds(link, [LENGTH.pack(len(data))], [0, 1, 2])
    link.sendall(data)


def _start(path: str, owner: str) -> socket.socket | None:
    """Starts the raylet's server, unless another stub does; returns a connection to it."""
    with open(f"{path}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        link = connect(path)
        if link is not None:
            return link
        launch(path, owner)
        return connect(path)


if __name__ == "__main__":
    if sys.argv[1] == "raylet":
        raylet(sys.argv[2:])
    session(sys.argv[2], sys.argv[3], sys.argv[4:])
