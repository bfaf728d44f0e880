"""AdaQuantFL. Jhunjhunwala, Gadhikar, Joshi, Eldar, "Adaptive quantization of model updates for communication-efficient
federated learning", ICASSP 2021, arXiv:2102.04487: s_k = ceil(s_0 sqrt(f(w_0) / f(w_k))) quantization levels.

s counts levels, the steps between 0 and the norm, not bits. We checked the formula against public code by the authors
of DAdaQuant; the default s_0 is from memory.
Departs from it: f is the cohort's mean training loss of the previous round (the paper asks all clients for theirs), and
f(w_0) that of the first round with a loss. Each layer has its own norm, unless `strategy.scope=model`. s has an upper
limit, unlike in the paper, because a loss may come near 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlq_ray.quantization import Quantizer
from fedlq_ray.quantization.qsgd_elias import QsgdElias
from fedlq_ray.strategies.base import Member, RoundResult, Strategy, StrategyContext
from fedlq_ray.training.local import Plan


@dataclass(frozen=True)
class Progress:
    """The first round's loss, and the levels of the next round."""

    first_loss: float | None
    levels: int


class AdaQuantFL(Strategy[Progress]):
    """More levels as the training loss falls.

    Args:
        s0: levels of the first round.
        s_max: maximum number of levels.
    """

    timeless = True

    def __init__(self, context: StrategyContext, s0: int = 2, s_max: int = 1024) -> None:
        if not 1 <= s0 <= s_max:
            raise ValueError(f"s0 must be 1 to s_max ({s_max}), got {s0}")
        self.context, self.s0, self.s_max = context, s0, s_max

    def init(self) -> Progress:
        return Progress(None, self.s0)

    def plan(self, state: Progress, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        plan = same_for_all(self.context, QsgdElias(levels=state.levels, bucket=None, norm="l2"))
        return {member.client: plan for member in cohort}

    def learn(self, state: Progress, round: int, result: RoundResult) -> Progress:
        if result.train_loss is None:
            return state
        first = result.train_loss if state.first_loss is None else state.first_loss
        # A loss of 0 asks for more levels than there are; limit the loss before the ratio becomes an int.
        wanted = self.s0 * math.sqrt(max(first, 0.0) / max(result.train_loss, 1e-12))
        return Progress(first, max(1, min(self.s_max, math.ceil(wanted))))

    def report(self, state: Progress) -> dict[str, Any]:
        return {"quantization_levels": state.levels}


def same_for_all(context: StrategyContext, quantizer: Quantizer) -> Plan:
    """A plan with one quantizer, applied per layer or (`strategy.scope=model`) to all layers at once."""
    return Plan(context.config.payload, context.one(quantizer), context.error_feedback)
