"""FedLQ-RD, ours: FedLQ's budgets, and under them rates that are continuous.

Where FedLQ picks a whole number of bits for each layer, this picks one step size for each client, divided by the root
of a layer's significance, so that the entropy-coded payload just fits the client's budget (ARCHITECTURE.md). Error
feedback carries what was lost; the reconstruction is the one of least error, so that it contracts.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fedlq_ray.strategies.base import Member, Setting, Strategy
from fedlq_ray.strategies.budgets import budgets, bytes_at_rate
from fedlq_ray.strategies.ecsq import one_step
from fedlq_ray.training import Plan


class FedLQRD(Strategy):
    """One step size for each client, from its budget."""

    error_feedback = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def plan(self, round: int, cohort: Sequence[Member], evaluation: Any = None) -> Mapping[int, Plan]:
        setting = self.setting
        limits = budgets(setting.config, cohort, partial(bytes_at_rate, setting))
        return {
            member.client: Plan(setting.config.payload, one_step(setting, limit), setting.error_feedback)
            for member, limit in zip(cohort, limits, strict=True)
        }
