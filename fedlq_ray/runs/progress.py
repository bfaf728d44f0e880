"""Shows a run's progress: a live line on a terminal, else a plain line per round, or JSON for machines."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from fedlq_ray.config.load import Config
from fedlq_ray.federation.events import Closed, Event, Hosting, Prepared, Restarted, Resumed, RoundDone, Stopping
from fedlq_ray.federation.metrics import of_rounds
from fedlq_ray.problems import goal_of
from fedlq_ray.runs.console import Console
from fedlq_ray.runs.output import short

_WIDE = 112  # columns of a terminal that staleness and waste fit on as well


def bars(console: Console, hidden: bool = False) -> Progress:
    """A progress display with one line per run, on a terminal or in a notebook."""
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
def watch(config: Config, console: Console | None = None, as_json: bool = False) -> Iterator[Callable[[Event], None]]:
    """Yields a function that shows a run's events, on a terminal of 80 columns or in a notebook.

    `with watch(config) as show: simulate(config, watch=show)`
    """
    with bars(console or Console(), as_json) as progress:
        yield line(config, progress, as_json)


def line(config: Config, progress: Progress, as_json: bool = False) -> Callable[[Event], None]:
    """Like `watch`, for one of several runs that are shown together."""
    totals, figures = dict[str, float](), ""
    metric = goal_of(config.problem).metric
    console, name = progress.console, f"{config.name}-{config.seed}"
    bar = progress.add_task(name if len(name) <= 16 else f"{name[:15]}…", total=config.rounds, figures="starting")

    def say(text: str, **options: Any) -> None:
        console.print(f"{name}: {text}", highlight=False, markup=False, **options)

    def show(event: Event) -> None:
        nonlocal figures, metric
        if as_json:
            if isinstance(event, RoundDone):
                print(json.dumps(event.record.to_json()), flush=True)
            return
        match event:
            case Prepared(notes, ceiling):
                for text in filter(None, ("; ".join(notes), ceiling)):
                    say(text, soft_wrap=True)
            case Hosting(kind, why, actors):
                say(f"hosting {kind}{f', {actors} actors' if actors else ''} ({why})")
            case Stopping():
                say("stopping; interrupt again to end at once")
            case Resumed(records):
                say(f"resumes after {config.turn} {len(records)}")
                for record in records:
                    of_rounds(record, totals)
            case Restarted(fault):
                say(f"{fault}; starting it again")
                totals.clear()
            case Closed():
                progress.remove_task(bar)
                if not progress.disable:
                    say(figures)
            case RoundDone(record):
                values = of_rounds(record, totals)
                sent, more = values["uplink_mb"], _of_flights(values)
                seen = "–" if record.main is None else f"{record.main:.4f}"
                metric = metric if record.accuracy is not None else next(iter(record.metrics), metric)
                named = "acc." if metric == "accuracy" else metric
                figures = f"{named} {seen}  {short(record.sim_time_s)} sim. s  {short(sent)} MB"
                figures += more if console.width >= _WIDE else ""
                progress.update(bar, completed=record.round + 1, figures=figures)
                if progress.disable:
                    told = f"{metric} {seen}  {record.sim_time_s:.1f} simulated s  {sent:.2f} MB{more}"
                    at = f"{config.turn} {record.round + 1}/{config.rounds}"
                    console.print(f"{name} {at}  {told}", highlight=False, markup=False, soft_wrap=True)

    return show


def _of_flights(values: Mapping[str, float]) -> str:
    """Staleness and waste of a step, where it has them: a synchronous round has neither."""
    old, wasted = values.get("staleness"), values.get("wasted_mb")
    told = "" if old is None else f"  staleness {short(old)}"
    return told + ("" if wasted is None else f"  {short(wasted)} MB wasted")
