"""L-GreCo. Markov, Alimohammadi, Frantar, Alistarh, "L-GreCo: layerwise-adaptive gradient compression for efficient
data-parallel deep learning", MLSys 2024, arXiv:2210.17357: the smallest payload whose error, the sum over layers of
|x_l - Q(x_l)|, is at most alpha times that of one level for all; by dynamic programming over 10^4 buckets of error.

In the authors' code (we read its hook for low-rank compression), one worker finds the levels at intervals, from
gradients averaged over the last tenth of the interval, and all workers use them. Errors are rounded up to buckets, so
the constraint holds exactly.
Departs from it: the server finds the levels, from the mean of the last updates. Errors are one draw of stochastic
rounding. If no levels within the constraint are smaller than the reference, the reference is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.strategies.base import Member, RoundResult, Strategy, StrategyContext
from fedlq_ray.strategies.costs import BITS, Table, layer_sizes, require_update, squared_errors
from fedlq_ray.training.local import Plan

BUCKETS = 10_000


@dataclass(frozen=True)
class Chosen:
    """The levels by layer, and the sum of the updates since the window began."""

    levels: list[int]
    seen: Tensor | None = None


class LGreCo(Strategy[Chosen]):
    """Levels by layer that take fewer bytes than `bits` for all layers, with at most alpha times the error.

    Args:
        bits: the reference, 1 to 8; also the level before the first adjustment.
        alpha: allowed error, as a multiple of the reference's.
        every: rounds between adjustments.
        window: the number of last rounds before an adjustment whose mean updates are averaged.
    """

    timeless = True

    def __init__(
        self, context: StrategyContext, bits: int = 4, alpha: float = 1.0, every: int = 10, window: int = 1
    ) -> None:
        require_update(context)
        if bits not in BITS or not alpha > 0 or not 1 <= window <= every:
            raise ValueError(f"bits must be 1 to 8, alpha above 0, window 1 to every; got {bits, alpha, window, every}")
        self.context, self.bits, self.alpha, self.every, self.window = context, bits, alpha, every, window
        self.sizes = layer_sizes(context, BITS)

    def init(self) -> Chosen:
        return Chosen([self.bits] * len(self.context.quantized))

    def plan(self, state: Chosen, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        plan = self.context.at_levels(state.levels)
        return {member.client: plan for member in cohort}

    def learn(self, state: Chosen, round: int, result: RoundResult) -> Chosen:
        step, seen = round % self.every, state.seen
        if step >= self.every - self.window:
            seen = result.update.clone() if seen is None else seen + result.update
        if step < self.every - 1 or seen is None:
            return Chosen(state.levels, seen)
        errors = np.sqrt(squared_errors(self.context, seen / self.window, BITS))
        reference = BITS.index(self.bits)
        found = smallest(errors, self.sizes, self.alpha * float(errors[:, reference].sum()))
        rows = np.arange(len(state.levels))
        if found is None or self.sizes[rows, found].sum() >= self.sizes[:, reference].sum():
            found = [reference] * len(state.levels)
        return Chosen([BITS[c] for c in found])


def smallest(errors: Table, sizes: NDArray[np.int64], target: float, buckets: int = BUCKETS) -> list[int] | None:
    """The columns of least total size whose errors sum to at most the target; None if there are none.

    Args:
        errors, sizes: of each layer at each level, (L, levels).
    """
    none = buckets + 1
    units = np.ceil(errors * (buckets / target)) if target > 0 else np.where(errors > 0, none, 0)
    costs = np.minimum(units, none).astype(np.int64)
    best, picks = np.zeros(none), np.zeros((len(errors), none), np.int64)  # least size by error allowed
    for layer, row in enumerate(costs):
        tried = np.full((len(row), none), np.inf)
        for level, cost in enumerate(row):
            tried[level, cost:] = best[: none - cost] + sizes[layer, level]
        picks[layer], best = tried.argmin(axis=0), tried.min(axis=0)
    if not np.isfinite(best[-1]):
        return None
    found, left = [], buckets
    for layer in reversed(range(len(errors))):
        found.append(int(picks[layer, left]))
        left -= int(costs[layer, found[-1]])
    return found[::-1]
