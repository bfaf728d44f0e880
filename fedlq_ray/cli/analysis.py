"""The commands that analyse runs: compare, report, recode, watch."""

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from fedlq_ray.cli.arguments import PATH
from fedlq_ray.errors import ConfigError

SOURCES = click.argument("sources", nargs=-1, required=True, type=PATH, metavar="RUNS...")
STORE = click.option(
    "--tracking-uri", default=None, help="MLflow's store, such as sqlite:///mlflow.db, if RUNS are ids in it."
)
REFERENCE = click.option(
    "--reference", default=None, help="The run to compare the others with; the default is fedavg, or the first."
)


def command() -> str:
    """Returns the command as typed."""
    return shlex.join(["fedlq", *sys.argv[1:]])


def show(table: Any, outcome: Any, unlike: Any = (), form: str = "text", out: str | None = None) -> None:
    """Prints a comparison, or writes it to a file."""
    from fedlq_ray.analysis import tables
    from fedlq_ray.runs.console import Console

    terminal = Console()
    width = terminal.width if terminal.is_terminal and out is None else 200  # files may be wide
    configs = {label: runs[0].config for label, runs in outcome.runs.items()}
    written = tables.written(table, configs, dict(unlike), form, width)
    if out is None:
        click.echo(written, nl=False)
        return
    _write(Path(out), written)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"--out: {file}: {exc.strerror}") from exc
    click.echo(f"written: {file}")


@click.command()
@SOURCES
@STORE
@REFERENCE
@click.option("--format", "form", type=click.Choice(["text", "csv", "markdown"]), default="text", show_default=True)
@click.option("--out", default=None, type=PATH, help="File to write; by default the table is printed.")
def compare(
    sources: tuple[str, ...], tracking_uri: str | None, reference: str | None, form: str, out: str | None
) -> None:
    """Compare runs, with one row for runs that differ only in seed.

    RUNS are folders of runs, or folders that contain runs, such as a sweep's; with --tracking-uri also MLflow's run ids
    (that of a sweep means all its runs), or the name of an experiment.

    Accuracy, time and MB are means over seeds; gain and speed-up are relative to the reference, paired by seed, with
    95 % intervals; * marks the Pareto front of accuracy against MB.
    """
    from fedlq_ray.analysis import compare as comparing
    from fedlq_ray.analysis import runs

    with tempfile.TemporaryDirectory() as scratch:
        outcome = runs.find(sources, tracking_uri, Path(scratch))
        show(comparing.rows(outcome, reference), outcome, runs.unlike(outcome), form, out)


@click.command()
@SOURCES
@STORE
@REFERENCE
@click.option("--out", required=True, type=PATH, help="The HTML file to write.")
def report(sources: tuple[str, ...], tracking_uri: str | None, reference: str | None, out: str) -> None:
    """Write a report on runs: one HTML file that needs no network.

    RUNS are named as for `fedlq compare`. The report shows accuracy against simulated time, traffic and rounds,
    accuracy per client where test samples have clients, bits by layer and client, significance by layer, clients
    under way where steps do not wait for all, the clients that a round waited for, labels by client, settings, versions
    and the command that repeats it.
    """
    from fedlq_ray.analysis import compare as comparing
    from fedlq_ray.analysis import report as reporting
    from fedlq_ray.analysis import runs

    with tempfile.TemporaryDirectory() as scratch:
        outcome = runs.find(sources, tracking_uri, Path(scratch))
        table = comparing.rows(outcome, reference)
        _write(Path(out), reporting.page(outcome, table, runs.unlike(outcome), command()))


@click.command()
@click.argument("folder", type=PATH, metavar="RUN_DIR")
@click.option("--sample", default=100, type=click.IntRange(1), show_default=True, help="Most payloads to code again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def recode(folder: str, sample: int, as_json: bool) -> None:
    """Say what other entropy coders would have needed for a run's payloads.

    The run must have kept them, with payloads=true. Bytes are by quantizer, each segment coded alone: as sent; at a
    fixed number of bits per code (none); at the codes' entropy, a bound for coders without context; with a range coder
    and a table of frequencies; with zstd, zlib, bz2 and lzma. Quantizers whose values are not a few codes are coded as
    bytes.
    """
    from rich.table import Table

    from fedlq_ray.analysis import recode as recoding
    from fedlq_ray.runs.console import Console

    found = recoding.recode(folder, sample)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    title = f"{found.payloads} of {found.kept} payloads, {found.sent:,} bytes as sent, headers included"
    table = Table(title=title, title_justify="left")
    for heading in ("quantizer", "coded", "elements", "as sent", *recoding.CODERS):
        table.add_column(heading, justify="left" if heading in ("quantizer", "coded") else "right", no_wrap=True)
    for stream in found.streams:
        sizes = [f"{stream.coders[name]:,.0f}" for name in recoding.CODERS]
        kind = "codes" if stream.coded else "bytes"
        table.add_row(stream.quantizer, kind, f"{stream.elements:,}", f"{stream.sent:,}", *sizes)
    shares = [f"{found.whole(name) / found.sent:.3f}" for name in recoding.CODERS]
    table.add_section()
    table.add_row("all, over as sent", "", "", "1", *shares)
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=160)).print(table, highlight=False)


@click.command()
@click.argument("run", type=PATH, metavar="RUN_DIR")
@click.option("--tracking-uri", default=None, help="MLflow's store or server, if RUN_DIR is the id of a run in it.")
@click.option("--json", "as_json", is_flag=True, help="Print each round's record, a JSON line each.")
def watch(run: str, tracking_uri: str | None, as_json: bool) -> None:
    """Follow a run of another process until it ends; an interrupt stops only the watching."""
    from fedlq_ray.federation.events import Closed
    from fedlq_ray.runs import follow, progress
    from fedlq_ray.runs.console import Console

    config, events = (
        follow.mlflow(tracking_uri, run) if tracking_uri and not Path(run).is_dir() else follow.folder(Path(run))
    )
    status = "RUNNING"
    try:
        with progress.watch(config, Console(stderr=as_json), as_json) as show:
            for event in events:
                show(event)
                status = event.status if isinstance(event, Closed) else status
    except KeyboardInterrupt:
        click.echo("the run continues", err=True)
        return
    click.echo(f"{run}: {ENDED.get(status, status.lower())}", err=as_json)


ENDED = {"FINISHED": "finished", "FAILED": "failed, or was killed", "KILLED": "interrupted"}
COMMANDS = (compare, report, recode, watch)
