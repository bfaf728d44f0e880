"""FedLQ-RD, our own: FedLQ's budgets with continuous rates.

FedLQ picks a whole number of bits for each layer. FedLQ-RD picks one step size for each client, divided by the square
root of a layer's significance, so that the entropy-coded payload just fits the client's budget (ARCHITECTURE.md). Error
feedback keeps what quantization loses. The reconstruction is the one of least error, so error feedback contracts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fedlq_ray.config import schemes
from fedlq_ray.quantization import Ecsq
from fedlq_ray.quantization.coding.codes import Floats
from fedlq_ray.quantization.stochastic import StochasticStep
from fedlq_ray.significance import Drops
from fedlq_ray.strategies.base import Member, Probe, RoundResult, Strategy, StrategyContext
from fedlq_ray.strategies.budgets import (
    budgets,
    bytes_at_rate,
    headers_rate,
    one_step,
    require_rate,
    sent_in_equal_time,
    taking_part,
)
from fedlq_ray.training.local import Plan

# Bits per parameter, and squared error over the update's square, on clients' updates (docs/quantizers.md): of Ecsq, and
# of StochasticStep.
ERRORS = (0.001, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0), (0.999, 0.427, 0.271, 0.153, 0.0608, 0.0124, 0.0028, 0.00065)
UNBIASED = (0.023, 0.041, 0.073, 0.129, 0.234, 0.402, 0.673, 1.09, 2.09), (78.0, 39, 19, 9, 3.9, 1.7, 0.64, 0.22, 0.055)
DELAY = 50.0  # with error feedback: the round in which noise costs as much as without
SCRAP = 0.02  # bits per parameter: smaller payloads are useless, as are those below twice their headers
PROBED = (3.0, 8.0)  # step sizes of the probe, in root mean squares of the update: about 1 and 0.3 bits


@dataclass(frozen=True)
class Seen:
    """What the strategy learned: drops, and the root mean square of the last round's update."""

    drops: Drops
    rms: float = 0.0


class FedLQRD(Strategy[Seen]):
    """One step size for each client, from its budget."""

    def __init__(self, context: StrategyContext[schemes.FedLQRD]) -> None:
        self.context = context
        # Noise without bias would be of the size of the weights.
        self.error_feedback = type(self).error_feedback or context.config.payload == "model"
        self.quantizer = Ecsq if context.error_feedback else StochasticStep
        self.counts = [layer.size for layer in context.quantized]
        self.headers = headers_rate(context)
        self.scrap = max(SCRAP, 2 * self.headers)
        for key in ("bits",) if context.config.budget == "bits" else ("floor_bits", "cap_bits"):
            if (rate := getattr(context.config, key)) is not None:
                require_rate(context, rate, f"strategy.{key}")

    def init(self) -> Seen:
        return Seen(Drops(self.context.config.probe_decay))

    def plan(self, seen: Seen, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        context, config = self.context, self.context.config
        least = bytes_at_rate(context, config.floor_bits or self.scrap)
        limits = taking_part(config, cohort, self.budgets(round, cohort), least, bytes_at_rate(context, self.scrap))
        weights = np.sqrt(seen.drops.curvature(self.counts)).tolist()
        return {
            client: Plan(config.payload, one_step(context, limit, weights, self.quantizer), context.error_feedback)
            for client, limit in limits.items()
        }

    def budgets(self, round: int, cohort: Sequence[Member]) -> list[float]:
        """B_n, bytes of a payload."""
        config, noise = self.context.config, partial(self.noise, round)
        return budgets(config, cohort, round, partial(bytes_at_rate, self.context), noise)

    def expected_bytes(self, seen: Seen, round: int, cohort: Sequence[Member]) -> list[float]:
        return sent_in_equal_time(self.context.config, cohort, self.budgets(round, cohort))

    def noise(self, round: int, bits: Floats) -> Floats:
        """Squared error at a rate, over an update's square. Error feedback repairs it later: its effect on the number
        of rounds then grows as q / (1 - q)^2 (Karimireddy et al., ICML 2019, Theorem II), in early rounds as in late
        ones. That is a heuristic, outside our theorem."""
        rates, errors = ERRORS if self.context.error_feedback else UNBIASED
        q = np.exp(np.interp(np.log(np.maximum(bits - self.headers, 1e-3)), np.log(rates), np.log(errors)))
        if self.context.error_feedback:
            q = DELAY / (round + 1) * q / (1 - q) ** 2
        return np.where(bits < self.scrap, math.inf, q)

    def probe(self, seen: Seen, round: int) -> Probe | None:
        config = self.context.config
        # Squared error weights all layers alike and needs no measurement.
        if config.metric in (None, "squared_error") or not seen.rms or (round - 1) % config.probe_every:
            return None
        return Probe(tuple(self.quantizer(step * seen.rms) for step in PROBED), config.probe_samples, config.metric)

    def report(self, seen: Seen) -> dict[str, Any]:
        """Significance of each layer, once measured: the drop per unit of squared error."""
        if seen.drops.measured is None:
            return {}
        names = [layer.name for layer in self.context.quantized]
        return {"significance": dict(zip(names, seen.drops.curvature(self.counts).tolist(), strict=True))}

    def learn(self, seen: Seen, round: int, result: RoundResult) -> Seen:
        drops = seen.drops if result.measurement is None else seen.drops.add(result.measurement)
        return Seen(drops, float(result.update.double().square().mean().sqrt()))


class EcsqFixed(FedLQRD):
    """ECSQ with error feedback: one step size for all layers, entropy-coded, `strategy.bits` bits per parameter for
    every client, headers included. It is our strongest fixed-rate baseline, without significance or budgets. One step
    size is reverse water-filling over layers (Cover and Thomas, section 10.3)."""

    error_feedback = True
    timeless = True

    def __init__(self, context: StrategyContext[schemes.Rated]) -> None:
        config = schemes.FedLQRD.model_construct(**dict(context.config), budget="bits")
        super().__init__(StrategyContext(config, context.layers, context.seed, error_feedback=context.error_feedback))
