"""What made a result: the checkout's commit, the versions, the machine."""

import functools
import getpass
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("fedlq-ray", "torch", "numpy", "ray", "mlflow")


def versions() -> dict[str, str]:
    """The version of each package that a result may depend on, and of Python."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this package itself, where a job brought it along as files
        return "not installed"


def commit() -> str | None:
    """The commit of the checkout that the working directory lies in, `-dirty` behind it where files differ."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None  # not in a checkout, or git is missing, slow, or refuses a folder of another user
    return done.stdout.decode(errors="replace").strip()


def machine() -> str:
    """The processor's name, how many cores this process may use, and the NVIDIA GPUs."""
    names = _values(Path("/proc/cpuinfo"), "model name")  # none: not Linux, or a processor that tells no name
    name = names[0] if names else platform.processor() or platform.machine()
    gpus = Path("/proc/driver/nvidia/gpus")
    models = [model for file in gpus.glob("*/information") for model in _values(file, "Model")]
    try:
        cores: int | None = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        cores = os.cpu_count()
    return ", ".join([name, f"{cores} cores", *models])


def _values(file: Path, key: str) -> list[str]:
    """What a file of /proc has for a key, a value per line; nothing where it cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def made_by() -> dict[str, Any]:
    """What a result is kept with; the commit is None outside of a checkout."""
    return {"commit": commit(), "machine": machine(), "versions": versions()}


def tags() -> dict[str, str]:
    """What made a result, for MLflow."""
    made_by = {f"version.{name}": number for name, number in versions().items()}
    made_by |= {"mlflow.source.name": "fedlq", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    found = commit()
    return made_by | ({"mlflow.source.git.commit": found} if found else {})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number that has no name, as in many containers
        return str(os.getuid())
