"""FedLQ. Xu et al., "Towards layer-wise quantization for heterogeneous federated clients", Computer Networks 264,
2025, 111223, doi:10.1016/j.comnet.2025.111223.

We could read only its abstract; the formulas are our reconstruction (ARCHITECTURE.md). Each layer and level has a
memory saving M_l(b), an accuracy drop A_l(b) and the significance A/M. Each client has a byte budget, from its link and
its compute. Levels within that budget come from the paper's greedy significance-aware algorithm, or from one that is
nearly optimal and never worse than a single level for all layers (the default), or from an exact one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fedlq_ray.config import schemes
from fedlq_ray.errors import ConfigError
from fedlq_ray.quantization import LAYER_HEADER
from fedlq_ray.quantization.coding.codes import Floats
from fedlq_ray.significance import Allocation, Drops, best, exact, greedy, memory_saving
from fedlq_ray.strategies.base import Member, Probe, RoundResult, Strategy, StrategyContext
from fedlq_ray.strategies.budgets import budgets, bytes_at_levels, minmax_noise, sent_in_equal_time, taking_part
from fedlq_ray.strategies.costs import layer_sizes
from fedlq_ray.training.local import Plan


@dataclass(frozen=True)
class Seen:
    """What the strategy learned: drops, and how many times the noise of a Gaussian's payloads the clients' have."""

    drops: Drops
    noisier: float = 1.0


class FedLQ(Strategy[Seen]):
    """Levels by layer and client, from significance measured during training."""

    def __init__(self, context: StrategyContext[schemes.FedLQ]) -> None:
        self.context = context
        config = context.config
        if len(config.levels) < 2:
            raise ConfigError("strategy.levels: fedlq chooses among levels, and needs at least two, such as [1,2,4,8]")
        if config.late == "partial" and config.payload == "model":
            raise ConfigError("strategy.late: partial leaves layers out, which payload=model cannot; use update")
        if config.allocation != "greedy" and config.significance == "sum":
            raise ConfigError(
                f"strategy.significance: sum orders the greedy algorithm's steps, and allocation={config.allocation} "
                "takes none; use ratio, or allocation=greedy"
            )
        self.sizes = layer_sizes(context, config.levels)
        self.cheapest = context.fixed_size + int(self.sizes[:, 0].sum())
        self.counts = [layer.size for layer in context.quantized]

    def init(self) -> Seen:
        return Seen(Drops(self.context.config.probe_decay))

    def plan(self, seen: Seen, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        bodies = self.sizes[:, 0] - LAYER_HEADER
        scrap = self.cheapest - int(bodies.sum() - bodies.min())  # the smallest layer, and the headers of all
        limits = taking_part(self.context.config, cohort, self.budgets(seen, round, cohort), self.cheapest, scrap)
        made = {limit: self.context.at_levels(self.levels(seen, limit)) for limit in set(limits.values())}
        return {client: made[limit] for client, limit in limits.items()}

    def budgets(self, seen: Seen, round: int, cohort: Sequence[Member]) -> list[float]:
        """B_n, bytes of a payload: (tau - fixed_n) R_n, at most those of the cap."""
        noise = partial(self.noise, seen)
        return budgets(self.context.config, cohort, round, partial(bytes_at_levels, self.context), noise, self.cheapest)

    def expected_bytes(self, seen: Seen, round: int, cohort: Sequence[Member]) -> list[float]:
        return sent_in_equal_time(self.context.config, cohort, self.budgets(seen, round, cohort))

    def levels(self, seen: Seen, budget: float) -> list[int]:
        """A level for each layer within a payload's bytes.

        Level 0 sends nothing. It is used only if not even the lowest level fits and late clients may send a part, for
        the layers of least significance."""
        config = self.context.config
        levels: list[int] = [config.levels[choice] for choice in self.allocate(seen, budget).choice]
        room = budget - self.context.fixed_size - LAYER_HEADER * len(levels)
        if config.budget != "deadline" or config.late != "partial":
            return levels
        bodies = self.sizes[:, 0] - LAYER_HEADER
        lost = seen.drops.estimate(self.counts, config.levels)[:, 0]
        for layer in np.argsort(-lost / bodies, kind="stable"):
            if bodies[layer] > room:
                levels[layer] = 0
            else:
                room -= bodies[layer]
        return levels

    def noise(self, seen: Seen, bits: Floats) -> Floats:
        """Squared error of a payload, over the square of an update, by bits per parameter.

        It is that of min-max on a Gaussian, scaled to what clients reported in the last round. The mean update, which
        probes see, would understate it: its own noise is Gaussian, and makes its square greater."""
        levels = self.context.config.levels
        return np.where((bits < levels[0]) | (levels[0] >= 16), math.inf, seen.noisier * minmax_noise(bits))

    def allocate(self, seen: Seen, budget: float) -> Allocation:
        """Levels within a payload's bytes."""
        config = self.context.config
        drops = seen.drops.estimate(self.counts, config.levels)
        left = budget - self.context.fixed_size
        if config.allocation != "greedy":
            return (best if config.allocation == "best" else exact)(drops, self.sizes, left)
        return greedy(drops, self.sizes, left, self._margins(drops) if config.significance == "sum" else None)

    def _margins(self, drops: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Significance of a step down: alpha x drop - (1 - alpha) x memory saved, each over its maximum."""
        alpha = self.context.config.significance_alpha
        saving = memory_saving(self.counts, self.context.config.levels)
        lost, saved = drops[:, :-1] - drops[:, 1:], saving[:, :-1] - saving[:, 1:]
        margins: np.ndarray[Any, Any] = alpha * lost / max(lost.max(), 1e-30) - (1 - alpha) * saved / saved.max()
        return margins

    def probe(self, seen: Seen, round: int) -> Probe | None:
        # Round 0 has no update to measure on, and its weights are random.
        config = self.context.config
        if round == 0 or (round - 1) % config.probe_every:
            return None
        quantizers = tuple(self.context.quantizer_at(bits) for bits in config.levels)
        return Probe(quantizers, config.probe_samples, config.metric or "loss")

    def learn(self, seen: Seen, round: int, result: RoundResult) -> Seen:
        drops = seen.drops if result.measurement is None else seen.drops.add(result.measurement)
        return Seen(drops, self.noisier(result) or seen.noisier)

    def noisier(self, result: RoundResult) -> float | None:
        """The noise that clients reported, over that of a Gaussian at their mean rate; None if there is none."""
        if not result.noise or result.payload_bytes is None:
            return None
        zero, one = (bytes_at_levels(self.context, bits) for bits in (1e-9, 1.0))
        rate = min(8.0, max(1.0, (result.payload_bytes - zero) / (one - zero)))
        return result.noise / float(minmax_noise(np.array(rate)))

    def report(self, seen: Seen) -> dict[str, Any]:
        """Significance A/M of each layer at the lowest level, and the noise of A there."""
        if seen.drops.measured is None or seen.drops.variance is None:
            return {}
        names = [layer.name for layer in self.context.quantized]
        estimate = seen.drops.estimate(self.counts, self.context.config.levels)
        ratio = estimate / memory_saving(self.counts, self.context.config.levels)
        return {
            "significance": dict(zip(names, ratio[:, 0].tolist(), strict=True)),
            "drop_noise": dict(zip(names, np.sqrt(seen.drops.variance[:, 0]).tolist(), strict=True)),
        }
