"""FedLQ-RD, ours: FedLQ's budgets, and under them rates that are continuous.

Where FedLQ picks a whole number of bits for each layer, this picks one step size for each client, divided by the root
of a layer's significance, so that the entropy-coded payload just fits the client's budget (ARCHITECTURE.md). Error
feedback carries what was lost; the reconstruction is the one of least error, so that it contracts.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fedlq_ray.strategies.base import Member, News, Setting, Strategy
from fedlq_ray.strategies.budgets import budgets, bytes_at_rate, one_step, taking_part
from fedlq_ray.training import Plan

# Normalised squared error at so many bits a parameter, on a client's real update (docs/quantizers.md).
RATES = (0.0, 0.02, 0.05, 0.1, 0.28, 0.8, 1.53, 3.0, 4.0)
ERRORS = (1.0, 0.9, 0.78, 0.65, 0.40, 0.177, 0.058, 0.008, 0.002)


class FedLQRD(Strategy):
    """One step size for each client, from its budget."""

    error_feedback = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.spread = 1.0  # News.spread of the last round

    def plan(self, round: int, cohort: Sequence[Member], evaluation: Any = None) -> Mapping[int, Plan]:
        setting, config = self.setting, self.setting.config
        least = bytes_at_rate(setting, config.floor_bits or RATES[1])
        limits = taking_part(config, cohort, self.budgets(cohort), least, bytes_at_rate(setting, RATES[1]))
        return {
            client: Plan(config.payload, one_step(setting, limit), setting.error_feedback)
            for client, limit in limits.items()
        }

    def budgets(self, cohort: Sequence[Member]) -> list[float]:
        """B_n, bytes of a payload."""
        return budgets(self.setting.config, cohort, partial(bytes_at_rate, self.setting), self.noise)

    def least_bytes(self, cohort: Sequence[Member]) -> float:
        return min(self.budgets(cohort))

    def noise(self, bits: float) -> float:
        """Squared error at a rate. With error feedback it is made good later: what it then adds to the rounds goes as
        q / (1 - q)^2 (Karimireddy et al., ICML 2019, Theorem II); a heuristic, outside our theorem."""
        q = float(np.exp(np.interp(bits, RATES, np.log(ERRORS))))
        return self.spread * (q / (1 - q) ** 2 if self.setting.error_feedback else q)

    def learn(self, round: int, news: News) -> None:
        self.spread = news.spread if news.spread is not None else self.spread


class EcsqFixed(FedLQRD):
    """ECSQ with error feedback: one step size for all layers, entropy-coded, `strategy.bits` bits a parameter for
    every client, headers included. Our strongest fixed-rate baseline; no significance, no budgets. Reverse
    water-filling over layers as in any text on rate-distortion theory (Cover and Thomas, section 10.3)."""

    timeless = True

    def budgets(self, cohort: Sequence[Member]) -> list[float]:
        return [bytes_at_rate(self.setting, self.setting.config.bits)] * len(cohort)
