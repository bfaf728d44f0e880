"""How clients flew, where a step of the server does not wait for all: timelines, staleness, and who took part."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from fedlq_ray import plots
from fedlq_ray.analysis.figures import STYLE, Runs, Shown, canvas, clients_of
from fedlq_ray.federation.record import Record
from fedlq_ray.sweeps.sweep import Finished

ENDS = dict(
    zip(
        ("arrived", "stopped", "left", "failed", "dropped_out"),
        (plots.COLOURS[2], plots.COLOURS[1], plots.COLOURS[3], plots.COLOURS[4], plots.MUTED),
        strict=True,
    )
)
_SILENT = (
    "failed",
    "dropped_out",
)  # these send nothing: a flight may be too short to be seen, so that its end is marked
_CLIENTS, _STEPS = 16, 14  # of a timeline


class Flown(NamedTuple):
    """A flight that has ended."""

    client: int
    start_s: float
    end_s: float
    how: str
    staleness: int


def flown(record: Record) -> list[Flown]:
    """The flights of a step's record; none in a synchronous run."""
    times = zip(record.client_download_s, record.client_compute_s, record.client_upload_s, strict=True)
    rows = zip(record.cohort, record.client_start_s, times, record.client_end, record.client_staleness, strict=False)
    return [Flown(client, start, start + sum(own), how, old) for client, start, own, how, old in rows if how in ENDS]


class Pace(NamedTuple):
    """How fast a client is, and how many of its updates arrived.

    Attributes:
        seconds: mean of its flights that arrived; if none did, of its longest one, which it would have exceeded.
    """

    seconds: float
    arrived: int


def paces(flights: Iterable[Flown]) -> Mapping[int, Pace]:
    """The pace of each client that was under way, the fastest first. A flight that was cut short says less."""
    whole, cut = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
    for one in flights:
        (whole if one.how == "arrived" else cut)[one.client].append(one.end_s - one.start_s)
    found = {client: Pace(max(seconds), 0) for client, seconds in cut.items()}
    found |= {client: Pace(float(np.mean(seconds)), len(seconds)) for client, seconds in whole.items()}
    return dict(sorted(found.items(), key=lambda one: (one[1].seconds, one[0])))


def shown(runs: Runs) -> list[Shown]:
    """A timeline, and staleness and participation, of the first seed of each run that has flights."""
    found = []
    for label, seeds in runs.items():
        flights = [one for record in seeds[0].records for one in flown(record)]
        if flights:
            found += [_timeline(label, seeds[0], flights), *_staleness(label, seeds[0], flights)]
            found.append(_taking_part(label, seeds[0], flights))
    return found


def _timeline(label: str, run: Finished, flights: list[Flown]) -> Shown:
    """Flights of some clients, of all paces, over some steps in the middle of the run."""
    first = max(0, len(run.records) // 2 - _STEPS // 2)
    some = run.records[first : first + _STEPS]
    start_s, end_s = (run.records[first - 1].sim_time_s if first else 0.0), some[-1].sim_time_s
    inside = [one for one in flights if one.end_s >= start_s and one.start_s <= end_s]
    there = {one.client for one in inside}
    order = [client for client in paces(flights) if client in there]
    spread = np.linspace(0, len(order) - 1, min(_CLIENTS, len(order))).round().astype(int)
    rows = {order[at]: row for row, at in enumerate(spread)}
    with plt.rc_context(STYLE):
        figure, axis = canvas(1.4 + 0.24 * len(rows))
        for how, colour in ENDS.items():
            own = [one for one in inside if one.how == how and one.client in rows]
            if own:
                _bars(axis, rows, own, colour, how)
        for record in some:
            axis.axvline(record.sim_time_s, color="black", linewidth=0.6)
        axis.set_yticks(range(len(rows)), [str(client) for client in rows])
        axis.invert_yaxis()
        axis.set_xlim(start_s, end_s)
        axis.set(xlabel="simulated time, s", ylabel="client")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9.5)
    ends = Counter(one.how for one in flights)
    lost = "".join(f"{count} {how.replace('_', ' ')}, " for how, count in ends.most_common() if how != "arrived")
    title = f"{label}: {_arrivals(ends)}{_wasted(run)}"
    caption = (
        f"Flights of {len(rows)} clients in steps {first + 1} to {first + len(some)}, the fastest on top, seed "
        f"{run.config.seed}; a line is a step of the server. "
        + (f"Over all steps: {lost[:-2]}. " if lost else "")
        + "Clients still under way at the end are not shown."
    )
    return Shown(title, caption, f"Bars by client from start to end of each flight. {title}.", figure)


def _bars(axis: Any, rows: Mapping[int, int], flights: list[Flown], colour: str, how: str) -> None:
    """Flights that ended alike, one row per client; ends without a payload are also marked."""
    at, lengths = [rows[one.client] for one in flights], [one.end_s - one.start_s for one in flights]
    axis.barh(
        at,
        lengths,
        left=[one.start_s for one in flights],
        color=colour,
        height=0.7,
        linewidth=0.8,
        edgecolor="white",
        label=how.replace("_", " "),
    )
    if how in _SILENT:
        axis.plot([one.end_s for one in flights], at, "x", color=colour, markersize=5)


def _arrivals(ends: Mapping[str, int]) -> str:
    arrived, total = ends["arrived"], sum(ends.values())
    return f"all {total} flights arrived" if arrived == total else f"{arrived} of {total} flights arrived"


def _wasted(run: Finished) -> str:
    wasted = sum(record.wasted_bytes or 0 for record in run.records)
    total = sum(record.uplink_bytes + record.downlink_bytes for record in run.records)
    return f", {wasted / 1e6:.3g} MB ({wasted / total:.0%} of all bytes) were wasted" if wasted else ""


def _staleness(label: str, run: Finished, flights: list[Flown]) -> list[Shown]:
    """A histogram, if any update was stale."""
    old = np.array([one.staleness for one in flights if one.how == "arrived"])
    if not old.any():
        return []
    counts = np.bincount(old)
    with plt.rc_context(STYLE):
        figure, axis = canvas(2.8)
        axis.bar(range(len(counts)), counts, color=ENDS["arrived"], width=0.8)
        axis.set(xlabel="staleness of an update, steps", ylabel="updates")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    title = f"{label}: updates are {old.mean():.3g} steps old in the mean, {old.max()} at most"
    caption = f"All updates that arrived, seed {run.config.seed}."
    return [Shown(title, caption, f"Histogram of staleness. {title}.", figure)]


def _taking_part(label: str, run: Finished, flights: list[Flown]) -> Shown:
    """How often a client's updates arrived, against how long it takes."""
    found = paces(flights)
    with plt.rc_context(STYLE):
        figure, axis = canvas(3.2)
        for face, some in (("full", [p for p in found.values() if p.arrived]), ("none", _never(found))):
            xs, ys = [pace.seconds for pace in some], [pace.arrived for pace in some]
            axis.plot(xs, ys, "o", color=ENDS["arrived"], fillstyle=face, markersize=4.5, clip_on=False)
        axis.set(xlabel="mean seconds of a client's flight (simulated)", ylabel="updates that arrived")
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    counts = [pace.arrived for pace in found.values()]
    half = len(counts) // 2
    fast, slow = sum(counts[:half]), sum(counts[len(counts) - half :])
    share = fast / max(1, fast + slow)
    title = f"{label}: the faster half of the clients sends {share:.0%} of the updates"
    idle = (len(clients_of(run)) or run.config.clients.count) - len(found)
    caption = f"A point is a client, seed {run.config.seed}."
    if _never(found):
        caption += " Hollow: no update arrived; the longest flight before it ended."
    if idle:
        caption += f" {idle} clients were never under way."
    return Shown(title, caption, f"Updates against seconds, by client. {title}.", figure)


def _never(found: Mapping[int, Pace]) -> list[Pace]:
    return [pace for pace in found.values() if not pace.arrived]
