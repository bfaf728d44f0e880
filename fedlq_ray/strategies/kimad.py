"""Kimad+. Xin, Ilin, Zhang, Canini, Richtarik, "Kimad: adaptive gradient compression with bandwidth awareness",
DistributedML 2023, arXiv:2312.08053: the least squared error, summed over layers, whose bits fit bandwidth x time; a
knapsack by dynamic programming over discretised errors.

We could check the abstract and a public re-implementation's number of error steps, 1000; the rest is as the project's
notes have it.
Departs from it: levels of `strategy.levels` for quantizers, where the paper has top-k; error feedback by
`strategy.error_feedback`, where it has EF21; bandwidth is the client's mean, where it is monitored; errors are one draw
of stochastic rounding. The knapsack is `significance.exact` on errors in steps of a thousandth of the greedy
solution's: that keeps its table short, and costs at most a thousandth for each layer.
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
from fedlq_ray.strategies.base import Member, Setting, Strategy
from fedlq_ray.strategies.budgets import budgets, bytes_at_levels, in_time
from fedlq_ray.strategies.costs import Table, layer_sizes, squared_errors
from fedlq_ray.training.local import Plan

STEPS = 1000


@dataclass(frozen=True)
class ByError:
    """A client's choice: the levels of least squared error, on what it has to send, within a payload's bytes."""

    setting: Setting[schemes.Kimad]
    budget: float

    def __call__(self, vector: Tensor) -> tuple[Segment, ...]:
        levels = self.setting.config.levels
        # A draw may be luckier at a lower level; an error that rises with the level would be rounding's chance.
        errors = np.maximum.accumulate(squared_errors(self.setting, vector, levels)[:, ::-1], axis=1)[:, ::-1]
        room = self.budget - self.setting.fixed_size
        found = least_error(errors, layer_sizes(self.setting, levels), room)
        return self.setting.segments([self.setting.quantizer_at(levels[c]) for c in found.choice])


def least_error(errors: Table, sizes: NDArray[np.int64], room: float) -> Allocation:
    """The levels of least summed error whose sizes fit; all at the lowest where nothing fits.

    Args:
        errors, sizes: of each layer at each level, (L, levels).
        room: bytes.
    """
    first = greedy(errors, sizes, room)
    if first.drop == 0 or first.size > room:
        return first
    # A layer's error above the greedy total is in no better solution.
    steps = np.where(errors > first.drop, 1e12, np.floor(errors * (STEPS / first.drop)))
    choice = exact(steps, sizes, room).choice
    drop = float(errors[np.arange(len(errors)), list(choice)].sum())
    size = int(sizes[np.arange(len(sizes)), list(choice)].sum())
    return Allocation(choice, size, drop) if size <= room and drop < first.drop else first


class Kimad(Strategy):
    """Levels by layer that each client finds for its own update, as many bytes as its link sends in time.

    Args:
        round_s: simulated seconds from a round's start to the end of the upload; None: a budget by `strategy.budget`.
    """

    def __init__(self, setting: Setting[schemes.Kimad], round_s: float | None = None) -> None:
        if round_s is not None and not round_s > 0:
            raise ValueError(f"round_s must be above 0, got {round_s}")
        self.setting, self.round_s = setting, round_s
        self.cheapest = setting.fixed_size + int(layer_sizes(setting, setting.config.levels)[:, 0].sum())

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        config = self.setting.config
        if self.round_s is None:
            limits = budgets(config, cohort, partial(bytes_at_levels, self.setting), cheapest=self.cheapest)
        else:
            top = bytes_at_levels(self.setting, config.levels[-1])
            limits = [min(top, in_time(member, self.round_s, top)) for member in cohort]
        return {
            member.client: Plan(config.payload, ByError(self.setting, limit), self.setting.error_feedback)
            for member, limit in zip(cohort, limits, strict=True)
        }
