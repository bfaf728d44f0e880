"""What a user sees of a run: a live line on a terminal, a plain line a round otherwise, JSON for machines."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fedlq_ray.config import Config


@contextmanager
def watch(config: Config, console: Console, as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes a run's events (as `simulate` calls it) and shows them."""
    sent = 0
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=as_json or not console.is_terminal,
    )
    bar = progress.add_task(f"{config.name}-{config.seed}", total=config.rounds, figures="starting")

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
        figures = f"accuracy {seen}  {record['sim_time_s']:.1f} simulated s  {sent / 1e6:.2f} MB"
        if progress.disable:
            console.print(f"{config.name} round {record['round'] + 1}/{config.rounds}  {figures}", highlight=False)
        progress.update(bar, completed=record["round"] + 1, figures=figures)

    with progress:
        yield show
