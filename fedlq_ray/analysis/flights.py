"""How clients flew, where a step of the server does not wait for all: timelines, staleness, and who took part."""

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from fedlq_ray.analysis.figures import STYLE, Runs, Shown, canvas, clients_of
from fedlq_ray.federation.record import Record
from fedlq_ray.sweeps.sweep import Finished

ENDS = {"arrived": "#1b9e77", "stopped": "#d95f02", "left": "#7570b3", "dropped_out": "#666666", "failed": "#e7298a"}
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


def shown(runs: Runs) -> list[Shown]:
    """A timeline, and staleness and participation, of the first seed of each run that has flights."""
    found = []
    for label, seeds in runs.items():
        flights = [one for record in seeds[0].records for one in flown(record)]
        if flights:
            found += [_timeline(label, seeds[0]), *_staleness(label, seeds[0], flights), _taking_part(label, seeds[0])]
    return found


def _timeline(label: str, run: Finished) -> Shown:
    """Flights of some clients, over some steps in the middle of the run."""
    records = run.records
    first = max(0, len(records) // 2 - _STEPS // 2)
    some = records[first : first + _STEPS]
    start_s, end_s = (records[first - 1].sim_time_s if first else 0.0), some[-1].sim_time_s
    flights = [one for record in records for one in flown(record) if one.end_s >= start_s and one.start_s <= end_s]
    often = Counter(one.client for one in flights)
    rows = sorted(client for client, _ in often.most_common(_CLIENTS))
    with plt.rc_context(STYLE):
        figure, axis = canvas(1.4 + 0.24 * len(rows))
        for how, colour in ENDS.items():
            own = [one for one in flights if one.how == how and one.client in rows]
            axis.barh(
                [rows.index(one.client) for one in own],
                [one.end_s - one.start_s for one in own],
                left=[one.start_s for one in own],
                color=colour,
                height=0.7,
                linewidth=0.8,
                edgecolor="white",
                label=how.replace("_", " ") if own else None,
            )
        for record in some:
            axis.axvline(record.sim_time_s, color="0.3", linewidth=0.7)
        axis.set_yticks(range(len(rows)), [str(client) for client in rows])
        axis.invert_yaxis()
        axis.set_xlim(start_s, end_s)
        axis.set(xlabel="simulated time, s", ylabel="client")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9.5)
    ends = Counter(one.how for record in records for one in flown(record))
    told = ", ".join(f"{count} {how.replace('_', ' ')}" for how, count in ends.most_common())
    title = f"{label}: {told}"
    caption = (
        f"Flights of {len(rows)} clients in steps {first + 1} to {first + len(some)}, seed {run.config.seed}; a line "
        f"is a step of the server. {_wasted(run)}"
    )
    return Shown(title, caption, f"Bars by client from start to end of each flight. {title}.", figure)


def _wasted(run: Finished) -> str:
    wasted = sum(record.wasted_bytes or 0 for record in run.records)
    total = sum(record.uplink_bytes + record.downlink_bytes for record in run.records)
    return f"Flights that did not arrive transferred {wasted / 1e6:.3g} MB, {wasted / max(1, total):.0%} of all bytes."


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


def _taking_part(label: str, run: Finished) -> Shown:
    """How often a client's updates arrived, against how long it takes."""
    came, seconds = Counter[int](), defaultdict[int, list[float]](list)
    for record in run.records:
        for one in flown(record):
            came[one.client] += one.how == "arrived"
            seconds[one.client].append(one.end_s - one.start_s)
    clients = sorted(seconds)
    typical = np.array([np.mean(seconds[client]) for client in clients])
    counts = np.array([came[client] for client in clients])
    with plt.rc_context(STYLE):
        figure, axis = canvas(3.2)
        axis.scatter(typical, counts, s=22, color=ENDS["arrived"], alpha=0.8, linewidth=0)
        axis.set(xlabel="mean seconds of a client's flight (simulated)", ylabel="updates that arrived")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    order = np.argsort(typical, kind="stable")
    half = len(order) // 2
    fast, slow = counts[order[:half]].sum(), counts[order[len(order) - half :]].sum()
    share = fast / max(1, fast + slow)
    title = f"{label}: the faster half of the clients sends {share:.0%} of the updates"
    never = (len(clients_of(run)) or run.config.clients.count) - len(clients)
    caption = f"A point is a client, seed {run.config.seed}; {never} were never under way."
    return Shown(title, caption, f"Updates against seconds, by client. {title}.", figure)
