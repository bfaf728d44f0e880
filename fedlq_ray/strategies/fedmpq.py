"""FedMPQ. Chen, Vikalo, "Mixed-precision quantization for federated learning on resource-constrained heterogeneous
devices", CVPR 2024, arXiv:2311.18129: bits by layer that fit each client's budget, from the bits that layers used.

As in the paper, the server averages the precisions that remain after training and plans for each client. It orders
layers by d_l (reduction_l + 1), largest first, prunes bits from the first layers and adds bits from the last, until the
budget is met (Algorithm 2; we read a public re-implementation and the abstract, not the algorithm itself).
Departs from it: the paper trains quantized weights with a group lasso that empties their upper bit planes, and drops
the empty ones. Here clients train as usual and quantize what they send. A layer's planes are counted in the mean
update, on one grid for all layers, with 8 planes for the layer of greatest magnitude. Budgets are in bytes, by
`strategy.budget`; bits are 1 to 8.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fedlq_ray.config import schemes
from fedlq_ray.strategies.base import Member, RoundResult, Strategy, StrategyContext
from fedlq_ray.strategies.budgets import budgets, bytes_at_levels
from fedlq_ray.strategies.costs import BITS, layer_sizes, require_update
from fedlq_ray.training.local import Plan


@dataclass(frozen=True)
class Planes:
    """Bit planes of the last mean update, by layer; None: the same for all layers."""

    base: list[int] | None = None


class FedMPQ(Strategy[Planes]):
    """Bits by layer: the bit planes of the last mean update, pruned and grown to each client's budget."""

    def __init__(self, context: StrategyContext[schemes.FedMPQ]) -> None:
        require_update(context)
        self.context = context
        self.sizes = layer_sizes(context, BITS)

    def init(self) -> Planes:
        return Planes()

    def plan(self, state: Planes, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        cheapest = self.context.fixed_size + int(self.sizes[:, 0].sum())
        limits = budgets(self.context.config, cohort, round, partial(bytes_at_levels, self.context), cheapest=cheapest)
        plans = {limit: self.context.at_levels(self.fitted(state, limit)) for limit in set(limits)}
        return {member.client: plans[limit] for member, limit in zip(cohort, limits, strict=True)}

    def fitted(self, state: Planes, budget: float) -> list[int]:
        """Bits by layer within a payload's bytes; 1 bit for all layers if nothing fits."""
        room, layers = budget - self.context.fixed_size, self.context.quantized
        same = max((b for b in BITS if self.sizes[:, b - 1].sum() <= room), default=1)
        bits = [same] * len(layers) if state.base is None else list(state.base)
        weight = [layer.size * (BITS[-1] - b + 1) for layer, b in zip(layers, bits, strict=True)]
        order = sorted(range(len(bits)), key=lambda i: (-weight[i], i))

        def size() -> int:
            return sum(int(self.sizes[i, b - 1]) for i, b in enumerate(bits))

        for i in order:
            while size() > room and bits[i] > 1:
                bits[i] -= 1
        for i in reversed(order):
            while bits[i] < BITS[-1] and size() + self.sizes[i, bits[i]] - self.sizes[i, bits[i] - 1] <= room:
                bits[i] += 1
        return bits

    def learn(self, state: Planes, round: int, result: RoundResult) -> Planes:
        peaks = [_peak(result.update[layer.start : layer.stop]) for layer in self.context.quantized]
        return Planes([planes(peak, max(peaks)) for peak in peaks]) if max(peaks) > 0 else state


def planes(peak: float, top: float) -> int:
    """Bit planes of a layer if the largest layer has 8: one fewer for each halving of its peak, at least 1."""
    return max(1, BITS[-1] - math.floor(math.log2(top / peak))) if peak > 0 else 1


def _peak(piece: Tensor) -> float:
    return float(piece.double().abs().max())
