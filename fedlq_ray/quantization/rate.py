"""Rate control: the one step size whose payload just fits a budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedlq_ray.quantization.ecsq import TOP, Ecsq, Floats, Magnitudes
from fedlq_ray.quantization.scalar import Float32
from fedlq_ray.quantization.wire import LAYER_HEADER, PAYLOAD_HEADER, Segment

_CLOSE = 0.993  # of the budget: nearer is not worth another pass
_PASSES = 30
_NEAR = 1e-3  # of a step: bytes that still miss the budget have a jump there
_POINTS = 96  # of the curve


@dataclass(frozen=True)
class OneStep:
    """A client's choice of step sizes: `step / weight` in each layer, as small as `budget` allows.

    Minimising sum_l s_l D_l under a rate asks for the same slope s_l dD_l / dR_l in each layer, so D_l ~ 1 / s_l: one
    step divided by sqrt(s_l) (reverse water-filling). Layers that hold less than a step cost almost nothing.

    Args:
        pieces: the (start, stop) of each layer, in order.
        weights: sqrt(s_l) of each; 0 for a buffer, which goes as float32.
        budget: bytes of the payload, headers included. Where nothing fits, all layers go as zeros.
    """

    pieces: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    budget: float

    def __call__(self, vector: Tensor) -> tuple[Segment, ...]:
        """The segments, designed.

        A curve of about how many bytes each step takes, scaled to what they were at the last step tried, says which to
        try next: mostly two do. Where bytes rise too steeply for that, halving does the rest. What is returned is the
        best that was seen to fit.
        """
        weighted = list(zip(self.pieces, self.weights, strict=True))
        layers = [Magnitudes.of(vector[start:stop]) if weight else None for (start, stop), weight in weighted]
        scaled = [(layer, w) for layer, w in zip(layers, self.weights, strict=True) if layer and layer.peak]
        if not scaled:
            return self._segments(layers, 1.0)[0]
        peak = max(layer.peak * w for layer, w in scaled)
        least = min(layer.peak * w for layer, w in scaled) / TOP
        # All is zero at the first step of the curve, and at the last no code can be finer.
        steps = np.geomspace(4 * peak, least, _POINTS)
        best, size = self._segments(layers, float(steps[0]))
        if size >= self.budget:
            return best
        curve = np.log(size + sum(_rough(layer, steps / w) for layer, w in scaled))
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

    def _segments(self, layers: Sequence[Magnitudes | None], step: float) -> tuple[tuple[Segment, ...], int]:
        """The segments of a step, and the bytes of their payload."""
        segments, size = [], PAYLOAD_HEADER
        for layer, (start, stop), weight in zip(layers, self.pieces, self.weights, strict=True):
            if layer:
                design = Ecsq(step / weight).design(layer)
                segments.append(Segment(Ecsq(step / weight, designed=design), start, stop))
                size += LAYER_HEADER + design.num_bytes
            else:
                segments.append(Segment(Float32(), start, stop))
                size += LAYER_HEADER + 4 * (stop - start)
        return tuple(segments), size


def _rough(layer: Magnitudes, steps: Floats) -> Floats:
    """About how many bytes a layer takes at each step: which elements are not zero, their signs, and a geometric
    distribution of how many steps they hold. Not falling as steps do."""
    steps = np.maximum(steps, layer.peak / TOP)
    count = len(layer.values)
    zone = np.full(len(steps), 0.5)  # what is below so many steps goes to zero: the more, the more of it there is
    for _ in range(2):
        zeros = np.searchsorted(layer.values, np.minimum(zone * steps, layer.peak).astype(np.float32), side="right")
        nonzero = count - zeros
        zone = 0.55 + 0.065 * np.log2((zeros + 1) / (nonzero + 1)).clip(0)
    mean = np.maximum((layer.sums[-1] - layer.sums[zeros]) / steps / np.maximum(nonzero, 1), 1.0)
    bits = count * _entropy(nonzero / count) + nonzero * (1 + mean * _entropy(1 / mean))
    return np.maximum.accumulate(bits / 8)


def _entropy(p: Floats) -> Floats:
    """Of a coin, in bits."""
    q = 1 - p
    return -p * np.log2(np.maximum(p, 1e-300)) - q * np.log2(np.maximum(q, 1e-300))
