"""AdaGQ. Liu, He, Cao, "Communication-efficient federated learning for heterogeneous edge devices based on adaptive
gradient quantization", INFOCOM 2023, arXiv:2212.08272.

Over time: compare the loss drop per second at s and at s' = floor(s / 2) levels. s_hat is s' if it does better, else
2 s (eq. 9). Then follow the gradient's norm: s = s_hat + lambda (log2 |g_k| - log2 |g_(k-1)|), lambda = 1. By client:
bits b_n with which all clients finish at once, c_n + b_n d / R_n = tau, where b = floor(log2 s + 1) and the clients'
mean number of levels is s.
Departs from it: the second of every three rounds tries s', because a client reports one training loss per round, and
the effect of a round shows in the loss of the next; the paper tries both on the same gradient. The third round uses s
and ends with the decision. Bits are 1..8, by `strategy.quantizer`, and bytes are those of the wire. g_k is the mean
update, and k counts decisions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlq_ray.strategies.base import Member, RoundResult, Strategy, StrategyContext
from fedlq_ray.strategies.budgets import bytes_at_levels
from fedlq_ray.training.local import Plan

_MOST = 255.0  # levels of 8 bits


@dataclass(frozen=True)
class Trials:
    """Results of up to three rounds.

    Attributes:
        s: levels.
        before: loss and seconds of the previous round.
        rates: (loss drop per second, levels), for s and for its half.
        norm: of the mean update at the last decision.
    """

    s: float
    before: tuple[float, float] | None = None
    rates: list[tuple[float, float]] = field(default_factory=list)
    norm: float | None = None


class AdaGQ(Strategy[Trials]):
    """Bits follow loss, time and gradient norm, and are distributed so that no client waits for another.

    Args:
        s0: initial levels; 255 levels are 8 bits.
        lam: levels added when the norm doubles.
    """

    def __init__(self, context: StrategyContext, s0: float = _MOST, lam: float = 1.0) -> None:
        if not 1 <= s0 <= 255:
            raise ValueError(f"s0 must be 1 to 255, got {s0}")
        self.context, self.s0, self.lam = context, float(s0), lam

    def init(self) -> Trials:
        return Trials(self.s0)

    def plan(self, state: Trials, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        bits = equalised(self.context, cohort, levels_of(state, round))
        plans = {b: self.context.at_levels([b] * len(self.context.quantized)) for b in set(bits)}
        return {member.client: plans[b] for member, b in zip(cohort, bits, strict=True)}

    def learn(self, state: Trials, round: int, result: RoundResult) -> Trials:
        rates = [] if round % 3 == 0 else state.rates
        if round % 3 and state.before is not None and result.train_loss is not None:
            loss, seconds = state.before
            rates = [*rates, ((loss - result.train_loss) / max(seconds, 1e-12), levels_of(state, round - 1))]
        before = None if result.train_loss is None else (result.train_loss, result.round_time_s)
        if len(rates) < 2:
            return Trials(state.s, before, rates, state.norm)
        norm = float(result.update.double().norm())
        change = math.log2(norm / state.norm) if state.norm and norm > 0 else 0.0
        (rate, _), (half_rate, half) = rates
        better = half if half_rate > rate else 2 * state.s
        return Trials(min(_MOST, max(1.0, better + self.lam * change)), before, rates, norm)

    def report(self, state: Trials) -> dict[str, Any]:
        return {"quantization_levels": state.s}


def levels_of(state: Trials, round: int) -> float:
    """Levels of a round: s, or half of it in the second of every three rounds."""
    return max(1.0, state.s // 2) if round % 3 == 1 else state.s


def equalised(context: StrategyContext, cohort: Sequence[Member], levels: float) -> list[int]:
    """b_n of each member, 1..8: all finish at the same time, with this many levels on average before rounding down."""
    if any(math.isinf(m.uplink_bytes_per_s) for m in cohort):
        return [math.floor(math.log2(levels) + 1)] * len(cohort)
    each = (bytes_at_levels(context, 8) - bytes_at_levels(context, 1)) / 7
    rest = bytes_at_levels(context, 1) - each
    most = math.log2(_MOST) + 1

    def at(tau: float) -> list[float]:
        return [min(most, max(1.0, ((tau - m.fixed_s) * m.uplink_bytes_per_s - rest) / each)) for m in cohort]

    low, high = 0.0, max(m.fixed_s + bytes_at_levels(context, 9) / m.uplink_bytes_per_s for m in cohort)
    for _ in range(60):  # the mean rises with tau, so bisection finds it to far below a bit
        middle = (low + high) / 2
        mean = sum(2 ** (bits - 1) for bits in at(middle)) / len(cohort)
        low, high = (middle, high) if mean < levels else (low, middle)
    return [math.floor(bits + 1e-6) for bits in at(high)]
