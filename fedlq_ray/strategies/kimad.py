"""Kimad+. Xin, Ilin, Zhang, Canini, Richtarik, "Kimad: adaptive gradient compression with bandwidth awareness",
DistributedML 2023, arXiv:2312.08053: the levels of least squared error, summed over layers, whose bits fit bandwidth x
time; a knapsack, solved by dynamic programming over discretised errors.

We could check the abstract and the number of error steps, 1000, of a public re-implementation; the rest comes from the
project's notes.
Departs from it: levels are `strategy.levels` of quantizers, where the paper has top-k. Error feedback follows
`strategy.error_feedback`, where the paper has EF21. Bandwidth is the client's mean, where the paper monitors it. Errors
are one draw of stochastic rounding. The knapsack is `significance.exact` on errors in steps of a thousandth of the
greedy solution's: this keeps its table short, and costs at most a thousandth for each layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.config import schemes
from fedlq_ray.quantization import Segment
from fedlq_ray.significance import Allocation, exact, greedy
from fedlq_ray.strategies.base import Member, Strategy, StrategyContext
from fedlq_ray.strategies.budgets import budgets, bytes_at_levels, in_time
from fedlq_ray.strategies.costs import Table, layer_sizes, squared_errors
from fedlq_ray.training.local import Plan

STEPS = 1000


@dataclass(frozen=True)
class ByError:
    """A client's choice: the levels of least squared error on the values to send, within a payload's bytes."""

    context: StrategyContext[schemes.Kimad]
    budget: float

    def __call__(self, vector: Tensor) -> tuple[Segment, ...]:
        levels = self.context.config.levels
        # A lower level may have a luckier draw; errors that rise with the level are chance, so make them monotone.
        errors = np.maximum.accumulate(squared_errors(self.context, vector, levels)[:, ::-1], axis=1)[:, ::-1]
        room = self.budget - self.context.fixed_size
        found = least_error(errors, layer_sizes(self.context, levels), room)
        return self.context.segments([self.context.quantizer_at(levels[c]) for c in found.choice])


def least_error(errors: Table, sizes: NDArray[np.int64], room: float) -> Allocation:
    """The levels of least summed error whose sizes fit; the lowest for all layers if nothing fits.

    Args:
        errors, sizes: of each layer at each level, (L, levels).
        room: bytes.
    """
    first = greedy(errors, sizes, room)
    if first.drop == 0 or first.size > room:
        return first
    # No better solution has a layer whose error exceeds the greedy total.
    steps = np.where(errors > first.drop, 1e12, np.floor(errors * (STEPS / first.drop)))
    choice = exact(steps, sizes, room).choice
    drop = float(errors[np.arange(len(errors)), list(choice)].sum())
    size = int(sizes[np.arange(len(sizes)), list(choice)].sum())
    return Allocation(choice, size, drop) if size <= room and drop < first.drop else first


class Kimad(Strategy):
    """Each client finds levels by layer for its own update, within the bytes that its link can send in time.

    Args:
        round_s: simulated seconds from a round's start to the end of the upload; None: a budget by `strategy.budget`.
    """

    def __init__(self, context: StrategyContext[schemes.Kimad], round_s: float | None = None) -> None:
        if round_s is not None and not round_s > 0:
            raise ValueError(f"round_s must be above 0, got {round_s}")
        self.context, self.round_s = context, round_s
        self.cheapest = context.fixed_size + int(layer_sizes(context, context.config.levels)[:, 0].sum())

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        config = self.context.config
        if self.round_s is None:
            limits = budgets(config, cohort, round, partial(bytes_at_levels, self.context), cheapest=self.cheapest)
        else:
            top = bytes_at_levels(self.context, config.levels[-1])
            limits = [min(top, in_time(member, self.round_s, top)) for member in cohort]
        return {
            member.client: Plan(config.payload, ByError(self.context, limit), self.context.error_feedback)
            for member, limit in zip(cohort, limits, strict=True)
        }
