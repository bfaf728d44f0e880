"""Compares the convergence bound's charge for quantization with the training loss of runs.

A run records one term of Theorem 1 (docs/theory.md) up to a constant: L / (lr tau) sum p_n^2 |Q(x_n) - x_n|^2, whose
errors clients measure. It does not know the smoothness L, the noise or the heterogeneity of a network's losses. So the
bound can rank runs, but cannot be compared with gradients.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

from fedlq_ray import plots
from fedlq_ray.analysis import figures
from fedlq_ray.analysis.figures import STYLE, Runs, Shown, canvas
from fedlq_ray.config.load import Config
from fedlq_ray.strategies import STRATEGIES
from fedlq_ray.sweeps.sweep import Finished
from fedlq_ray.training.sgd import samples_of, steps_of

Known = Mapping[str, tuple[np.ndarray, np.ndarray]]  # charge and training loss of each seed, by run


def shown(runs: Runs) -> Shown | None:
    """Plots each run's charge, and its training loss relative to the run with the least charge: means over the rounds
    and seeds that all runs have. None if fewer than two runs have both."""
    recorded = {label: {run.config.seed: run for run in seeds if _recorded(run)} for label, seeds in runs.items()}
    recorded = {label: by_seed for label, by_seed in recorded.items() if by_seed}
    common = sorted(set.intersection(*map(set, recorded.values()))) if recorded else []
    rounds = min((len(by_seed[seed].records) for by_seed in recorded.values() for seed in common), default=0)
    known = {label: _means([by_seed[seed] for seed in common], rounds) for label, by_seed in recorded.items()}
    if len(known) < 2 or not rounds or not any(charges.any() for charges, _ in known.values()):
        return None
    least = min(charges[charges > 0].min() for charges, _ in known.values() if charges.any())
    none = least / 4  # the position of runs without error: a logarithmic axis has no zero
    base = min(known, key=lambda label: known[label][0].mean())
    fed_back = [label for label in known if _feedback(runs[label][0].config)]
    with plt.rc_context(STYLE):
        figure, axis = canvas(4.0)
        ends = []
        for index, label in enumerate(runs):
            if label not in known:
                continue
            charges, losses = known[label][0], known[label][1] - known[base][1]
            x, y = max(float(charges.mean()), none), float(losses.mean())
            colour = plots.COLOURS[index % len(plots.COLOURS)]
            spans = np.array([[v.mean() - v.min(), v.max() - v.mean()] for v in (charges, losses)])[:, :, None]
            face = "none" if label in fed_back else colour
            bars = {"xerr": spans[0], "yerr": spans[1], "elinewidth": 1.2}
            axis.errorbar(x, y, **bars, marker="o", markersize=8, mfc=face, color=colour)
            ends.append((x, y, label, colour))
        most = max(x for x, *_ in ends)
        axis.set_xscale("log")
        axis.set_xlim(none / 2, most * (most / none) ** 0.45)  # room for the last name
        if any(not charges.any() for charges, _ in known.values()):
            ticks = [10.0**e for e in range(int(np.ceil(np.log10(least))), int(np.floor(np.log10(most))) + 1)]
            axis.set_xticks([none, *ticks], ["0", *[f"{tick:g}" for tick in ticks]])
            axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(y=0.12)
        axis.set(xlabel="bound's charge for quantization, per unit of L", ylabel=f"training loss minus {base}'s")
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        plots.name_ends(axis, ends)
    title = _title(known)
    means = {label: (x.mean(), (y - known[base][1]).mean()) for label, (x, y) in known.items()}
    told = "; ".join(f"{label} {x:.2g} and {y:+.2g}" for label, (x, y) in means.items())
    return Shown(
        title,
        _caption(runs, known, rounds, common, fed_back),
        f"One point per run: charge, and loss minus {base}'s. {told}.",
        figure,
    )


def _recorded(run: Finished) -> bool:
    """Whether a run has finished, and has the records that the charge is computed from."""
    has = all(record.quantization_error is not None for record in run.records)
    return run.summary is not None and has and bool(figures.clients_of(run))


def _means(seeds: Sequence[Finished], rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Charge per unit of L, and training loss, of each seed."""
    found = []
    for run in seeds:
        train, shards = run.config.train, [int(client["samples"]) for client in figures.clients_of(run)]
        charges, losses = [], []
        for record in run.records[:rounds]:
            if not record.answered or record.quantization_error is None or record.train_loss is None:
                continue
            done = dict(zip(record.cohort, record.client_samples, strict=True))
            taken = [steps_of(shards[client], done[client], train) for client in record.answered]
            steps = np.average(taken, weights=[samples_of(shards[client], train) for client in record.answered])
            charges.append(record.quantization_error**2 / (train.lr * steps))
            losses.append(record.train_loss)
        found.append((np.mean(charges), np.mean(losses)) if charges else (0.0, np.nan))
    charge, loss = np.array(found).T
    return charge, loss


def _feedback(config: Config) -> bool:
    own = getattr(STRATEGIES.get(config.strategy.name), "error_feedback", False)
    return bool(own if config.strategy.error_feedback is None else config.strategy.error_feedback)


def _title(known: Known) -> str:
    """The number of pairs of runs that the bound orders as training did, of those that every seed orders the same."""
    right = told = 0
    for (first, lost), (second, other) in itertools.combinations(known.values(), 2):
        signs = np.sign(lost - other)
        if len(set(signs)) == 1 and signs[0] and first.mean() != second.mean():
            told += 1
            right += signs[0] == np.sign(first.mean() - second.mean())
    if not told:
        return "No two runs can be distinguished by training loss with these seeds"
    alone = max(len(lost) for _, lost in known.values()) == 1
    which = "pairs of runs, by one seed" if alone else "pairs of runs that the seeds distinguish"
    return f"The run that is charged more trains worse in {right} of {told} {which}"


def _caption(runs: Runs, known: Known, rounds: int, seeds: Sequence[int], fed_back: Sequence[str]) -> str:
    """Explains the charge, and why it is not a bound here."""
    configs = [runs[label][0].config for label in known]
    rates = {runs[label][0].config.train.lr for label in known}
    over = f"bars over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"of seed {seeds[0]}"
    parts = [
        "Theorem 1's term for quantization, L/(lr × steps) Σ p²|Q(x) − x|², over L, as clients measured it; mean of "
        f"{rounds} rounds, {over}. L is not known, so this ranks runs but is not a bound."
    ]
    if len(rates) > 1:
        parts.append("Learning rates differ, and so do the bound's other terms.")
    beyond = {
        "sampled cohorts": any(c.clients.cohort < c.clients.count for c in configs),
        "clients with more steps than others": any(c.data.partition != "iid" for c in configs),
        "stale updates": any(c.continuous for c in configs),
        "clients that drop out": any(c.clients.dropout > 0 for c in configs),
        "clients that a step does not wait for": any(not c.synchronous and not c.continuous for c in configs),
        "clipped gradients": any(c.train.max_grad_norm is not None for c in configs),
        "a local training of their own": any(c.train.local is not None for c in configs),
        "another optimizer than SGD": any(c.train.optimizer != "sgd" for c in configs),
        "a learning rate that falls": any(c.train.lr_schedule != "constant" for c in configs),
        "momentum": any(c.train.momentum > 0 for c in configs),
        "a proximal term": any(c.train.prox_mu > 0 for c in configs),
        "a server's optimizer": any(c.server.optimizer != "none" for c in configs),
        "a coded downlink": any(c.network.downlink_bits is not None for c in configs),
    }
    if any(beyond.values()):
        parts.append(f"Outside the theorem: {', '.join(name for name, here in beyond.items() if here)}.")
    if fed_back:
        parts.append(f"Hollow: error feedback ({', '.join(fed_back)}), which sends the error later.")
    if missing := [label for label in runs if label not in known]:
        parts.append(f"Missing: {', '.join(missing)} (not recorded, or not finished).")
    return " ".join(parts)
