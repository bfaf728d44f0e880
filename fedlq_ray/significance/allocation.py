"""Chooses levels for a client's layers under its budget: FedLQ's greedy algorithm, an exact one, and a fast one.

This is a multiple-choice knapsack (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Sizes = NDArray[np.int64]
_LARGE = 5  # layers whose levels are tried in every combination
_ROUNDED = 8  # combinations whose relaxed solutions are rounded


class Allocation(NamedTuple):
    """The index of each layer's level, the total bytes, and the total drop."""

    choice: tuple[int, ...]
    size: int
    drop: float


def _allocation(choice: Sequence[int], drops: Table, sizes: Sizes) -> Allocation:
    rows = np.arange(len(choice))
    columns = np.array(choice)
    return Allocation(tuple(int(c) for c in choice), int(sizes[rows, columns].sum()), float(drops[rows, columns].sum()))


def greedy(drops: Table, sizes: Sizes, budget: float, margins: Table | None = None) -> Allocation:
    """Start at the highest level; lower the layer of least significance by one level until the budget is met.

    Args:
        drops: A_l(b), (L, levels), never rising with the level.
        sizes: bytes of layer l at level b, (L, levels), rising with the level.
        budget: bytes. Layers at the lowest level are skipped; if nothing fits, all end at the lowest level.
        margins: significance of lowering layer l from level b to b - 1, (L, levels - 1); by default the ratio
            [A_l(b') - A_l(b)] / bytes saved.
    """
    if margins is None:
        margins = (drops[:, :-1] - drops[:, 1:]) / np.maximum(sizes[:, 1:] - sizes[:, :-1], 1)
    choice = [drops.shape[1] - 1] * drops.shape[0]
    total = int(sizes[:, -1].sum())
    while total > budget:
        able = [layer for layer, level in enumerate(choice) if level > 0]
        if not able:
            break
        layer = min(able, key=lambda i: (margins[i, choice[i] - 1], i))
        choice[layer] -= 1
        total -= int(sizes[layer, choice[layer] + 1] - sizes[layer, choice[layer]])
    return _allocation(_filled(choice, drops, sizes, budget), drops, sizes)


def _filled(choice: Sequence[int] | NDArray[np.int64], drops: Table, sizes: Sizes, budget: float) -> list[int]:
    """Spends the rest of the budget where it lowers the drop most; a large layer's last step may free too much."""
    levels, rows = np.array(choice), np.arange(len(drops))
    left = budget - sizes[rows, levels].sum()
    gains, costs = drops[rows, levels][:, None] - drops, sizes - sizes[rows, levels][:, None]
    gains = np.where(costs > 0, gains, 0.0)  # to higher levels only
    while True:
        fit = np.where(costs <= left, gains, 0.0)
        layer, lower = divmod(int(fit[:, ::-1].argmax()), drops.shape[1])  # of equal gains, the highest level
        level = drops.shape[1] - 1 - lower
        if fit[layer, level] <= 0:
            return [int(level) for level in levels]
        left -= costs[layer, level]
        levels[layer] = level
        costs[layer] = sizes[layer] - sizes[layer, level]
        gains[layer] = np.where(costs[layer] > 0, drops[layer, level] - drops[layer], 0.0)


def best(drops: Table, sizes: Sizes, budget: float) -> Allocation:
    """Finds nearly the least total drop within the budget, and never more than the best single level for all layers.

    The five layers of most bytes are tried in every combination. For each, the other layers are relaxed: they may mix
    two levels, so that steps along their lower convex hulls of (bytes, drop), the steepest first, are optimal. This
    bounds the optimum from below. The best combinations are rounded down, and what is left of the budget is spent. The
    result is above the bound by less than one step of a relaxed layer; with at most five layers it is the optimum.

    Args:
        drops: A_l(b), (L, levels).
        sizes: bytes of layer l at level b, (L, levels).
        budget: bytes. If nothing fits, all layers get the lowest level.
    """
    return bounded(drops, sizes, budget)[0]


def bounded(drops: Table, sizes: Sizes, budget: float) -> tuple[Allocation, float]:
    """Returns `best`, and a lower bound of any allocation's drop; infinite if nothing fits."""
    if sizes.min(axis=1).sum() > budget:
        return _allocation([0] * len(drops), drops, sizes), np.inf
    by_bytes = np.argsort(-np.ptp(sizes, axis=1), kind="stable")
    large, small = by_bytes[:_LARGE], by_bytes[_LARGE:]
    taken, lost, chosen = _front(drops[large], sizes[large], budget - sizes[small].min(axis=1).sum())
    start, steps = _steps(drops[small], sizes[small])
    spent = np.concatenate([[0.0], np.cumsum([step.size for step in steps])])
    gained = np.concatenate([[0.0], np.cumsum([step.gain for step in steps])])
    rows = np.arange(len(small))
    left = budget - taken - sizes[small][rows, start].sum()
    bound = lost + drops[small][rows, start].sum() - np.interp(left, spent, gained)
    found = [np.full(len(drops), level) for level in np.flatnonzero(sizes.sum(axis=0) <= budget)]
    for at in np.argsort(bound, kind="stable")[:_ROUNDED]:
        choice = np.empty(len(drops), np.int64)
        choice[large], choice[small] = chosen[at], start
        for step in steps[: int(np.searchsorted(spent, left[at], side="right")) - 1]:
            choice[small[step.layer]] = step.level
        found.append(choice)
    full = (_allocation(_filled(choice, drops, sizes, budget), drops, sizes) for choice in found)
    return min(full, key=lambda allocation: (allocation.drop, allocation.size)), float(bound.min())


def _front(drops: Table, sizes: Sizes, budget: float) -> tuple[Sizes, Table, NDArray[np.int64]]:
    """Combinations of levels within the budget that no other beats: bytes (n,), drops (n,), levels (n, L)."""
    levels = drops.shape[1]
    least = np.append(np.cumsum(sizes.min(axis=1)[::-1])[::-1], 0)
    size, drop, chosen = np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int64)
    for layer in range(len(drops)):
        grown, fallen = (size[:, None] + sizes[layer]).ravel(), (drop[:, None] + drops[layer]).ravel()
        fit = np.flatnonzero(grown + least[layer + 1] <= budget)
        order = fit[np.lexsort((fallen[fit], grown[fit]))]
        order = order[fallen[order] < np.minimum.accumulate(np.append(np.inf, fallen[order][:-1]))]
        size, drop = grown[order], fallen[order]
        chosen = np.column_stack([chosen[order // levels], order % levels])
    return size, drop, chosen


class _Step(NamedTuple):
    """A layer's step to a higher level: its drop per byte, its bytes, and the drop that it saves."""

    slope: float
    size: int
    gain: float
    layer: int
    level: int


def _steps(drops: Table, sizes: Sizes) -> tuple[NDArray[np.int64], list[_Step]]:
    """Each layer's first level on its lower convex hull, (L,), and the steps from there, the steepest first."""
    start, steps = [], []
    for layer, (drop, size) in enumerate(zip(drops.tolist(), sizes.tolist(), strict=True)):
        hull: list[_Step] = []
        for level in sorted(range(len(drop)), key=lambda level: (size[level], drop[level])):
            if hull and drop[level] >= drop[hull[-1].level]:
                continue
            step = _Step(np.inf, 0, 0.0, layer, level)
            while hull:
                low = hull[-1].level
                gain, more = drop[low] - drop[level], size[level] - size[low]
                step = _Step(gain / more, more, gain, layer, level)
                if step.slope < hull[-1].slope:
                    break
                hull.pop()
            hull.append(step)
        start.append(hull[0].level)
        steps += hull[1:]
    return np.array(start, np.int64), sorted(steps, key=lambda step: -step.slope)


def exact(drops: Table, sizes: Sizes, budget: float) -> Allocation:
    """Finds the least total drop within the budget: a multiple-choice knapsack over the Pareto front of (bytes, drop).

    It is exact for real-valued drops and whole bytes. If nothing fits, all layers get the lowest level.
    """
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    least_left = np.concatenate([np.cumsum(sizes[::-1].min(axis=1))[::-1][1:], [0]])
    for layer in range(drops.shape[0]):
        grown = sorted(
            (size + int(sizes[layer, c]), drop + float(drops[layer, c]), (*chosen, c))
            for size, drop, chosen in front
            for c in range(drops.shape[1])
            if size + sizes[layer, c] + least_left[layer] <= budget
        )
        front, best = [], np.inf
        for state in grown:
            if state[1] < best:
                front.append(state)
                best = state[1]
    return _allocation(front[-1][2] if front else [0] * drops.shape[0], drops, sizes)
