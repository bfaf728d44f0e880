"""Rate control: finds the smallest step size whose payload fits a budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedlq_ray.quantization.ecsq import TOP, Ecsq, Floats, Magnitudes
from fedlq_ray.quantization.scalar import Float32
from fedlq_ray.quantization.wire import LAYER_HEADER, PAYLOAD_HEADER, Segment

_CLOSE = 0.993  # fraction of the budget that ends the search: more is not worth another pass
_PASSES = 30
_NEAR = 1e-3  # relative interval of steps that ends the search: the number of bytes jumps there
_POINTS = 96  # points of the curve


@dataclass(frozen=True)
class OneStep:
    """Chooses a client's step sizes: `step / weight` in each layer, as small as `budget` allows.

    Minimising sum_l s_l D_l at a given rate needs the same slope s_l dD_l / dR_l in each layer, so D_l ~ 1 / s_l: one
    step divided by sqrt(s_l) (reverse water-filling). Layers with magnitudes below one step cost almost nothing.

    Args:
        pieces: the (start, stop) of each layer, in order.
        weights: sqrt(s_l) of each layer; 0 for a buffer, which is sent as float32.
        budget: bytes of the payload, headers included. If nothing fits, all layers are sent as zeros.
    """

    pieces: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    budget: float

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
        # The curve's first step quantizes everything to zero; at its last, no code can be finer.
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
        """Returns the segments for a step, and the bytes of their payload."""
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
    """Approximate bytes of a layer at each step: positions of nonzero elements, their signs, and magnitudes with a
    geometric distribution. They never fall as steps get smaller."""
    steps = np.maximum(steps, layer.peak / TOP)
    count = len(layer.values)
    zone = np.full(len(steps), 0.5)  # values below this many steps become zero; it grows with the share of zeros
    for _ in range(2):
        zeros = np.searchsorted(layer.values, np.minimum(zone * steps, layer.peak).astype(np.float32), side="right")
        nonzero = count - zeros
        zone = 0.55 + 0.065 * np.log2((zeros + 1) / (nonzero + 1)).clip(0)
    mean = np.maximum((layer.sums[-1] - layer.sums[zeros]) / steps / np.maximum(nonzero, 1), 1.0)
    bits = count * _entropy(nonzero / count) + nonzero * (1 + mean * _entropy(1 / mean))
    return np.maximum.accumulate(bits / 8)


def _entropy(p: Floats) -> Floats:
    """Entropy of a biased coin, in bits."""
    q = 1 - p
    return -p * np.log2(np.maximum(p, 1e-300)) - q * np.log2(np.maximum(q, 1e-300))
