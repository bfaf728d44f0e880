"""What a user sees of a run: a live line on a terminal, a plain line a round otherwise, JSON for machines."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fedlq_ray.config import Config
from fedlq_ray.output import Console


def bars(console: Console, hidden: bool = False) -> Progress:
    """A line for each run that is shown on it, where there is a terminal or a notebook."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=6),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=hidden or not (console.is_terminal or console.is_jupyter),
    )


@contextmanager
def watch(
    config: Config, console: Console | None = None, as_json: bool = False
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes a run's events and shows them, on a terminal of 80 columns or in a notebook.

    `with watch(config) as show: simulate(config, watch=show)`
    """
    with bars(console or Console(), as_json) as progress:
        yield line(config, progress, as_json)


def line(config: Config, progress: Progress, as_json: bool = False) -> Callable[[dict[str, Any]], None]:
    """The same for one run of several that are shown at a time."""
    sent, figures = 0, ""
    console, name = progress.console, f"{config.name}-{config.seed}"
    bar = progress.add_task(name if len(name) <= 16 else f"{name[:15]}…", total=config.rounds, figures="starting")

    def show(event: dict[str, Any]) -> None:
        nonlocal sent, figures
        if as_json:
            if "record" in event:
                print(json.dumps(event["record"]), flush=True)
            return
        if event.get("started"):
            told = f"{name}: {'; '.join(event['started'])}"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
        if "hosting" in event:
            actors = f", {event['actors']} actors" if event["actors"] else ""
            console.print(f"{name}: hosting {event['hosting']}{actors} ({event['why']})", highlight=False, markup=False)
        if "stopping" in event:
            console.print(f"{name}: stopping; interrupt again to end at once", highlight=False, markup=False)
        if "resumed" in event:
            console.print(f"{name}: goes on after round {event['resumed']}", highlight=False, markup=False)
            sent = sum(record["uplink_bytes"] for record in event["records"])
        if "restarted" in event:
            console.print(f"{name}: {event['restarted']}; starting it again", highlight=False, markup=False)
            sent = 0
        if "closed" in event:
            progress.remove_task(bar)
            if not progress.disable:
                console.print(f"{name}: {figures}", highlight=False, markup=False)
        if "record" not in event:
            return
        record = event["record"]
        sent += record["uplink_bytes"]
        seen = "–" if record["accuracy"] is None else f"{record['accuracy']:.4f}"
        figures = f"acc. {seen}  {_short(record['sim_time_s'])} sim. s  {_short(sent / 1e6)} MB"
        progress.update(bar, completed=record["round"] + 1, figures=figures)
        if progress.disable:
            told = f"accuracy {seen}  {record['sim_time_s']:.1f} simulated s  {sent / 1e6:.2f} MB"
            console.print(f"{name} round {record['round'] + 1}/{config.rounds}  {told}", highlight=False, markup=False)

    return show


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
