"""The figures of a report on runs: the title states what a figure shows, and the caption how to read it."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from fedlq_ray import plots
from fedlq_ray.analysis.runs import parameters
from fedlq_ray.federation.record import Record
from fedlq_ray.problems import Goal, goal_of
from fedlq_ray.sweeps.sweep import Finished

Runs = Mapping[str, Sequence[Finished]]
WIDTH = 5.0  # inches; such a figure fills a phone's width
STYLE: Any = {"font.size": 11.5, "axes.labelsize": 11.5, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5}
STYLE["figure.max_open_warning"] = 0  # all figures of a section are drawn before the first is closed
_CONSTANT = 1.1  # if the ratio of most to least bits is smaller, a sentence replaces the heat map


@dataclass(frozen=True)
class Shown:
    """A figure of the report.

    Attributes:
        title: the main finding, as a sentence.
        caption: how to read the figure, and what it omits.
        alt: description of its appearance.
    """

    title: str
    caption: str
    alt: str
    figure: Figure


def canvas(height: float) -> tuple[Figure, Any]:
    with plt.rc_context(STYLE):
        return plt.subplots(figsize=(WIDTH, height), layout="constrained")


def accuracy(runs: Runs, against: str) -> Shown:
    """Plots the main metric against one of plots.AXES."""
    first = next(iter(runs.values()))[0]
    config, goal = first.config, goal_of(first.config.problem, first.summary)
    with plt.rc_context(STYLE):
        figure, axis = canvas(4.0)
        records = {label: [run.records for run in seeds] for label, seeds in runs.items()}
        plots.draw_accuracy(axis, records, config.target, config.network.bill, against, goal)
        axis.set_ylabel(f"test {goal.label}")
    steps = against == "round" and not all(seeds[0].config.synchronous for seeds in runs.values())
    if steps:
        axis.set_xlabel("step of the server")
    name = goal.metric.replace("_", " ").capitalize()
    over = {"time": "simulated time", "bytes": "uplink traffic", "round": "steps" if steps else "rounds"}[against]
    seeds = max(map(len, runs.values()))
    band = f"Line: mean of {seeds} seeds; band: from the minimum to the maximum." if seeds > 1 else "One seed."
    ends = "; ".join(f"{label} ends at {_final(seeds, goal)}" for label, seeds in runs.items())
    arrivals = None if steps else _arrivals(runs, config.target, against, goal)
    title = arrivals or f"{name} against {over}: {ends}"
    band += " Steps take different numbers of updates: compare by time and traffic." * steps
    return Shown(title, band, f"{name} against {over}, one line per run: {ends}.", figure)


def _arrivals(runs: Runs, target: float | None, against: str, goal: Goal) -> str | None:
    """The first and the last run to reach the target, of the runs whose seeds all reached it; None if there is none."""
    arrived: dict[str, float] = {}
    for label, seeds in runs.items():
        found = [one for run in seeds if (one := _first(run, target, against, goal)) is not None]
        if found and len(found) == len(seeds):
            arrived[label] = float(np.mean(found))
    if target is None or not arrived:
        return None
    unit = {"time": "s", "bytes": "MB", "round": "rounds"}[against]
    soonest, latest = min(arrived, key=lambda n: arrived[n]), max(arrived, key=lambda n: arrived[n])
    title = f"{soonest} reaches {goal.named(target).removesuffix(' accuracy')} after {arrived[soonest]:.3g} {unit}"
    return title if soonest == latest else f"{title}, {latest} after {arrived[latest]:.3g}"


def _first(run: Finished, target: float | None, against: str, goal: Goal) -> float | None:
    """Position on an axis of plots.AXES at which a run first reaches a target."""
    xs, values = plots.seen(run.records, against)
    return next((float(x) for x, value in zip(xs, values, strict=True) if goal.reaches(float(value), target)), None)


def _final(seeds: Sequence[Finished], goal: Goal) -> str:
    known = [run.summary[f"final_{goal.metric}"] for run in seeds if run.summary]
    if not known:
        return "no result"
    mean = sum(known) / len(known)
    return f"{100 * mean:.1f} %" if goal.percent else f"{mean:.4g}"


def clients_of(run: Finished) -> list[dict[str, float]]:
    """Returns each client's numbers in clients.csv; an empty list if the run has no such file."""
    file = run.folder / "clients.csv"
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as table:
        return [{key: float(value) for key, value in row.items() if _number(value)} for row in csv.DictReader(table)]


def _count(run: Finished) -> int:
    """The number of clients: that of the settings, or fewer if the data has fewer."""
    return len(clients_of(run)) or run.config.clients.count


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def bits(runs: Runs) -> tuple[list[Shown], list[str]]:
    """Heat maps of bits per parameter, by layer and by client, for runs whose bits vary; sentences for other runs."""
    by_layer = {label: _layer_bits(seeds[0]) for label, seeds in runs.items() if seeds[0].records}
    by_client = {label: _client_bits(seeds[0]) for label, seeds in runs.items() if parameters(seeds[:1])}
    shown: list[Shown] = []
    told: list[str] = []
    varying = {}
    for label in by_layer:
        maps = [by_layer[label][1]] + ([by_client[label]] if label in by_client else [])
        sent = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in maps])
        if len(sent) and sent.max() / sent.min() > _CONSTANT:
            varying[label] = sent
        elif len(sent):
            told.append(f"{label} sends {sent.mean():.3g} bits per parameter in every layer, round and client.")
    if not varying:
        return shown, told
    norm = LogNorm(min(v.min() for v in varying.values()), max(v.max() for v in varying.values()))
    for label in varying:
        seed = runs[label][0].config.seed
        layers, values = by_layer[label]
        turn = runs[label][0].config.turn
        means = np.nanmean(values, 1)
        extremes = f"most for {layers[means.argmax()]} ({means.max():.2g}), least for {layers[means.argmin()]}"
        caption = f"Bits per parameter, mean of the cohort, headers included; seed {seed}."
        title = f"{label}: {extremes} ({means.min():.2g} bits per parameter)"
        shown.append(_heat(values, norm, title, caption, layers, "layer", turn))
        if label not in by_client:
            continue
        clients = clients_of(runs[label][0])
        uplinks = [client["uplink_mbps"] for client in clients] or [0.0] * len(by_client[label])
        order = np.argsort(-np.array(uplinks), kind="stable")
        values = by_client[label][order]
        slow, fast = _half_means(values)
        halves = f"{fast:.2g} bits per parameter on the faster half of the uplinks, {slow:.2g} on the slower"
        both = np.isfinite(slow) and np.isfinite(fast)  # else one half was in no cohort
        shown.append(
            _heat(
                values,
                norm,
                f"{label}: {halves if both else 'bits per parameter by client'}",
                f"Bits of each client's payload, fastest uplink at the top; blank: no payload. Seed {seed}.",
                [str(client) for client in order],
                "client, by uplink",
                turn,
            )
        )
        if both and (cells := _layer_client_bits(runs[label][0], layers)) is not None:
            shown.append(_by_layer_and_client(label, cells[:, order], norm, layers, seed))
    return shown, told


def _by_layer_and_client(
    label: str, values: NDArray[np.float64], norm: LogNorm, layers: Sequence[str], seed: int
) -> Shown:
    """Heat map of how each layer's bits depend on the client's link."""
    ratios = []
    for row in values:
        slow, fast = _half_means(row)
        ratios.append(fast / slow)
    most, least = int(np.nanargmax(ratios)), int(np.nanargmin(ratios))
    gains = f"{ratios[most]:.2g} times as many bits in {layers[most]}, {ratios[least]:.2g} times in {layers[least]}"
    title = f"{label}: the faster half of the uplinks has {gains}"
    caption = f"Bits per parameter of each layer and client, mean of its rounds; fastest uplink left. Seed {seed}."
    return _heat(values, norm, title, caption, layers, "layer", "client, from the fastest uplink to the slowest")


def _half_means(values: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the means over the slower and the faster half of the rows, which are sorted from fast to slow."""
    half = len(values) // 2
    slow, fast = ([v for v in part.ravel() if np.isfinite(v)] for part in (values[half:], values[:half]))
    return float(np.mean(slow)) if slow else np.nan, float(np.mean(fast)) if fast else np.nan


def _layer_bits(run: Finished) -> tuple[list[str], NDArray[np.float64]]:
    """Names of layers, and bits per parameter: (layers, rounds)."""
    names = list(run.records[0].bits_per_parameter)
    rounds = [[record.bits_per_parameter.get(name, np.nan) for name in names] for record in run.records]
    return names, np.array(rounds, float).T


def _client_bits(run: Finished) -> NDArray[np.float64]:
    """Bits per parameter of each client's payload: (clients, rounds); NaN if it sent none."""
    size = parameters([run]) or 1
    total = np.zeros((_count(run), len(run.records)))
    times = np.zeros_like(total)
    for column, record in enumerate(run.records):
        ends = record.client_end or ["arrived"] * len(record.cohort)
        for client, sent, how in zip(record.cohort, record.client_uplink_bytes, ends, strict=True):
            if sent and how == "arrived":  # a client may occur twice
                total[client, column] += 8 * sent / size
                times[client, column] += 1
    return np.divide(total, times, out=np.full_like(total, np.nan), where=times > 0)


def _layer_client_bits(run: Finished, layers: Sequence[str]) -> NDArray[np.float64] | None:
    """Bits per parameter by layer and client, mean of its rounds: (layers, clients), NaN if it sent none. None if the
    journal lacks them, as in earlier versions."""
    total = np.zeros((len(layers), _count(run)))
    times = np.zeros_like(total)
    for record in run.records:
        if not record.client_bits_per_parameter:
            return None
        found = np.array([record.client_bits_per_parameter[layer] for layer in layers], float)
        for column, client in enumerate(record.cohort):  # who may occur twice
            total[:, client] += np.nan_to_num(found[:, column])
            times[:, client] += np.isfinite(found[:, column])
    return np.divide(total, times, out=np.full_like(total, np.nan), where=times > 0)


def _heat(
    values: NDArray[np.float64],
    norm: LogNorm,
    title: str,
    caption: str,
    names: Sequence[str],
    of: str,
    by: str,
) -> Shown:
    with plt.rc_context(STYLE):
        figure, axis = canvas(1.7 + min(0.24 * len(names), 3.4))
        extent = (0.5, values.shape[1] + 0.5, len(names) - 0.5, -0.5)
        image = axis.imshow(values, norm=norm, cmap="viridis", aspect="auto", interpolation="none", extent=extent)
        few = len(names) <= 12
        axis.set_yticks(range(len(names)) if few else [0, len(names) - 1], names if few else ["fastest", "slowest"])
        axis.set(xlabel=by, ylabel=of)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        bar = figure.colorbar(image, label="bits per parameter", orientation="horizontal", aspect=40, pad=0.02)
        least, most = norm.vmin or 0, norm.vmax or 0
        levels = [level for level in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32) if least <= level <= most]
        bar.ax.xaxis.set_minor_formatter(NullFormatter())
        bar.set_ticks(levels, labels=[f"{level:g}" for level in levels])
    return Shown(title, caption, f"Heat map, {of} by {by}. {title}.", figure)


def significance(runs: Runs) -> list[Shown]:
    """Plots the significance of each layer over rounds, for the runs that measure it."""
    shown = []
    for label, seeds in runs.items():
        seen = [
            (record.round + 1, record.report["significance"])
            for record in seeds[0].records
            if record.report.get("significance")
        ]
        if not seen:
            continue
        rounds, names = [at for at, _ in seen], list(seen[-1][1])
        values = np.array([[found[name] for name in names] for _, found in seen])
        with plt.rc_context(STYLE):
            figure, axis = canvas(3.6)
            ends = []
            for index, name in enumerate(names):
                colour = plots.COLOURS[index % len(plots.COLOURS)]
                line = np.where(values[:, index] > 0, values[:, index], np.nan)
                axis.plot(rounds, line, color=colour, linestyle=plots.DASHES[index % len(plots.DASHES)], linewidth=1.8)
                if np.isfinite(line[-1]):
                    ends.append((rounds[-1], float(line[-1]), name, colour))
            cost, per = _of_significance(seeds[0])
            axis.set(xlabel=seeds[0].config.turn, ylabel=f"{cost} per {per}", yscale="log")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
            plots.name_ends(axis, ends)
        last = dict(zip(names, values[-1], strict=True))
        top = max(last, key=lambda name: last[name])
        caption = (
            f"Cost of quantizing a layer in {cost}, per {per}; running average of probes, "
            f"seed {seeds[0].config.seed}. Values at or below zero are noise and are omitted."
        )
        title = f"{label}: {top} matters most at the end"
        ordered = ", ".join(f"{name} {plots.short(last[name])}" for name in sorted(last, key=lambda n: -last[n]))
        shown.append(Shown(title, caption, f"Lines by layer over rounds, logarithmic. At the end: {ordered}.", figure))
    return shown


def _of_significance(run: Finished) -> tuple[str, str]:
    """Returns the numerator and the denominator of a run's significance, in words."""
    strategy = run.config.strategy
    metric = getattr(strategy, "metric", None)
    return "loss" if metric in (None, "loss", "fisher", "taylor", "hawq") else str(metric), (
        "squared error" if strategy.name == "fedlq_rd" else "memory saved"
    )


def timelines(runs: Runs) -> list[Shown]:
    """Shows how clients spent one round of each run; it is the same round of the same seed for all runs."""
    runs = {label: seeds for label, seeds in runs.items() if seeds[0].config.synchronous}  # the others: flights.py
    first = next((seeds[0] for seeds in runs.values() if seeds[0].records), None)
    if first is None:
        return []
    ends = np.array([record.sim_time_s for record in first.records])
    lengths = np.diff(ends, prepend=0.0)
    typical = int(np.argsort(lengths)[len(lengths) // 2])
    found = [_timeline(label, seeds[0], typical) for label, seeds in runs.items() if len(seeds[0].records) > typical]
    return [one for one in found if one]


def _steps(record: Record) -> NDArray[np.float64]:
    """Seconds of each step of `plots.STEPS`: (members, 3)."""
    return np.array([getattr(record, f"client_{step}_s") for step in plots.STEPS]).T


def _timeline(label: str, run: Finished, round: int) -> Shown | None:
    steps = _steps(run.records[round])
    if not steps.size or not steps.sum():
        return None
    members = np.array(run.records[round].cohort)
    order = np.argsort(-steps.sum(1), kind="stable")
    last, total = order[0], steps.sum(1).max()
    cause = list(plots.STEPS)[int(steps[last].argmax())]
    clients = clients_of(run)
    with plt.rc_context(STYLE):
        figure, axis = canvas(1.0 + 0.26 * len(order))
        left = np.zeros(len(order))
        for step, colour in plots.STEPS.items():
            lengths = steps[order, list(plots.STEPS).index(step)]
            axis.barh(range(len(order)), lengths, left=left, color=colour, height=0.72, linewidth=0)
            left += lengths
        names = [f"{c} ({clients[c]['uplink_mbps']:.2g} Mb/s)" if clients else str(c) for c in members[order]]
        axis.set_yticks(range(len(order)), names)
        axis.invert_yaxis()
        axis.set(xlabel="seconds of the round (simulated)", ylabel="client (uplink)")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    share = steps[last].max() / total
    mean = steps.sum(1).mean() / total
    title = f"{label}: client {members[last]} ends round {round + 1} after {total:.3g} s, {share:.0%} of it {cause}"
    caption = f"{_stragglers(run, clients)} On average, a client is busy for {mean:.0%} of this round."
    alt = f"Bars by client of the round's seconds: download, compute, upload. {title}. {caption}"
    return Shown(title, caption, alt, figure)


def _stragglers(run: Finished, clients: Sequence[Mapping[str, float]]) -> str:
    """States which client was last most often, and in which step the last clients spent most of their time."""
    last: dict[int, int] = {}
    spent = np.zeros(len(plots.STEPS))
    for record in run.records:
        steps = _steps(record)
        if steps.size and steps.sum():
            slowest = int(steps.sum(1).argmax())
            client = record.cohort[slowest]
            last[client] = last.get(client, 0) + 1
            spent += steps[slowest]
    worst = max(last, key=lambda client: last[client])
    has = ""
    if clients:
        has = f" ({clients[worst]['uplink_mbps']:.2g} Mb/s up, {clients[worst]['compute_gflops']:.2g} GFLOP/s)"
    main = int(spent.argmax())
    return (
        f"Client {worst}{has} was last in {last[worst]} of {len(run.records)} rounds of seed {run.config.seed}; "
        f"{list(plots.STEPS)[main]} took {spent[main] / spent.sum():.0%} of the last client's time over all rounds."
    )


def labels(run: Finished) -> Shown | None:
    """Heat map of training samples by client and class; None if the folder has no clients.csv."""
    clients = clients_of(run)
    names = [key for key in (clients[0] if clients else {}) if key.startswith("label_")]
    if not names:
        return None
    counts = np.array([[client[name] for name in names] for client in clients]).T
    with plt.rc_context(STYLE):
        figure, axis = canvas(3.4)
        image = axis.imshow(np.where(counts > 0, counts, np.nan), aspect="auto", cmap="viridis", interpolation="none")
        axis.set(xlabel="client", ylabel="class")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, label="samples", orientation="horizontal", aspect=40, pad=0.02)
    half = np.median([(np.sort(column)[::-1].cumsum() < column.sum() / 2).sum() + 1 for column in counts.T])
    title = f"The median client has half of its samples in {half:.0f} class{'es' if half > 1 else ''}"
    sizes = counts.sum(0)
    data = run.config.data
    how = f"{data.partition}({data.alpha:g})" if data.partition in ("dirichlet", "quantity") else data.partition
    span = f"{sizes.min():.0f} to {sizes.max():.0f} per client"
    caption = f"Training samples, {how}, seed {run.config.seed}: {span}; blank: none."
    return Shown(title, caption, f"Heat map, class by client. {title}. {caption}", figure)
