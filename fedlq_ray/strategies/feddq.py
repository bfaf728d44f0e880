"""FedDQ. Qu, Song, Tsui, "FedDQ: communication-efficient federated learning with descending quantization", GLOBECOM
2022, arXiv:2110.02291: b_l = ceil(log2(range(x_l) / resolution)), so that bits fall as updates shrink.

We checked the formula and the resolution, .005 for Fashion-MNIST, against the authors' code; .005 for ResNet-18 and
.001 for a CIFAR-10 CNN are from the project's notes on it.
Departs from it: b is limited to 1..8, where the code has no limits. The quantizer is `strategy.quantizer`, with
unbiased rounding, where the code rounds to nearest on a grid without zero point, and clips values outside it if the
range is skewed. A layer's bias counts in its range, where the code sends no biases.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedlq_ray.quantization import Segment
from fedlq_ray.strategies.base import Member, Strategy, StrategyContext
from fedlq_ray.training.local import Plan


@dataclass(frozen=True)
class ByRange:
    """A client's choice: bits for each layer, by the range of the values to send."""

    context: StrategyContext
    resolution: float

    def __call__(self, vector: Tensor) -> tuple[Segment, ...]:
        levels = []
        for layer in self.context.quantized:
            low, high = vector[layer.start : layer.stop].double().aminmax()
            levels.append(bits_for(float(high - low), self.resolution))
        return self.context.segments([self.context.quantizer_at(bits) for bits in levels])


def bits_for(spread: float, resolution: float) -> int:
    """ceil(log2(spread / resolution)), from 1 to 8."""
    return 1 if spread <= resolution else min(8, math.ceil(math.log2(spread / resolution)))


class FedDQ(Strategy):
    """Each client sends each layer with the bits that the layer's range requires.

    Args:
        resolution: allowed difference of two neighbouring levels, in the units of what is sent.
    """

    timeless = True

    def __init__(self, context: StrategyContext, resolution: float = 0.005) -> None:
        if not resolution > 0:
            raise ValueError(f"resolution must be above 0, got {resolution}")
        config = context.config
        self._plan = Plan(config.payload, ByRange(context, resolution), context.error_feedback)

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        return {member.client: self._plan for member in cohort}
