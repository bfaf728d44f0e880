"""FedLUAR. Kim, Kang, Lee, "Layer-wise update aggregation with recycling for communication-efficient federated
learning", NeurIPS 2025, arXiv:2503.11146; read in the authors' code.

A layer's score is s_l = |update_l| / |w_l|, of the last round in which it was sent. After each round, a number of
layers is drawn without replacement, with probability proportional to 1 / s_l. Clients do not send them in the next
round, and the server applies their last mean update again.
Departs from it: a layer is a module's weights with its bias, where the authors' biases are always sent. As there,
modules without a matrix (normalisation) are always sent. What is sent may be quantized.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fedlq_ray.config import schemes
from fedlq_ray.errors import ConfigError
from fedlq_ray.seeding import numpy_rng
from fedlq_ray.strategies.base import Member, RoundResult, Strategy, StrategyContext
from fedlq_ray.strategies.costs import require_update
from fedlq_ray.training.local import Plan


@dataclass(frozen=True)
class Recycling:
    """The layers that are not sent next, as positions among those that may be quantized; the mean update (d,) that was
    applied last; and the scores by layer, of the last round in which it was sent (0: it always is)."""

    layers: list[int] = field(default_factory=list)
    update: Tensor | None = None
    scores: list[float] = field(default_factory=list)


class FedLUAR(Strategy[Recycling]):
    """Layers whose relative update is small are more often left out, and their last mean update is applied again."""

    timeless = True

    def __init__(self, context: StrategyContext[schemes.FedLUAR]) -> None:
        require_update(context)
        if context.error_feedback:
            raise ConfigError("strategy.error_feedback: fedluar applies a layer's last update again; use false")
        self.context, self.bits = context, context.config.bits
        self.matrices = [at for at, layer in enumerate(context.quantized) if layer.matrix]
        given, most = context.config.recycled, len(self.matrices) - 1
        self.recycled = len(self.matrices) // 2 if given is None else given
        if self.recycled > max(most, 0):
            raise ConfigError(
                f"strategy.recycled: {self.recycled} layers, but the model has {most + 1} with a matrix, and one "
                f"must be sent; 0 to {max(most, 0)}"
            )

    def init(self) -> Recycling:
        return Recycling(scores=[0.0] * len(self.context.quantized))

    def plan(self, state: Recycling, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        levels = [0 if at in state.layers else self.bits for at in range(len(state.scores))]
        plan = self.context.at_levels(levels)
        return {member.client: plan for member in cohort}

    def combine(self, state: Recycling, update: Tensor) -> Tensor:
        if state.update is None:
            return update
        combined = update.clone()
        for at in state.layers:
            layer = self.context.quantized[at]
            combined[layer.start : layer.stop] = state.update[layer.start : layer.stop]
        return combined

    def learn(self, state: Recycling, round: int, result: RoundResult) -> Recycling:
        if result.train_loss is None:
            return state
        scores = list(state.scores)
        for at in set(self.matrices) - set(state.layers):
            layer = self.context.quantized[at]
            update, weights = result.update[layer.start : layer.stop], result.weights[layer.start : layer.stop]
            scores[at] = float(update.double().norm() / (weights.double().norm() + 1e-6))
        return Recycling(self.drawn(scores, round), result.update.clone(), scores)

    def drawn(self, scores: Sequence[float], round: int) -> list[int]:
        """The layers that are not sent in the round after this one, in order."""
        if not self.recycled:
            return []
        inverse = np.array([1 / max(scores[at], 1e-12) for at in self.matrices])
        rng = numpy_rng(self.context.seed, "fedluar", round)
        found = rng.choice(self.matrices, self.recycled, replace=False, p=inverse / inverse.sum())
        return sorted(found.tolist())

    def report(self, state: Recycling) -> dict[str, Any]:
        return {"recycled": [self.context.quantized[at].name for at in state.layers]}
