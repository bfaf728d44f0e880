"""What a client's payload may cost: a budget in bytes for each member of a cohort."""

import math
from collections.abc import Callable, Sequence

from fedlq_ray.config import StrategyConfig
from fedlq_ray.quantization import LAYER_HEADER
from fedlq_ray.quantization.rate import OneStep
from fedlq_ray.strategies.base import Member, Setting

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)


def budgets(config: StrategyConfig, cohort: Sequence[Member], bytes_at: Callable[[float], float]) -> list[float]:
    """B_n, bytes of a member's payload, by `strategy.budget`.

    bits: `strategy.bits` for all. deadline, cohort: (tau - fixed_n) R_n, at most the cap; tau is `deadline_s`, or the
    time of the slowest member at `floor_bits`, which every member then has time for.

    Args:
        bytes_at: bytes of a payload at so many bits a parameter.
    """
    if config.budget == "bits":
        return [bytes_at(config.bits)] * len(cohort)
    cap, least = bytes_at(config.cap_bits), 0.0
    if config.budget == "deadline" and config.deadline_s is not None:
        tau = config.deadline_s
    else:
        # The slowest gets `least` by definition: (tau - fixed) R may come out below it by a rounding, or as 0 x inf.
        least = bytes_at(config.floor_bits)
        tau = max((m.fixed_s + least / m.uplink_bytes_per_s for m in cohort), default=0.0)

    def rate(member: Member) -> float:
        if math.isinf(member.uplink_bytes_per_s):
            return cap  # bytes take no time
        return max(0.0, tau - member.fixed_s) * member.uplink_bytes_per_s

    return [float(max(least, min(cap, rate(member)))) for member in cohort]


def bytes_at_levels(setting: Setting, bits: float) -> float:
    """Bytes of a payload in which every layer has `bits`, headers beside them: fractions lie between the levels."""
    below = max((b for b in LEVELS if b <= bits), default=1)
    rest = setting.fixed_size + sum(setting.size(layer, below) for layer in setting.quantized)
    return rest + (bits - below) * sum(layer.size for layer in setting.quantized) / 8


def bytes_at_rate(setting: Setting, bits: float) -> float:
    """Bytes of a payload of `bits` a parameter, its headers among them; buffers, which are float32, come on top."""
    buffers = sum(LAYER_HEADER + 4 * layer.size for layer in setting.layers if layer.buffer)
    return bits * sum(layer.size for layer in setting.quantized) / 8 + buffers


def one_step(setting: Setting, budget: float, weights: Sequence[float] | None = None) -> OneStep:
    """The chooser of step sizes under a budget in bytes; `weights`: sqrt of significance of the quantized layers."""
    chosen = iter(weights if weights is not None else [1.0] * len(setting.quantized))
    return OneStep(
        tuple((layer.start, layer.stop) for layer in setting.layers),
        tuple(0.0 if layer.buffer else next(chosen) for layer in setting.layers),
        budget,
    )
