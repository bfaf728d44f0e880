"""Uniform quantization: one level for all layers of all clients. The default quantizer is stochastic min-max (Suresh et
al., ICML 2017, arXiv:1611.00429) without rotation; its range is per layer, or of the whole with `strategy.scope=model`.

`strategy.bits` may be a fraction: some clients of a cohort then send the level below and the others the level above, so
that a parameter takes that many bits on average over rounds. Each round draws which clients send which level.
"""

import math
from collections.abc import Mapping, Sequence

from fedlq_ray.config import schemes
from fedlq_ray.errors import ConfigError
from fedlq_ray.seeding import numpy_rng
from fedlq_ray.strategies.base import Member, Strategy, StrategyContext
from fedlq_ray.strategies.budgets import LEVELS
from fedlq_ray.training.local import Plan


class Uniform(Strategy):
    """One level for all, with one range per layer or (`strategy.scope=model`) one for the whole vector."""

    timeless = True

    def __init__(self, context: StrategyContext[schemes.Uniform]) -> None:
        self.context = context
        bits = context.config.bits
        if bits < 1:
            raise ConfigError(f"strategy.bits: uniform needs at least 1, got {bits:g}")
        self.below = max(level for level in LEVELS if level <= bits)
        self.above = min(level for level in LEVELS if level >= bits)
        if context.config.scope == "model" and bits > 8:
            raise ConfigError("strategy.bits: scope=model needs at most 8 bits")

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        span = self.above - self.below
        share = (self.context.config.bits - self.below) / span if span else 0.0
        # The count of clients is rounded so that the total over all rounds is within one of share x clients.
        high = math.floor((round + 1) * len(cohort) * share) - math.floor(round * len(cohort) * share)
        order = numpy_rng(self.context.seed, "uniform", round).permutation(len(cohort))
        lucky = {cohort[i].client for i in order[:high]}
        return {m.client: self._at(self.above if m.client in lucky else self.below) for m in cohort}

    def _at(self, bits: int) -> Plan:
        context = self.context
        return Plan(context.config.payload, context.one(context.quantizer_at(bits)), context.error_feedback)
