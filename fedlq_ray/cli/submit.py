"""`fedlq submit`: runs an experiment as a job of a Ray cluster and follows it from this machine.

It uses only Ray's job API: HTTP to the head's dashboard. So a laptop needs no other port, and its version of Ray may
differ from the cluster's. The cluster runs `fedlq job` (job.py).
"""

import base64
import contextlib
import io
import json
import logging
import os
import re
import shlex
import socket
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

import fedlq_ray
from fedlq_ray.cli.arguments import ARGUMENTS, PATH, split
from fedlq_ray.cli.job import CONFIG, RESULTS
from fedlq_ray.errors import ConfigError, FedLQError, first_line
from fedlq_ray.files import expand

if TYPE_CHECKING:
    from fedlq_ray.config.load import Config

ADDRESS = "http://127.0.0.1:8265"
STOP_S = 30  # time for a stopped job to write its checkpoint; Ray's own default is 3
# In addition to .gitignore and .rayignore. Ray leaves them out of this package as well, which has modules in runs/. So
# only the folders in a folder `runs` are left out.
EXCLUDES = ["**/runs/*/", "mlruns/", "mlartifacts/", "mlflow.db*", "build/", "dist/"]


@click.command()
@ARGUMENTS
@click.option("--address", default=ADDRESS, show_default=True, help="The cluster's dashboard.")
@click.option("--no-wait", is_flag=True, help="Return once the job is submitted.")
@click.option("--attach", metavar="ID", help="Submit nothing; wait for this job and fetch its results.")
@click.option(
    "--working-dir", default=".", type=PATH, show_default=True, help="Folder of files for the run; it is uploaded."
)
@click.option(
    "--driver", multiple=True, metavar="NAME=AMOUNT", help="Resources of the driver's node; the default is the head."
)
def submit(
    arguments: tuple[str, ...],
    address: str,
    no_wait: bool,
    attach: str | None,
    working_dir: str,
    driver: tuple[str, ...],
) -> int:
    """Run one experiment on a Ray cluster, and follow it from this machine.

    The job is named NAME-1, and its results are fetched to runs/NAME-SEED (or `out`) on this machine. An absolute `out`
    must be on storage that all nodes see: the results stay there, and repeating the command resumes the run as NAME-2.

    For a cluster with tokens, the token comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. The exit
    code is the run's, or 143 if the job was stopped.
    """
    from fedlq_ray.config import load as configuration
    from fedlq_ray.tracking import stores

    if attach and arguments:
        raise ConfigError(f"--attach {attach}: takes no configuration; the job has its own")
    config = configuration.load(*split(arguments))
    where = _resources(driver)
    with _told(address):
        client = _connect(address)
        if attach:
            job, config = attach, _config_of(client.get_job_info(attach))
            local = _local(config)
        else:
            local = _local(config)
            if local and stores.sqlite_file(config.tracking.uri or ""):  # the file is on this machine
                stores.require(config.tracking)
            job = _next(client, config, address)
            _send(client, job, config, working_dir, where)
            click.echo(f"{job}: submitted to {address}", err=True)
        if no_wait:
            click.echo(f"{job}: to wait for it and fetch its results: fedlq submit --attach {job} --address {address}")
            return 0
        return _wait(client, job, config, local, address)


def _resources(given: tuple[str, ...]) -> dict[str, Any]:
    """Converts NAME=AMOUNT pairs to arguments of the job API."""
    amounts: dict[str, float] = {}
    for pair in given:
        name, _, amount = pair.partition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            raise ConfigError(f"--driver {pair}: must be a resource and an amount, such as CPU=1") from None
    return {
        "entrypoint_num_cpus": amounts.pop("CPU", None),
        "entrypoint_num_gpus": amounts.pop("GPU", None),
        "entrypoint_resources": amounts or None,
    }


def _stays(config: "Config") -> bool:
    """Whether the results stay where the cluster writes them; `~/x` is a folder on this machine."""
    return config.out is not None and Path(config.out).is_absolute()


def _local(config: "Config") -> Path | None:
    """Folder for fetched results: `out`, or the first runs/NAME-SEED[-N] that does not exist; None if they stay."""
    if _stays(config):
        return None
    if config.out is not None:
        local = Path(expand(config.out, "out"))
        if local.exists():
            raise ConfigError(f"out: {local} already exists; choose another, or remove it")
        return local
    stem, number = f"runs/{config.name}-{config.seed}", 1
    while Path(stem if number == 1 else f"{stem}-{number}").exists():
        number += 1
    return Path(stem if number == 1 else f"{stem}-{number}")


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """Converts exceptions of the job API to errors of one line."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as exc:
        raise ConfigError(
            f"--address {address}: {first_line(exc).lower().rstrip('.')}; set RAY_AUTH_TOKEN to the cluster's "
            "token (on its head: ray get-auth-token)"
        ) from exc
    except BrokenPipeError:  # from the output; the job API's own errors are below
        raise
    except (ConnectionError, requests.RequestException) as exc:
        raise FedLQError(f"{address}: the connection was lost ({first_line(exc)}); the job continues") from exc
    except (RuntimeError, ValueError) as exc:
        missing = re.search(r"status code 404: (Job .* does not exist)", str(exc))
        if missing:
            raise ConfigError(f"--address {address}: {missing[1]}") from exc
        told = str(exc).strip().splitlines()[-1] if "Traceback" in str(exc) else first_line(exc)
        raise FedLQError(f"{address}: {told}") from exc


def _connect(address: str) -> Any:
    """Returns Ray's client of the job API.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"--address {address}: must be the address of a Ray dashboard, such as {ADDRESS}")
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10).close()
    except OSError as exc:
        why = exc.strerror or str(exc)
        raise ConfigError(f"--address {address}: no Ray cluster answers ({why}); cluster/README.md starts one") from exc
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would prefer them to an explicit address
        os.environ.pop(name, None)
    if any(map(os.environ.get, ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))) or os.path.exists(
        os.path.expanduser("~/.ray/auth_token")  # unchanged if there is no home folder
    ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.INFO)  # messages on uploaded packages and closed sockets
    return JobSubmissionClient(address)


def _next(client: Any, config: "Config", address: str) -> str:
    """Returns the id of this attempt: NAME-1, or the last number plus one.

    Raises:
        ConfigError: an attempt is in progress, or this one could not resume the last.
    """
    pattern = re.compile(re.escape(config.name) + r"-(\d+)")
    found = {}
    for details in client.list_jobs():
        match = pattern.fullmatch(details.submission_id or "")
        if match:
            found[int(match[1])] = details
    if not found:
        return f"{config.name}-1"
    last = found[max(found)]
    attach = f"fedlq submit --attach {last.submission_id} --address {address}"
    if not last.status.is_terminal():
        raise ConfigError(f"name: {last.submission_id} is {last.status.lower()}; wait for it: {attach}")
    if not _stays(config):
        raise ConfigError(
            f"name: {last.submission_id} has {last.status.lower()}, and its results are on a single node (fetch them: "
            f"{attach}); set another name, or, to resume runs, an absolute out on storage that all nodes see"
        )
    return f"{config.name}-{max(found) + 1}"


def _send(client: Any, job: str, config: "Config", working_dir: str, where: dict[str, Any]) -> None:
    settings = json.dumps(config.model_dump(mode="json"))
    environment = {
        "working_dir": str(Path(working_dir).resolve()),
        "excludes": EXCLUDES,
        "py_modules": [str(Path(fedlq_ray.__file__).parent)],
        "env_vars": {CONFIG: settings, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
    }
    out = config.out if _stays(config) else f"runs/{job}"
    client.submit_job(entrypoint=_entrypoint(out), submission_id=job, runtime_env=environment, **where)


def _entrypoint(*arguments: Any) -> str:
    return shlex.join(["python", "-m", "fedlq_ray.cli", "job", *map(str, arguments)])


def _config_of(details: Any) -> "Config":
    """Returns the configuration that a job was submitted with.

    Raises:
        ConfigError: `fedlq submit` did not submit the job.
    """
    from fedlq_ray.config.load import parse

    settings = ((details.runtime_env or {}).get("env_vars") or {}).get(CONFIG)
    if settings is None:
        raise ConfigError(f"--attach {details.submission_id}: was not submitted by fedlq submit")
    return parse(json.loads(settings))


def _wait(client: Any, job: str, config: "Config", local: Path | None, address: str) -> int:
    """Shows a job's log until it ends, and fetches its results; returns the exit code."""
    import asyncio

    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        try:
            stop = click.confirm(f"\n{job}: stop it?", err=True)
        except click.Abort:
            stop = False
        if not stop:
            click.echo(f"{job}: continues; wait for it: fedlq submit --attach {job} --address {address}", err=True)
            return 130
        client.stop_job(job)
        asyncio.run(_follow(client, job, quiet=True))
    details = client.get_job_info(job)
    told = f"results in {config.out}, on the cluster's storage"
    if local is not None:
        fetched = _fetch(client, details, config, local)
        told = f"results in {fetched}" if fetched else "it left no results"
    if details.status == "SUCCEEDED":
        click.echo(f"{job}: {told}")
        return 0
    click.echo(f"{job}: {_ended(details)}; {told}", err=True)
    return 143 if details.status == "STOPPED" else details.driver_exit_code or 1


def _ended(details: Any) -> str:
    """Describes in one line how an unsuccessful job ended."""
    if details.driver_exit_code or details.status == "STOPPED":
        return f"{details.status.lower()}, exit code {details.driver_exit_code}"
    return f"{details.status.lower()}: {''.join((details.message or '').strip().splitlines()[-1:])}"


async def _follow(client: Any, job: str, quiet: bool = False) -> None:
    """Prints a job's log as it grows, until the job ends; reconnects after a lost connection."""
    import asyncio

    import aiohttp

    shown, failures = 0, 0
    while True:
        position = 0
        with contextlib.suppress(RuntimeError, aiohttp.ClientError):
            async for piece in client.tail_job_logs(job):
                fresh = piece[max(0, shown - position) :]
                position += len(piece)
                shown, failures = max(shown, position), 0
                if not quiet:
                    click.echo(fresh, nl=False, err=True)
        try:
            if client.get_job_status(job).is_terminal():
                return
        except ConnectionError:
            failures += 1
            if failures == 10:
                raise
        await asyncio.sleep(1.0)


def _fetch(client: Any, details: Any, config: "Config", local: Path) -> Path | None:
    """Fetches a job's results through a job on its node that prints them; returns their folder, or None if none."""
    printer = client.submit_job(
        entrypoint=_entrypoint("--print", f"runs/{details.submission_id}"),
        runtime_env=details.runtime_env,
        entrypoint_label_selector={"ray.io/node-id": details.driver_node_id} if details.driver_node_id else None,
    )
    while not client.get_job_status(printer).is_terminal():
        time.sleep(0.5)
    log, status = client.get_job_logs(printer), client.get_job_status(printer)
    packed = next((line for line in log.splitlines() if line.startswith(RESULTS)), None)
    if packed is None:
        if status != "SUCCEEDED":
            raise FedLQError(
                f"{details.submission_id}: its results cannot be fetched: {(log.splitlines() or ['?'])[-1]}"
            )
        return None
    if local.exists():  # created since the job was submitted
        local = _local(config) or local
    local.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed.removeprefix(RESULTS)))) as archive:
        archive.extractall(local, filter="data")
    _track_here(config, local)
    return local


def _track_here(config: "Config", local: Path) -> None:
    """Logs a fetched run to an MLflow store that is a file on this machine; the cluster logs to a server itself."""
    from fedlq_ray.runs import rundir
    from fedlq_ray.tracking import log as tracking
    from fedlq_ray.tracking import stores

    found, uri = rundir.read(local), config.tracking.uri or ""
    if found.tracking is None or stores.sqlite_file(uri) is None:
        return
    where = rundir.note(local, replace(found.tracking, uri=uri))
    try:
        tracking.sync(where, found.config, found.records, found.status, local)
    except Exception as exc:  # telemetry: the results are already fetched
        click.echo(f"warning: MLflow lacks this run ({exc}); fedlq sync {local} adds it", err=True)
