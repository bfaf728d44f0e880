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
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None  # not in a checkout
    return done.stdout.strip()


def machine() -> str:
    """The processor's name, how many cores this process may use, and the NVIDIA GPUs."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that tells no name
    gpus = [file.read_text() for file in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    models = [line.split(":", 1)[1].strip() for told in gpus for line in told.splitlines() if line.startswith("Model")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([name, f"{cores} cores", *models])


def made_by() -> dict[str, Any]:
    """What a result is kept with; the commit is None outside of a checkout."""
    return {"commit": commit(), "machine": machine(), "versions": versions()}


def tags() -> dict[str, str]:
    """What made a result, for MLflow."""
    made_by = {f"version.{name}": number for name, number in versions().items()}
    made_by |= {"mlflow.source.name": "fedlq", "mlflow.source.type": "LOCAL", "mlflow.user": getpass.getuser()}
    found = commit()
    return made_by | ({"mlflow.source.git.commit": found} if found else {})
