"""Writes the rows of a comparison as a table: text for a terminal, markdown, or CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedlq_ray.analysis.compare import CONFIDENCE, Interval, Row
from fedlq_ray.analysis.runs import by_population
from fedlq_ray.config.load import Config
from fedlq_ray.federation.metrics import METRICS

MISSING = "–"
Columns = dict[str, list[str]]  # by heading, one cell per row; the first column names the rows


def figure(value: float | None, spread: float | None = None, *, least: int = 0, missing: str = MISSING) -> str:
    """Formats a value with three significant digits, or `least` decimals if these are more; the spread likewise."""
    if value is None:
        return missing
    places = _places(value, least)
    return f"{value:.{places}f}" + ("" if spread is None else f" ± {spread:.{places}f}")


def _places(value: float, least: int = 0) -> int:
    return max(least, 2 - math.floor(math.log10(abs(value) or 1)))


def between(found: Interval | None, scale: float = 1, places: int | None = None) -> str:
    """Formats a value with its interval, such as 6.3 (5.1 to 7.9); if `places` is given, it is a signed difference."""
    if found is None:
        return MISSING
    value, low, high = scale * found.mean, found.low and scale * found.low, found.high and scale * found.high
    sign, places = ("", max(0, _places(value) - 1)) if places is None else ("+", places)
    text = f"{value:{sign}.{places}f}"
    return text if low is None or high is None else f"{text} ({low:{sign}.{places}f} to {high:{sign}.{places}f})"


def columns(table: Sequence[Row], target: float | None) -> Columns:
    """Returns the columns for one population; columns without information are omitted."""

    def figures(key: str, missing: str = MISSING) -> list[str]:
        return [figure(*row.values[key], missing=missing) for row in table]

    made: Columns = {"run": [row.name for row in table]}
    goal = table[0].goal
    finals = [[None if value is None else goal.scale * value for value in row.values[row.final]] for row in table]
    made[goal.label] = [figure(*one, least=2) for one in finals]
    if len(table) > 1 and any(row.accuracy_gain is not None for row in table):
        gains = [between(row.accuracy_gain, goal.scale, places=1 if goal.percent else 3) for row in table]
        made["gain, points" if goal.percent else "difference"] = _own(table, gains)
    for metric in METRICS:
        if metric.column and not metric.of_records:
            made[metric.column] = figures(metric.name)
    if any(row.bits_per_parameter is not None for row in table):
        made["bits/param."] = [figure(row.bits_per_parameter) for row in table]
    if len(table) > 1:
        made["front"] = ["*" if row.front else "" for row in table]
    if target is not None:
        reached = [_reached(row) for row in table]
        seconds, sent = figures("time_to_target_s", ""), figures("uplink_mb_to_target", "")
        made[f"s to {target:.4g}"] = [s or by for s, by in zip(seconds, reached, strict=True)]
        made[f"MB to {target:.4g}"] = [mb or MISSING for mb in sent]
        if len(table) > 1:
            made["speed-up"] = _own(table, [between(row.speed_up) for row in table])
            made["MB saving"] = _own(table, [between(row.mb_saving) for row in table])
        if any(row.to_limit is not None for row in table):
            made["times limit"] = [figure(row.to_limit) for row in table]
        if any(row.gap_closed is not None for row in table):
            made["gap closed, %"] = _own(table, [between(row.gap_closed, 100) for row in table])
    for other in table[0].targets:
        if target is not None and float(other) == target:
            continue
        found = [row.targets[other] for row in table]
        missing = [_of(one.seeds, row.seeds) for one, row in zip(found, table, strict=True)]
        made[f"s to {other}"] = [figure(*f.seconds, missing=m) for f, m in zip(found, missing, strict=True)]
        made[f"MB to {other}"] = [figure(one.mb) for one in found]
    for name, heading in (("equal_mb", "at equal MB"), ("equal_s", "at equal s")):
        cells = [_quality(row, name) for row in table]
        others = [cell for row, cell in zip(table, cells, strict=True) if row.run != row.reference]
        if len(table) > 1 and any(cell != MISSING for cell in others):
            made[f"{'points' if goal.percent else 'difference'} {heading}"] = _own(table, cells)
    for metric in METRICS:
        if metric.column and metric.of_records and any(row.mean(metric.name) is not None for row in table):
            made[metric.column] = figures(metric.name)
    if any(row.failed for row in table):
        made["no result"] = [f"{row.failed} of {row.seeds}" for row in table]
    return made


def _quality(row: Row, name: str) -> str:
    """A row's gain at an equal budget, and the budget."""
    found, goal = row.qualities.get(name), row.goal
    if found is None or found.gain is None:
        return MISSING
    return f"{between(found.gain, goal.scale, places=1 if goal.percent else 3)} at {figure(found.budget)}"


def _flown(table: Sequence[Row]) -> bool:
    """Whether a run is not synchronous."""
    return any(row.mean("staleness") is not None for row in table)


def _own(table: Sequence[Row], cells: Sequence[str]) -> list[str]:
    """Replaces the reference's own cell by "reference"; it is not compared with itself."""
    return ["reference" if row.run == row.reference else cell for row, cell in zip(table, cells, strict=True)]


def _reached(row: Row) -> str:
    return _of(sum(one["time_to_target_s"] is not None for one in row.by_seed), row.seeds)


def _of(reached: int, seeds: int) -> str:
    return f"by {reached} of {seeds}" if reached else "not reached"


def notes(table: Sequence[Row], config: Config, unlike: Mapping[str, Sequence[str]]) -> list[str]:
    """Explains the columns, one sentence each."""
    seeds = max(row.seeds for row in table)
    billed = "uploads" if config.network.bill == "upload" else "uploads and downloads"
    told = [
        f"The simulated clock bills {billed}; MB are what clients sent"
        + (f"; ± is the standard deviation over {seeds} seeds." if seeds > 1 else "; one seed.")
    ]
    if len(table) > 1:
        paired = f", with {CONFIDENCE:.0%} intervals (Student's t, paired by seed)" if seeds > 1 else ""
        base = table[0].reference.removesuffix(f"@{table[0].population}")
        goal = table[0].goal
        more = f"{'more' if goal.higher_is_better else 'less'} {goal.metric.replace('_', ' ')}"
        told.append(f"Gain and speed-up are over {base}{paired}.")
        told.append(f"* front: no run has {more} for as few MB.")
        if any(row.qualities for row in table if row.run != row.reference):
            told.append(
                f"Quality-under-Budget: {goal.metric.replace('_', ' ')} over {base} at equal MB and at equal s, the "
                "most that both reach with every seed, linear between evaluations; not known before the first one."
            )
        if config.target is not None:
            told.append("Cost-to-Target: s and MB to the target; MB saving is a ratio, as speed-up is.")
    if any(row.gap_closed is not None for row in table):
        told.append("Gap closed: the share of the seconds that the run named limit saves; 100 is the limit.")
    if any(row.mean("waiting_s") is not None for row in table):
        told.append("Waits: mean seconds from an update's arrival to its step.")
    if _flown(table):
        told.append(
            "Staleness: mean steps while it was under way. "
            "Wasted: bytes, both ways, of clients whose update did not arrive."
        )
    return told + [f"The runs differ in {path} as well: {', '.join(values)}." for path, values in unlike.items()]


def text(made: Columns, title: str, width: int) -> str:
    """Returns plain text; if the columns exceed `width`, it is split into blocks that start with the run's name."""
    rest = {heading: cells for heading, cells in list(made.items())[1:]}
    names = dict(list(made.items())[:1])
    blocks: list[Columns] = [dict(names)]
    for heading, cells in rest.items():
        if len(blocks[-1]) > 1 and _width(blocks[-1] | {heading: cells}) > width:
            blocks.append(dict(names))
        blocks[-1][heading] = cells
    written = io.StringIO()
    console = Console(file=written, width=max(width, *map(_width, blocks)), color_system=None, markup=False)
    for index, block in enumerate(blocks):
        shown = Table(
            title=title if title and not index else None,
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            title_justify="left",
        )
        for heading in block:
            shown.add_column(heading, justify="left" if heading in names else "right", no_wrap=True)
        for row in zip(*block.values(), strict=True):
            shown.add_row(*row)
        console.print(shown)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def _width(block: Columns) -> int:
    """Width in characters of a table of these columns, with two characters between columns."""
    return sum(max(map(len, [heading, *cells])) + 2 for heading, cells in block.items())


def markdown(made: Columns) -> str:
    """Returns a table in GitHub's markdown."""
    lines = ["| " + " | ".join(made) + " |", "| --- |" + " ---: |" * (len(made) - 1)]
    for cells in zip(*made.values(), strict=True):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def as_csv(table: Sequence[Row]) -> str:
    """Returns all values unrounded, one column each; accuracies are fractions."""
    flat = []
    for row in table:
        kept: dict[str, Any] = {key: value for key, value in row.to_json().items() if key not in ("by_seed", "targets")}
        for target, found in row.targets.items():
            kept |= {f"{key}_to_{target}": value for key, value in found.to_json().items()}
        flat.append(kept)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def written(
    table: Sequence[Row],
    configs: Mapping[str, Config],
    unlike: Mapping[str, Sequence[str]],
    form: str,
    width: int = 200,
) -> str:
    """Returns a comparison in one of the forms text, csv, markdown.

    Args:
        configs: one configuration per label, for its target and its bill.
        unlike: settings that differ although they are not part of a scheme.
    """
    if form == "csv":
        return as_csv(table)
    parts = []
    for where, labels in by_population(row.run for row in table).items():
        block = [row for row in table if row.run in labels]
        config = configs[labels[0]]
        made, told = columns(block, config.target), notes(block, config, unlike)
        if form == "markdown":
            parts.append("\n".join([f"**{where}**\n"] * bool(where) + [markdown(made), " ".join(told)]))
        else:
            parts.append(text(made, where, width) + "\n".join(told))
    return "\n\n".join(parts) + "\n"
