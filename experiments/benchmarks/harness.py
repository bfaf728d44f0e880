"""What all benchmarks share: a contender's run measured from outside, its environment, and how results are kept."""

import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlq_ray.runs import provenance

ENVS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedlq" / "benchmarks"
_MARK = "FEDLQ_BENCHMARK"  # an environment variable that all processes of a contender inherit
_LOOK = "FEDLQ_BENCHMARK_LOOK"  # another: the file by which one asks for its memory to be looked at, and that then goes
_SHARE = 50  # memory is looked at so seldom that looking takes a fiftieth of a core at most


def environment(folder: Path, name: str, *requirements: str) -> Path:
    """The Python of an environment of its own, made and filled where it is missing.

    Raises:
        SystemExit: pip failed.
    """
    home = folder / name
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        print(f"installing {' '.join(requirements)} into {home}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        if subprocess.run(install).returncode:
            raise SystemExit(f"{home}: {shlex.join(install)} failed")
        done.touch()
    return python


def installed(python: Path, *packages: str) -> dict[str, str]:
    """The versions of packages in an environment."""
    code = "import sys, json; from importlib.metadata import version; "
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    return json.loads(subprocess.run([python, "-c", code, *packages], capture_output=True, check=True).stdout)


class Failed(SystemExit):
    """A contender ended with an error."""


def measure(command: Sequence[str | Path], cwd: Path, timeout_s: float = 3600) -> dict[str, Any]:
    """Run a contender and measure it.

    A line of its output is JSON with `marks`: the time at which its first round started, and at which each ended.
    Returns:
        startup_s: from the command to the first round; round_s: of each round; peak_mb: greatest sum of the
        proportional set sizes (PSS) of its processes; processor_s: of a round after the first, by kind of process;
        what else it printed.
    Raises:
        Failed: it failed.
        subprocess.TimeoutExpired: it took too long; its processes are ended.
    """
    mark = uuid.uuid4().hex
    look = Path(tempfile.gettempdir()) / f"look-{mark}"
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        started = time.time()
        own = os.environ | {_MARK: mark, _LOOK: str(look)}
        process = subprocess.Popen([str(part) for part in command], cwd=cwd, stdout=out, stderr=err, env=own)
        watcher = _Watcher(mark, process, look)
        watcher.start()
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
            watcher.join()
            for left in _processes(mark):  # none, but where it was given up or interrupted
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(left.name), signal.SIGKILL)
        out.seek(0)
        err.seek(0)
        if code:
            raise Failed(f"{shlex.join(map(str, command))} ended with {code}:\n{err.read()[-3000:]}")
        told = json.loads(next(line for line in out if line.startswith('{"marks"')))
    marks = told.pop("marks")
    rounds = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    found = {"startup_s": marks[0] - started, "round_s": rounds, "peak_mb": watcher.peak_mb}
    if len(rounds) > 1:
        found["processor_s"] = watcher.processor_s(marks[1], marks[-1], len(rounds) - 1)
    return found | told


def look() -> None:
    """Of a contender: have its memory looked at, now that all its processes have worked, and wait for that."""
    file = Path(os.environ[_LOOK])
    file.touch()
    while file.exists():
        time.sleep(0.1)


def _processes(mark: str) -> list[Path]:
    """The folders in /proc of a contender's processes."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry)
    return found


def _kind(process: Path) -> str:
    """What a process is: Ray's own title without the method, else the name of its script or program."""
    words = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
    if words[0].startswith("ray::"):
        return words[0].partition(".")[0]
    scripts = [word for word in words if word.endswith(".py")] if Path(words[0]).name.startswith("python") else []
    return Path((scripts or words)[0]).name


class _Watcher(threading.Thread):
    """Samples the memory and the processor time of a contender's processes while it runs."""

    def __init__(self, mark: str, process: subprocess.Popen[bytes], look: Path) -> None:
        super().__init__(daemon=True)
        self.mark, self.process, self.look, self.peak_mb = mark, process, look, 0.0
        self.spent: list[tuple[float, dict[str, tuple[str, float]]]] = []  # when, and by process: its kind and seconds

    def run(self) -> None:
        while self.process.poll() is None:
            before = time.thread_time()
            self.peak_mb = max(self.peak_mb, self.total_mb())
            self.spent.append((time.time(), self.seconds()))
            self.look.unlink(missing_ok=True)
            end = time.monotonic() + max(0.5, _SHARE * (time.thread_time() - before))
            while time.monotonic() < end and self.process.poll() is None and not self.look.exists():
                time.sleep(0.5)

    def seconds(self) -> dict[str, tuple[str, float]]:
        found = {}
        for entry in _processes(self.mark):
            with contextlib.suppress(OSError, IndexError):
                user, system = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
                found[entry.name] = _kind(entry), (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return found

    def processor_s(self, begin: float, end: float, rounds: int) -> dict[str, float]:
        """Seconds of processor time a round, by kind, from the first sample in this time to the last."""
        inside = [sample for sample in self.spent if begin <= sample[0] <= end]
        if len(inside) < 2:
            return {}
        (started, first), (ended, last) = inside[0], inside[-1]
        total: dict[str, float] = {}
        for process, (kind, seconds) in last.items():
            total[kind] = total.get(kind, 0.0) + seconds - first.get(process, (kind, 0.0))[1]
        share = (end - begin) / (ended - started) / rounds
        return {kind: round(share * spent, 4) for kind, spent in total.items() if spent}

    def total_mb(self) -> float:
        total = 0
        for entry in _processes(self.mark):
            with contextlib.suppress(OSError):
                lines = (entry / "smaps_rollup").read_text(encoding="utf-8").splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024


def middle(values: Sequence[float]) -> float:
    """The median of rounds 2 and on: the first is told apart."""
    return statistics.median(values[1:] or values)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def keep(out: Path | None, found: dict[str, Any]) -> None:
    """Write results beside what made them: command, commit, machine, versions, load, date."""
    if out is None:
        return
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "load_before": _LOAD,
        "versions": provenance.versions(),
    }
    out.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")


_LOAD = os.getloadavg()[0]
