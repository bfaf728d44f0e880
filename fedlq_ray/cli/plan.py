"""The command that says what a run will take: plan."""

import json
from typing import Any

import click

from fedlq_ray.cli.arguments import ARGUMENTS, split
from fedlq_ray.runs.output import short


@click.command()
@ARGUMENTS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def plan(arguments: tuple[str, ...], as_json: bool) -> None:
    """Say what a run will take, before it is trained.

    For each client: how long its upload takes at float32, as a multiple of its computing, and the most that compression
    of uploads alone can gain in simulated time. For a round of the configured strategy: bytes and simulated seconds,
    exactly, at most, or about. For this machine: wall time and memory, from a few batches that are trained.

    Settings are those of `fedlq run`. Nothing is written.
    """
    from fedlq_ray.config import load as configuration

    config = configuration.load(*split(arguments))  # before imports that take seconds
    from fedlq_ray.runs.forecast import forecast

    found = forecast(config)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    from rich.table import Table

    from fedlq_ray.runs.console import Console

    table = Table(title=f"{config.name}: {config.strategy.name}", show_header=False, title_justify="left")
    for what, figure in _rows(found):
        table.add_row(what, figure)
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=120)).print(table, highlight=False)
    for note in found.notes:
        click.echo(note)


def _rows(found: Any) -> list[tuple[str, str]]:
    """What the table says, by line."""
    turn, sure = found.turn, "" if found.known == "exactly" else f"{found.known} "
    rows = []
    if most := found.ceiling:
        names = ("least", "10 %", "median", "90 %", "most")
        ratios = ", ".join(f"{name} {short(value)}" for name, value in zip(names, most.ratios, strict=True))
        free = f"{short(most.float32_s)} simulated s; {short(most.free_s)} s if uploads took no time"
        rows = [
            ("upload at float32 / computing, by client", ratios),
            (f"a {turn} at float32", free),
            ("compression of uploads alone", f"at most {short(most.gain)} times as fast"),
        ]
    low, middle, high = (f"{size:,.0f}" for size in found.payload_bytes)
    sent, fetched = found.uplink_bytes, found.downlink_bytes
    known = f"mean of {found.steps}, {'known exactly' if found.known == 'exactly' else found.known}"
    rows += [
        ("a client's payload", f"{sure}{high} bytes" + ("" if low == high else f" (from {low}, median {middle})")),
        (
            f"a {turn} ({known})",
            f"{sent / 1e6:.3g} MB sent, {fetched / 1e6:.3g} MB fetched, {found.seconds:.3g} simulated s",
        ),
        (
            f"the run, {found.rounds} {turn}s",
            f"{sure}{sent * found.rounds / 1e6:.3g} MB sent, {sure}{found.seconds * found.rounds:.4g} simulated s",
        ),
    ]
    wall = "wall time not known" if found.wall_s is None else f"about {_wall(found.wall_s)}"
    memory = "" if found.memory_bytes is None else f", about {found.memory_bytes / 1e9:.2g} GB of memory"
    processes = f"{found.workers} process{'es' if found.workers > 1 else ''}"
    return [*rows, (f"this machine, {processes} training", wall + memory)]


def _wall(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
