"""ECSQ with error feedback: one step size for all layers, entropy-coded, at one rate for all clients.

Our strongest fixed-rate baseline; no significance, no budgets. Reverse water-filling over layers as in any text on
rate-distortion theory (Cover and Thomas, Elements of Information Theory, section 10.3).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlq_ray.quantization.rate import OneStep
from fedlq_ray.strategies.base import Member, Setting, Strategy
from fedlq_ray.strategies.budgets import bytes_at_rate
from fedlq_ray.training import Plan


class EcsqFixed(Strategy):
    """`strategy.bits` bits a parameter, headers included, for every client."""

    error_feedback = True
    timeless = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def plan(self, round: int, cohort: Sequence[Member], evaluation: Any = None) -> Mapping[int, Plan]:
        setting = self.setting
        choice = one_step(setting, bytes_at_rate(setting, setting.config.bits))
        plan = Plan(setting.config.payload, choice, setting.error_feedback)
        return {member.client: plan for member in cohort}


def one_step(setting: Setting, budget: float, weights: Sequence[float] | None = None) -> OneStep:
    """The chooser of step sizes under a budget in bytes; `weights`: sqrt of significance of the quantized layers."""
    chosen = iter(weights if weights is not None else [1.0] * len(setting.quantized))
    return OneStep(
        tuple((layer.start, layer.stop) for layer in setting.layers),
        tuple(0.0 if layer.buffer else next(chosen) for layer in setting.layers),
        budget,
    )
