"""Chooses levels for a client's layers under its budget: FedLQ's greedy algorithm, and an exact one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


class Allocation(NamedTuple):
    """The index of each layer's level, the total bytes, and the total drop."""

    choice: tuple[int, ...]
    size: int
    drop: float


def _allocation(choice: Sequence[int], drops: Table, sizes: NDArray[np.int64]) -> Allocation:
    rows = np.arange(len(choice))
    columns = np.array(choice)
    return Allocation(tuple(int(c) for c in choice), int(sizes[rows, columns].sum()), float(drops[rows, columns].sum()))


def greedy(drops: Table, sizes: NDArray[np.int64], budget: float, margins: Table | None = None) -> Allocation:
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


def _filled(choice: list[int], drops: Table, sizes: NDArray[np.int64], budget: float) -> list[int]:
    """Spend the rest of the budget where it lowers the drop most; a large layer's last step may free too many bytes."""
    total = sum(int(sizes[i, c]) for i, c in enumerate(choice))
    while True:
        best: tuple[float, int, int] | None = None
        for layer, level in enumerate(choice):
            for higher in range(level + 1, drops.shape[1]):
                gain = float(drops[layer, level] - drops[layer, higher])
                if total + sizes[layer, higher] - sizes[layer, level] <= budget and gain > 0:
                    best = max(best or (0.0, 0, 0), (gain, -layer, higher))
        if best is None:
            return choice
        layer, higher = -best[1], best[2]
        total += int(sizes[layer, higher] - sizes[layer, choice[layer]])
        choice[layer] = higher


def exact(drops: Table, sizes: NDArray[np.int64], budget: float) -> Allocation:
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
