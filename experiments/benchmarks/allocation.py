"""Allocations of levels compared: time, gap to the bound, and drop over that of one level for all layers.

Tables are random: layers of 10 to 10,000 parameters, of which one has nine tenths in every second table, and drops that
fall fourfold per bit. The budget is exactly the bytes of one level for all layers, which the slowest member of a cohort
gets. Run it alone: `python experiments/benchmarks/allocation.py`; it prints a Markdown table.
"""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.quantization import LAYER_HEADER, MinMax
from fedlq_ray.significance import Allocation, best, bounded, exact, greedy

BITS = (1, 2, 3, 4, 6, 8)
TABLES = 100
Problem = tuple[NDArray[np.float64], NDArray[np.int64], int, float]


def problem(rng: np.random.Generator, layers: int, skewed: bool) -> Problem:
    """Drops and sizes, (layers, 6); the budget in bytes; the drop of the level whose bytes it is."""
    counts = rng.integers(10, 10_000, layers)
    if skewed:
        counts[rng.integers(layers)] = 9 * counts.sum()
    sizes = np.array([[LAYER_HEADER + MinMax(b).size(int(count)) for b in BITS] for count in counts])
    weight, noise = np.exp(2 * rng.normal(size=(layers, 1))), np.exp(0.3 * rng.normal(size=(layers, len(BITS))))
    drops = np.maximum.accumulate((weight * noise * 4.0 ** -np.array(BITS))[:, ::-1], axis=1)[:, ::-1]
    level = rng.integers(0, 4)  # 1 to 4 bits
    return drops, sizes, int(sizes[:, level].sum()), float(drops[:, level].sum())


def timed(allocate: Callable[..., Allocation], *arguments: object) -> tuple[Allocation, float]:
    """An allocation, and the milliseconds that it took."""
    start = time.perf_counter()
    found = allocate(*arguments)
    return found, 1e3 * (time.perf_counter() - start)


def row(layers: int) -> str:
    rng = np.random.default_rng(layers)
    gaps: list[float] = []
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("best", "greedy", "exact")}
    for number in range(TABLES):
        drops, sizes, budget, uniform = problem(rng, layers, number % 2 == 0)
        allocation, bound = bounded(drops, sizes, budget)
        gaps.append(allocation.drop / bound - 1)
        for name, allocate in (("best", best), ("greedy", greedy), ("exact", exact)):
            if name != "exact" or (layers <= 20 and number < 10):
                allocation, ms = timed(allocate, drops, sizes, budget)
                found[name][0].append(allocation.drop / uniform)
                found[name][1].append(ms)
    cells = [str(layers)]
    for name, (ratios, times) in found.items():
        if name != "exact":
            cells += [f"{np.median(ratios):.2f}, {max(ratios):.2f}", f"{np.mean(np.array(ratios) > 1 + 1e-9):.0%}"]
        cells.append(f"{np.median(times):.1f}, {max(times):.1f}" if times else "not tried")
    return "| " + " | ".join([*cells, f"{np.median(gaps):.2%}, {max(gaps):.2%}"]) + " |"


def main() -> None:
    print(
        "| layers | best: drop over one level's, median, most | worse | ms, median, most | greedy: drop | worse | ms "
        "| exact: ms | best above its bound, median, most |\n" + "| --- " * 9 + "|"
    )
    for layers in (4, 20, 60, 160):
        print(row(layers), flush=True)


if __name__ == "__main__":
    main()
