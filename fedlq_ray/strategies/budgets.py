"""Budgets: how many bytes each member of a cohort may send, and which members are late."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fedlq_ray.config.schemes import Budgeted, Late
from fedlq_ray.errors import ConfigError
from fedlq_ray.quantization import LAYER_HEADER, PAYLOAD_HEADER, Ecsq
from fedlq_ray.quantization.coding.codes import Floats
from fedlq_ray.quantization.rate import OneStep, Stepped
from fedlq_ray.strategies.base import Member, StrategyContext

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
RATES = np.array([0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.25, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0])
Bytes = Callable[[float], float]  # of a payload, by bits per parameter
Noise = Callable[[Floats], Floats]  # squared error of a payload over its own square, by bits per parameter


def budgets(
    config: Budgeted,
    cohort: Sequence[Member],
    round: int,
    bytes_at: Bytes,
    noise: Noise | None = None,
    cheapest: float = 0.0,
) -> list[float]:
    """B_n, bytes of a member's payload, by `strategy.budget`.

    bits: `strategy.bits` for all. deadline, cohort: (tau - fixed_n) R_n, at most the cap. tau is `deadline_s`, or the
    time of the slowest member at the floor, but at no less than `cheapest` bytes, the smallest payload that can be
    planned; so every member has time for at least as many bytes. The floor is `floor_bits`; if that is null, `thrifty`
    chooses it, and the cap where `cap_bits` is null. Without `noise`, the noise is that of min-max on a Gaussian.
    """
    if config.budget == "bits":
        return [bytes_at(config.bits)] * len(cohort)
    if not cohort:
        return []
    cap = bytes_at(config.cap)
    if config.budget == "deadline" and config.deadline_s is not None:
        return [min(cap, in_time(m, config.deadline_s, cap)) for m in cohort]
    floor = config.floor_bits and bytes_at(config.floor_bits)
    if floor is None:
        floor, cap = thrifty(config, cohort, round, bytes_at, noise or minmax_noise, cheapest)
    least = max(cheapest, min(cap, floor))
    tau = max(m.fixed_s + least / m.uplink_bytes_per_s for m in cohort)
    # The slowest gets `least` by definition, but rounding may put (tau - fixed) R below it.
    return [max(least, min(cap, in_time(m, tau, cap))) for m in cohort]


def thrifty(
    config: Budgeted, cohort: Sequence[Member], round: int, bytes_at: Bytes, noise: Noise, cheapest: float
) -> tuple[float, float]:
    """The floor and the cap, in bytes, that minimise tau G (G sum_n B_n)^thrift.

    G = 1 + noise_cost x (round + 1) x (w s)^2 x sum_n p_n^2 noise(b_n), with w the mean work of the cohort and s the
    server's learning rate, is the growth of the bound on convergence (docs/theory.md) by the noise. After T rounds, the
    first term of the bound is in proportion to 1 / (w s T), and its quantization term to w s. So up to a factor their
    ratio is the sum over rounds of (w s)^2 sum_n p_n^2 noise(b_n): noise costs little at first, and later rounds need
    more bits.
    tau G stands for the simulated time to an accuracy, G sum_n B_n for the bytes. If no rate up to the cap can be sent,
    both are the cap's.
    """
    rates = RATES[(config.cap >= RATES) & np.isfinite(noise(RATES))]
    rates = rates if len(rates) else np.array([config.cap])
    fixed, speed = np.array([m.fixed_s for m in cohort]), np.array([m.uplink_bytes_per_s for m in cohort])
    shares = np.array(squared_shares(cohort))
    zero, one = bytes_at(1e-9), bytes_at(1.0)
    floors = np.maximum(cheapest, [bytes_at(rate) for rate in rates])[:, None]
    tau = (fixed + floors / speed).max(1, keepdims=True)
    room = np.where(np.isinf(speed), np.inf, (tau - fixed) * np.where(np.isinf(speed), 1.0, speed))  # (floors, members)
    work = sum(m.samples * m.work for m in cohort) / sum(m.samples for m in cohort)
    best, chosen = math.inf, (float(floors[-1, 0]), bytes_at(config.cap))
    for cap in [chosen[1]] if config.cap_bits is not None else floors[:, 0].tolist():
        sent = np.minimum(np.maximum(room, floors), cap)
        heard = noise(np.maximum((sent - zero) / (one - zero), rates[0])) @ shares
        growth = 1 + config.noise_cost * (round + 1) * (work * cohort[0].server_lr) ** 2 * heard
        cost = np.where(floors <= cap, tau, np.inf)[:, 0] * growth * (growth * sent.sum(1)) ** config.thrift
        if cost.min() < best:
            best, chosen = float(cost.min()), (float(floors[cost.argmin(), 0]), cap)
    return chosen


def squared_shares(cohort: Sequence[Member]) -> list[float]:
    """Each member's p_n^2, by which its noise enters a step. One that is planned alone stands for all K updates of its
    step: K (1 / K)^2."""
    total = sum(m.samples for m in cohort)
    return [(m.samples / total) ** 2 if m.updates is None else 1 / (m.updates * len(cohort)) for m in cohort]


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


def minmax_noise(bits: Floats) -> Floats:
    """Squared error of stochastic min-max on a Gaussian layer, over the layer's square; no level below 1."""
    return np.where(bits >= 1, 20 / (2 ** np.maximum(bits, 1.0) - 1) ** 2, np.inf)


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


def bytes_at_levels(context: StrategyContext, bits: float) -> float:
    """Bytes of a payload with `bits` for every layer, plus headers. Fractions are interpolated between levels."""
    below = max((b for b in LEVELS if b <= bits), default=1)
    rest = context.fixed_size + sum(context.size(layer, below) for layer in context.quantized)
    return rest + (bits - below) * sum(layer.size for layer in context.quantized) / 8


def bytes_at_rate(context: StrategyContext, bits: float) -> float:
    """Bytes of a payload at `bits` per parameter, headers included, plus the float32 buffers."""
    buffers = sum(LAYER_HEADER + 4 * layer.size for layer in context.layers if layer.buffer)
    return bits * sum(layer.size for layer in context.quantized) / 8 + buffers


def headers_rate(context: StrategyContext) -> float:
    """Bits per parameter of an entropy-coded payload's headers."""
    layers = context.quantized
    return 8 * (PAYLOAD_HEADER + len(layers) * (LAYER_HEADER + Ecsq.HEADER.size)) / sum(layer.size for layer in layers)


def require_rate(context: StrategyContext, bits: float, key: str) -> None:
    """Raises ConfigError if the headers alone need this rate of entropy-coded layers: only zeros would be sent."""
    least = headers_rate(context)
    if bits <= least:
        raise ConfigError(f"{key}: {bits:g} bits per parameter, but this model's headers alone take {least:.3g}")


def one_step(
    context: StrategyContext,
    budget: float,
    weights: Sequence[float] | None = None,
    quantizer: Callable[[float], Stepped] = Ecsq,
) -> OneStep:
    """Chooses step sizes under a budget in bytes. `weights`: square root of each quantized layer's significance."""
    chosen = iter(weights if weights is not None else [1.0] * len(context.quantized))
    return OneStep(
        tuple((layer.start, layer.stop) for layer in context.layers),
        tuple(0.0 if layer.buffer else next(chosen) for layer in context.layers),
        budget,
        quantizer,
    )
