"""Budgets: how many bytes each member of a cohort may send, and which members are late."""

import math
from collections.abc import Callable, Sequence

from fedlq_ray.config.schemes import Budgeted, Late
from fedlq_ray.errors import ConfigError
from fedlq_ray.quantization import LAYER_HEADER, PAYLOAD_HEADER, Ecsq
from fedlq_ray.quantization.rate import OneStep
from fedlq_ray.strategies.base import Member, Setting

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
FLOORS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
Bytes = Callable[[float], float]  # of a payload, by bits per parameter
Noise = Callable[[float], float]  # squared error of a payload by bits per parameter, over the mean update's square


def budgets(
    config: Budgeted,
    cohort: Sequence[Member],
    bytes_at: Bytes,
    noise: Noise | None = None,
    cheapest: float = 0.0,
) -> list[float]:
    """B_n, bytes of a member's payload, by `strategy.budget`.

    bits: `strategy.bits` for all. deadline, cohort: (tau - fixed_n) R_n, at most the cap. tau is `deadline_s`, or the
    time of the slowest member at the floor, but at no less than `cheapest` bytes, the smallest payload that can be
    planned; so every member has time for at least as many bytes. The floor is `floor_bits`, or else the rate that
    minimises tau x (1 + noise_cost x sum_n p_n^2 noise(b_n)): simulated seconds per round, times the growth of the
    bound on convergence (docs/theory.md) with the levels, up to a factor. It is the cap if no lower rate can be sent.
    Without `noise`, the noise is that of min-max on a Gaussian.
    """
    if config.budget == "bits":
        return [bytes_at(config.bits)] * len(cohort)
    if not cohort:
        return []
    cap = bytes_at(config.cap)
    if config.budget == "deadline" and config.deadline_s is not None:
        return [min(cap, in_time(m, config.deadline_s, cap)) for m in cohort]

    def at_floor(bits: float) -> tuple[float, list[float]]:
        least = max(cheapest, min(cap, bytes_at(bits)))
        tau = max(m.fixed_s + least / m.uplink_bytes_per_s for m in cohort)
        # The slowest gets `least` by definition, but rounding may put (tau - fixed) R below it.
        return tau, [float(max(least, min(cap, in_time(m, tau, cap)))) for m in cohort]

    if config.floor_bits is not None:
        return at_floor(config.floor_bits)[1]
    noise = noise or minmax_noise
    zero, one = bytes_at(1e-9), bytes_at(1.0)
    total = sum(m.samples for m in cohort)

    def cost(bits: float) -> float:
        tau, limits = at_floor(bits)
        rates = [(limit - zero) / (one - zero) for limit in limits]
        heard = sum((m.samples / total) ** 2 * noise(max(bits, rate)) for m, rate in zip(cohort, rates, strict=True))
        return tau * (1 + config.noise_cost * heard)

    possible = [b for b in FLOORS if b <= config.cap and math.isfinite(noise(b))]
    return at_floor(min(possible, key=cost, default=config.cap))[1]


def sent_in_equal_time(config: Budgeted, cohort: Sequence[Member], limits: Sequence[float]) -> list[float]:
    """The part of each budget that a member sends in the time that the slowest link takes for the floor.

    A member may spend the rest of its time on training (`train.adaptive_work`).
    """
    if config.budget != "cohort":
        return list(limits)
    least = min(limits)
    seconds = max(least / m.uplink_bytes_per_s for m in cohort)
    return [
        limit if math.isinf(m.uplink_bytes_per_s) else min(limit, max(least, seconds * m.uplink_bytes_per_s))
        for m, limit in zip(cohort, limits, strict=True)
    ]


def minmax_noise(bits: float) -> float:
    """Squared error of stochastic min-max on a Gaussian layer, as a share of the layer's square; no level below 1."""
    return 20 / (2**bits - 1) ** 2 if bits >= 1 else math.inf


def in_time(member: Member, seconds: float, cap: float) -> float:
    """Bytes that a member can send within `seconds` of a round's start; `cap` if bytes take no time."""
    if math.isinf(member.uplink_bytes_per_s):
        return cap
    return max(0.0, seconds - member.fixed_s) * member.uplink_bytes_per_s


def taking_part(
    config: Late, cohort: Sequence[Member], limits: Sequence[float], least: float, scrap: float
) -> dict[int, float]:
    """The budgets, by client, of the members that take part. `strategy.late` decides what late members do.

    Args:
        limits: B_n, bytes. A member is late if its B_n is below `least`, which happens only with a fixed deadline.
        least: bytes of the smallest payload with all layers.
        scrap: bytes of the smallest useful payload.
    Returns:
        wait: all members, late ones with `least`; drop: without late members; partial: late members with what fits. If
        no member can meet the deadline, the fastest one takes part and exceeds it.
    """
    if config.budget != "deadline":
        return {m.client: limit for m, limit in zip(cohort, limits, strict=True)}
    if config.late == "wait":
        return {m.client: max(limit, least) for m, limit in zip(cohort, limits, strict=True)}
    bar = least if config.late == "drop" else scrap
    found = {m.client: limit for m, limit in zip(cohort, limits, strict=True) if limit >= bar}
    if not found and cohort:
        fastest = min(cohort, key=lambda m: (m.fixed_s + bar / m.uplink_bytes_per_s, m.client))
        return {fastest.client: bar}
    return found


def bytes_at_levels(setting: Setting, bits: float) -> float:
    """Bytes of a payload with `bits` for every layer, plus headers. Fractions are interpolated between levels."""
    below = max((b for b in LEVELS if b <= bits), default=1)
    rest = setting.fixed_size + sum(setting.size(layer, below) for layer in setting.quantized)
    return rest + (bits - below) * sum(layer.size for layer in setting.quantized) / 8


def bytes_at_rate(setting: Setting, bits: float) -> float:
    """Bytes of a payload at `bits` per parameter, headers included, plus the float32 buffers."""
    buffers = sum(LAYER_HEADER + 4 * layer.size for layer in setting.layers if layer.buffer)
    return bits * sum(layer.size for layer in setting.quantized) / 8 + buffers


def headers_rate(setting: Setting) -> float:
    """Bits per parameter of an entropy-coded payload's headers."""
    layers = setting.quantized
    return 8 * (PAYLOAD_HEADER + len(layers) * (LAYER_HEADER + Ecsq.HEADER.size)) / sum(layer.size for layer in layers)


def require_rate(setting: Setting, bits: float, key: str) -> None:
    """Raises ConfigError if the headers alone need this rate of entropy-coded layers: only zeros would be sent."""
    least = headers_rate(setting)
    if bits <= least:
        raise ConfigError(f"{key}: {bits:g} bits per parameter, but this model's headers alone take {least:.3g}")


def one_step(setting: Setting, budget: float, weights: Sequence[float] | None = None) -> OneStep:
    """Chooses step sizes under a budget in bytes. `weights`: square root of each quantized layer's significance."""
    chosen = iter(weights if weights is not None else [1.0] * len(setting.quantized))
    return OneStep(
        tuple((layer.start, layer.stop) for layer in setting.layers),
        tuple(0.0 if layer.buffer else next(chosen) for layer in setting.layers),
        budget,
    )
