"""Provenance of a result: the checkout's commit, the versions, the machine."""

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
    """Returns the version of each package that a result may depend on, and of Python."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this package itself, if a job uploaded it as files
        return "not installed"


def commit() -> str | None:
    """Returns the commit of the working directory's checkout, with the suffix `-dirty` if files differ; else None."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout; or git is missing, is slow, or rejects another user's folder
    return done.stdout.decode(errors="replace").strip()


def machine() -> str:
    """Returns the processor's name, the number of cores that this process may use, and the NVIDIA GPUs."""
    names = _values(Path("/proc/cpuinfo"), "model name")  # empty: not Linux, or the processor reports no name
    name = names[0] if names else platform.processor() or platform.machine()
    gpus = Path("/proc/driver/nvidia/gpus")
    models = [model for file in gpus.glob("*/information") for model in _values(file, "Model")]
    try:
        cores: int | None = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        cores = os.cpu_count()
    return ", ".join([name, f"{cores} cores", *models])


def _values(file: Path, key: str) -> list[str]:
    """Returns the values of a key in a file of /proc, one per line; an empty list if the file cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def made_by() -> dict[str, Any]:
    """Returns the provenance to store with a result; the commit is None outside a checkout."""
    return {"commit": commit(), "machine": machine(), "versions": versions()}


def tags() -> dict[str, str]:
    """Returns the provenance as MLflow tags."""
    made_by = {f"version.{name}": number for name, number in versions().items()}
    made_by |= {"mlflow.source.name": "fedlq", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    found = commit()
    return made_by | ({"mlflow.source.git.commit": found} if found else {})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        return str(os.getuid())
