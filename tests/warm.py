"""Python programs that tests start, forked from a process that has imported what they need.

Importing PyTorch and MLflow takes six core-seconds of each program's twelve. `Popen` is `subprocess.Popen`, except that
`python -m fedlq_ray.cli`, `python -c` and `python FILE` fork from a server; conftest.py puts it in place of
the original. A program that needs another environment at Python's start, or anything else that a fork cannot have,
starts as always. `FEDLQ_TEST_COLD=1` in a program's environment says so. Cold starts are tested in
tests/test_startup.py, tests/test_wheel.py and tests/cluster.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

COLD = "FEDLQ_TEST_COLD"  # in a program's environment: start it as always
_IMPORTS = (
    "fedlq_ray.runs.simulation", "fedlq_ray.runs.driver", "fedlq_ray.runs.progress", "fedlq_ray.cli.main",
    "fedlq_ray.analysis.conclude", "fedlq_ray.sweeps.sweep", "sklearn.datasets", "mlflow",
    "mlflow.store.tracking.sqlalchemy_store", "matplotlib.pyplot",
)  # fmt: skip
_EARLY = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "MKL_", "OPENBLAS_", "MPL")  # variables that are read only once


def _early(environment):
    return {name: value for name, value in environment.items() if name.startswith(_EARLY)}


class Popen(subprocess.Popen):
    """See above."""

    _server = None  # where this process's server is asked
    _link = None  # receives a warm program's exit status

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, process_group,
    ):  # fmt: skip
        environment = dict(os.environ if env is None else env)
        special = executable or preexec_fn or pass_fds or shell or gid or gids or uid or process_group != -1
        if special or not _is_warm(args, environment) or not os.path.isdir(cwd or "."):
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
                start_new_session, process_group,
            )  # fmt: skip
        streams = [end if end != -1 else number for number, end in enumerate((p2cread, c2pwrite, errwrite))]
        request = {"arguments": list(args[1:]), "environment": environment, "session": bool(start_new_session)}
        request["folder"] = os.path.abspath(cwd or ".")
        self._link, other = socket.socketpair()
        with other:
            socket.send_fds(_running(), [json.dumps(request).encode()], [other.fileno(), *streams])
        self.pid = int(self._link.recv(16))
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags):
        if self._link is None:
            return super()._try_wait(wait_flags)
        self._link.setblocking(not wait_flags & os.WNOHANG)
        try:
            status = self._link.recv(16)
        except BlockingIOError:
            return 0, 0
        self._link.close()
        return self.pid, int(status)

    def _internal_poll(self, *given, **options):
        if self._link is None:
            return super()._internal_poll(*given, **options)
        if self.returncode is None and (found := self._try_wait(os.WNOHANG))[0]:
            self._handle_exitstatus(found[1])
        return self.returncode


def _is_warm(args, environment):
    if not isinstance(args, list | tuple) or len(args) < 2 or args[0] != sys.executable:
        return False
    if not all(isinstance(word, str) for word in args) or COLD in environment or sys.platform != "linux":
        return False
    if not all(isinstance(word, str) for pair in environment.items() for word in pair):
        return False
    ours = list(args[1:3]) == ["-m", "fedlq_ray.cli"] or args[1] == "-c" or args[1].endswith(".py")
    return ours and _early(environment) == _early(os.environ)


def _running():
    """The socket of this process's server, which is started if there is none."""
    if Popen._server is None:
        Popen._server, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            command = [sys.executable, __file__, str(other.fileno())]
            Popen._process = _ORIGINAL(command, pass_fds=[other.fileno()], cwd=Path(__file__).parents[1])
    return Popen._server


_ORIGINAL = subprocess.Popen


def serve(control):
    """Forks a program for each request, until nobody can send one any more."""
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a program's collector would touch, and so copy, all that was imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, files, _, _ = socket.recv_fds(control, 1 << 20, 4)
        if not data:
            return None
        if os.fork() == 0:
            control.close()
            return _program(json.loads(data), files)
        for file in files:
            os.close(file)


def _program(request, files):
    """Starts the program in its own process and reports its number and exit status; returns, in it, what it runs."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    link = socket.socket(fileno=files[0])
    if program := os.fork():
        for file in files[1:]:
            os.close(file)
        with contextlib.suppress(OSError):
            link.sendall(str(program).encode())
        status = os.waitpid(program, 0)[1]
        with contextlib.suppress(OSError):
            link.sendall(str(status).encode())
        os._exit(0)
    link.close()
    if request["session"]:
        os.setsid()
    for target, file in enumerate(files[1:]):
        os.dup2(file, target)
    for file in files[1:]:
        if file > 2:
            os.close(file)
    out, err = (io.BufferedWriter(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(out, sys.stdout.encoding)
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(err, sys.stderr.encoding, "backslashreplace", line_buffering=True)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = request["arguments"]
    if arguments[0] == "-m":
        from fedlq_ray import startup

        sys.argv = [str(Path(startup.__file__).parent / "cli" / "__main__.py"), *arguments[2:]]
        sys.path[0] = os.getcwd()
        startup._begin()
        return lambda: runpy.run_module("fedlq_ray.cli", run_name="__main__", alter_sys=False)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        return lambda: exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    return lambda: runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    work = serve(socket.socket(fileno=int(sys.argv[1])))
    if work:
        work()
