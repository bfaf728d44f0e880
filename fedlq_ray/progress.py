"""What a user sees of a run: a live line on a terminal, a plain line a round otherwise, JSON for machines."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fedlq_ray.config import Config


@contextmanager
def watch(
    config: Config, console: Console | None = None, as_json: bool = False
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes a run's events and shows them, on a terminal of 80 columns or in a notebook.

    `with watch(config) as show: simulate(config, watch=show)`
    """
    sent = 0
    console = console or Console()
    name = f"{config.name}-{config.seed}"
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=6),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=as_json or not (console.is_terminal or console.is_jupyter),
    )
    bar = progress.add_task(name if len(name) <= 16 else f"{name[:15]}…", total=config.rounds, figures="starting")

    def show(event: dict[str, Any]) -> None:
        nonlocal sent
        if as_json:
            if "record" in event:
                print(json.dumps(event["record"]), flush=True)
            return
        if "hosting" in event:
            actors = f", {event['actors']} actors" if event["actors"] else ""
            console.print(f"{config.name}: hosting {event['hosting']}{actors} ({event['why']})", highlight=False)
        if "stopping" in event:
            console.print(f"{config.name}: stopping; interrupt again to end at once", highlight=False)
        if "resumed" in event:
            console.print(f"{config.name}: goes on after round {event['resumed']}", highlight=False)
            sent = sum(record["uplink_bytes"] for record in event["records"])
        if "restarted" in event:
            console.print(f"{config.name}: {event['restarted']}; starting it again", highlight=False)
            sent = 0
        if "record" not in event:
            return
        record = event["record"]
        sent += record["uplink_bytes"]
        seen = "–" if record["accuracy"] is None else f"{record['accuracy']:.4f}"
        if progress.disable:
            figures = f"accuracy {seen}  {record['sim_time_s']:.1f} simulated s  {sent / 1e6:.2f} MB"
            console.print(f"{config.name} round {record['round'] + 1}/{config.rounds}  {figures}", highlight=False)
        figures = f"acc. {seen}  {_short(record['sim_time_s'])} sim. s  {_short(sent / 1e6)} MB"
        progress.update(bar, completed=record["round"] + 1, figures=figures)

    with progress:
        yield show


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
