"""`fedlq job`: the command that a cluster runs for `fedlq submit`."""

from fedlq_ray import startup  # noqa: F401  (before imports that a user's file could hide)

# isort: split
import base64
import contextlib
import io
import os
import tarfile
import uuid
from pathlib import Path
from typing import Any

import click

from fedlq_ray.cli.arguments import PATH
from fedlq_ray.errors import ConfigError, FedLQError, first_line

CONFIG = "FEDLQ_CONFIG"  # the environment variable that holds the configuration, as YAML
RESULTS = "fedlq-results:"  # precedes the results in the log of a job that prints them
LARGEST_BYTES = 256 * 2**20  # limit for printed results


@click.command()
@click.argument("out", type=PATH, metavar="OUT")
@click.option("--print", "printing", is_flag=True, help="Print the results in OUT instead of running.")
def job(out: str, printing: bool) -> None:
    """For clusters: run the YAML in the environment variable FEDLQ_CONFIG into OUT, or resume the run in OUT.

    An absolute OUT must be on storage that all nodes see.
    """
    from fedlq_ray.config import load as configuration
    from fedlq_ray.runs import simulation
    from fedlq_ray.runs.console import Console
    from fedlq_ray.runs.progress import watch
    from fedlq_ray.tracking import stores

    folder = Path(out)
    if printing:
        show(folder)
        return
    config = configuration.parse(_settings() | {"out": out}, source=CONFIG)
    if folder.is_absolute():
        require_shared(folder)
    if config.tracking.uri and (store := stores.sqlite_file(config.tracking.uri)):
        with contextlib.suppress(OSError):  # the folder may exist only on the submitting machine
            store.parent.mkdir(parents=True, exist_ok=True)
    with watch(config, Console(stderr=True, width=120), False) as report:
        if (folder / "config.yaml").exists():
            before = configuration.load(folder / "config.yaml")
            simulation.resume(folder, configuration.differences(before, config), watch=report)
        else:
            simulation.simulate(config, watch=report)


def _settings() -> Any:
    import yaml

    try:
        found = yaml.safe_load(os.environ[CONFIG])
    except KeyError:
        raise ConfigError(f"{CONFIG}: is not set; `fedlq submit` sets it") from None
    except yaml.YAMLError as exc:
        raise ConfigError(f"{CONFIG}: {' '.join(str(exc).split())}") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{CONFIG}: must hold settings as YAML, such as `rounds: 10`")
    return found


def show(folder: Path) -> None:
    """Prints a run's folder as one line, without its checkpoints; prints nothing if there is no run."""
    if not (folder / "config.yaml").exists():
        return

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if Path(member.name).name in ("checkpoints", ".lock") else member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, ".", filter=wanted)
    if len(buffer.getvalue()) > LARGEST_BYTES:
        size = len(buffer.getvalue()) / 2**20
        raise FedLQError(f"{size:.0f} MiB is too much for a log; copy {folder.resolve()} from this node by other means")
    click.echo(RESULTS + base64.b64encode(buffer.getvalue()).decode())


def require_shared(folder: Path) -> None:
    """Checks that all nodes see the folder's parent.

    Raises:
        ConfigError: a node of the cluster does not see a file written next to this folder.
    """
    import ray
    from ray.exceptions import RayError

    from fedlq_ray.hosts.ray.placement import on
    from fedlq_ray.hosts.ray.session import start_ray

    start_ray()
    marker = folder.parent / f".{uuid.uuid4().hex}"
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as exc:
        raise ConfigError(f"out: {marker.parent}: {exc.strerror}") from exc
    look: Any = ray.remote(num_cpus=0)(_exists)
    try:
        asked = [
            (node["NodeManagerAddress"], look.options(scheduling_strategy=on(node["NodeID"])).remote(str(marker)))
            for node in ray.nodes()
            if node["Alive"]
        ]
        blind = [address for address, answer in asked if not ray.get(answer)]
    except RayError as exc:
        raise FedLQError(f"out: a node left while it looked for {marker.parent}: {first_line(exc)}") from exc
    finally:
        marker.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"out: node {', '.join(blind)} does not see {marker.parent}; use a folder on storage that all nodes see, "
            "or a relative path, whose results are fetched"
        )


def _exists(path: str) -> bool:
    return os.path.exists(path)
