"""FedLQ-RD, ours: FedLQ's budgets, and under them rates that are continuous.

Where FedLQ picks a whole number of bits for each layer, this picks one step size for each client, divided by the root
of a layer's significance, so that the entropy-coded payload just fits the client's budget (ARCHITECTURE.md). Error
feedback carries what was lost; the reconstruction is the one of least error, so that it contracts.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fedlq_ray.strategies.base import Member, Setting, Strategy
from fedlq_ray.strategies.budgets import budgets, bytes_at_rate, one_step
from fedlq_ray.training import Plan


class FedLQRD(Strategy):
    """One step size for each client, from its budget."""

    error_feedback = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def plan(self, round: int, cohort: Sequence[Member], evaluation: Any = None) -> Mapping[int, Plan]:
        setting = self.setting
        return {
            member.client: Plan(setting.config.payload, one_step(setting, limit), setting.error_feedback)
            for member, limit in zip(cohort, self.budgets(cohort), strict=True)
        }

    def budgets(self, cohort: Sequence[Member]) -> list[float]:
        """B_n, bytes of a payload."""
        return budgets(self.setting.config, cohort, partial(bytes_at_rate, self.setting))

    def least_bytes(self, cohort: Sequence[Member]) -> float:
        return min(self.budgets(cohort))


class EcsqFixed(FedLQRD):
    """ECSQ with error feedback: one step size for all layers, entropy-coded, `strategy.bits` bits a parameter for
    every client, headers included. Our strongest fixed-rate baseline; no significance, no budgets. Reverse
    water-filling over layers as in any text on rate-distortion theory (Cover and Thomas, section 10.3)."""

    def budgets(self, cohort: Sequence[Member]) -> list[float]:
        return [bytes_at_rate(self.setting, self.setting.config.bits)] * len(cohort)
