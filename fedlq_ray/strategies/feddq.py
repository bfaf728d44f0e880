"""FedDQ. Qu, Song, Tsui, "FedDQ: communication-efficient federated learning with descending quantization", GLOBECOM
2022, arXiv:2110.02291: b_l = ceil(log2(range(x_l) / resolution)), so that bits fall as updates shrink.

The formula and the resolution, .005 for Fashion-MNIST, were checked against the authors' code; .005 for ResNet-18 and
.001 for a CIFAR-10 CNN are from the project's notes on it.
Departs from it: b is clamped to 1..8, where the code lets it be anything; the quantizer is `strategy.quantizer`, with
unbiased rounding, where the code rounds to nearest on a grid without zero point and clips what a skewed range leaves
out; a layer's bias is in its range, where the code sends no biases.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedlq_ray.quantization import Segment
from fedlq_ray.strategies.base import Member, Setting, Strategy
from fedlq_ray.training.local import Plan


@dataclass(frozen=True)
class ByRange:
    """A client's choice: bits by the range of each layer of what it has to send."""

    setting: Setting
    resolution: float

    def __call__(self, vector: Tensor) -> tuple[Segment, ...]:
        levels = []
        for layer in self.setting.quantized:
            low, high = vector[layer.start : layer.stop].double().aminmax()
            levels.append(bits_for(float(high - low), self.resolution))
        return self.setting.segments([self.setting.quantizer_at(bits) for bits in levels])


def bits_for(spread: float, resolution: float) -> int:
    """ceil(log2(spread / resolution)), from 1 to 8."""
    return 1 if spread <= resolution else min(8, math.ceil(math.log2(spread / resolution)))


class FedDQ(Strategy):
    """Each client sends each layer at the bits that its range asks for.

    Args:
        resolution: what two neighbouring values may differ by, in the units of what is sent.
    """

    timeless = True

    def __init__(self, setting: Setting, resolution: float = 0.005) -> None:
        if not resolution > 0:
            raise ValueError(f"resolution must be above 0, got {resolution}")
        config = setting.config
        self._plan = Plan(config.payload, ByRange(setting, resolution), setting.error_feedback)

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        return {member.client: self._plan for member in cohort}
