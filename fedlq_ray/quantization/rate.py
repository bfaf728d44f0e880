"""Rate control: finds the smallest step size whose payload fits a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor

from fedlq_ray.quantization.base import Quantizer
from fedlq_ray.quantization.coding.codes import TOP, Floats, Magnitudes
from fedlq_ray.quantization.ecsq import Ecsq
from fedlq_ray.quantization.scalar import Float32
from fedlq_ray.quantization.wire import LAYER_HEADER, PAYLOAD_HEADER, Segment

_CLOSE = 0.993  # fraction of the budget that ends the search: more is not worth another pass
_PASSES = 30
_NEAR = 1e-3  # relative interval of steps that ends the search: the number of bytes jumps there
_POINTS = 96  # points of the curve


class Stepped(Quantizer, Protocol):
    """A quantizer with a step size, whose bytes are predicted from a layer's magnitudes."""

    coarsest: ClassVar[float]  # the step, in peaks of a layer, that quantizes (almost) all of it to zero

    def fitted(self, layer: Magnitudes) -> tuple[Quantizer, float]:
        """The quantizer to encode this layer with, and the bytes that it takes (if it rounds at random: with a margin
        for that)."""

    @staticmethod
    def rough(layer: Magnitudes, steps: Floats) -> Floats:
        """Approximate bytes at each of the falling steps; they never fall."""


@dataclass(frozen=True)
class OneStep:
    """Chooses a client's step sizes: `step / weight` in each layer, as small as `budget` allows.

    Minimising sum_l s_l D_l at a given rate needs the same slope s_l dD_l / dR_l in each layer, so D_l ~ 1 / s_l: one
    step divided by sqrt(s_l) (reverse water-filling). Layers with magnitudes below one step cost almost nothing.

    Args:
        pieces: the (start, stop) of each layer, in order.
        weights: sqrt(s_l) of each layer; 0 for a buffer, which is sent as float32.
        budget: bytes of the payload, headers included. If nothing fits, all layers are sent as zeros.
        quantizer: made from a step.
    """

    pieces: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    budget: float
    quantizer: Callable[[float], Stepped] = Ecsq

    def __call__(self, vector: Tensor) -> tuple[Segment, ...]:
        """Returns the designed segments.

        An approximate curve of bytes against step, scaled to the bytes of the last step tried, predicts the next step
        to try; two tries mostly suffice. If bytes rise too steeply for the curve, bisection finishes the search.
        Returns the smallest step found to fit.
        """
        weighted = list(zip(self.pieces, self.weights, strict=True))
        layers = [Magnitudes.of(vector[start:stop]) if weight else None for (start, stop), weight in weighted]
        scaled = [(layer, w) for layer, w in zip(layers, self.weights, strict=True) if layer and layer.peak]
        if not scaled:
            return self._segments(layers, 1.0)[0]
        peak = max(layer.peak * w for layer, w in scaled)
        least = min(layer.peak * w for layer, w in scaled) / TOP
        # The curve's first step quantizes (almost) everything to zero; at its last, no code can be finer.
        steps = np.geomspace(self.quantizer(1.0).coarsest * peak, least, _POINTS)
        best, size = self._segments(layers, float(steps[0]))
        if size >= self.budget:
            return best
        curve = np.log(size + sum(self.quantizer(1.0).rough(layer, steps / w) for layer, w in scaled))
        logs, goal = np.log(steps), math.log(self.budget * (1 + _CLOSE) / 2)
        high, low, shift = float(logs[0]), float(logs[-1]) - 1, 0.0
        for tried in range(_PASSES):
            step = float(np.interp(goal - shift, curve, logs))
            if not low < step < high or (tried > 3 and tried % 2):
                step = (low + high) / 2
            segments, size = self._segments(layers, math.exp(step))
            if size > self.budget:
                low = step
            else:
                best, high = segments, step
                if size > _CLOSE * self.budget or step <= logs[-1]:
                    break
            if high - low < _NEAR:
                break
            shift = math.log(size) - float(np.interp(-step, -logs, curve))
        return best

    def _segments(self, layers: Sequence[Magnitudes | None], step: float) -> tuple[tuple[Segment, ...], float]:
        """Returns the segments for a step, and the bytes of their payload."""
        segments, size = [], float(PAYLOAD_HEADER)
        for layer, (start, stop), weight in zip(layers, self.pieces, self.weights, strict=True):
            if layer:
                quantizer, taken = self.quantizer(step / weight).fitted(layer)
                segments.append(Segment(quantizer, start, stop))
                size += LAYER_HEADER + taken
            else:
                segments.append(Segment(Float32(), start, stop))
                size += LAYER_HEADER + 4 * (stop - start)
        return tuple(segments), size
