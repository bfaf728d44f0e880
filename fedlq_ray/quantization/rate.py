"""Rate control: the one step size whose payload just fits a budget."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedlq_ray.quantization.ecsq import Ecsq
from fedlq_ray.quantization.scalar import Float32
from fedlq_ray.quantization.wire import LAYER_HEADER, PAYLOAD_HEADER, Segment

_CLOSE = 0.99  # of the budget: nearer is not worth another pass
_PASSES = 12
_SLACK = 3  # bytes that a layer's estimate may be short of the truth (tested)


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
        return self._segments(self._fitting(vector))

    def _segments(self, step: float) -> tuple[Segment, ...]:
        return tuple(
            Segment(Ecsq(step / weight) if weight else Float32(), start, stop)
            for (start, stop), weight in zip(self.pieces, self.weights, strict=True)
        )

    def _bytes(self, vector: Tensor, step: float) -> float:
        total = float(PAYLOAD_HEADER)
        for quantizer, start, stop in self._segments(step):
            if isinstance(quantizer, Ecsq):
                total += LAYER_HEADER + _SLACK + quantizer.quantize(vector[start:stop]).num_bytes
            else:
                total += LAYER_HEADER + 4 * (stop - start)
        return total

    def _fitting(self, vector: Tensor) -> float:
        """The step, by regula falsi on log(bytes) against log(step), with the side that stays halved (Illinois)."""
        peak = max(float(vector[a:b].abs().max()) * w for (a, b), w in zip(self.pieces, self.weights, strict=True) if w)
        if not peak:
            return 1.0
        high = math.log(4 * peak)  # all is zero there
        bytes_high = self._bytes(vector, math.exp(high))
        if bytes_high >= self.budget:
            return math.exp(high)
        parameters = sum(b - a for (a, b), w in zip(self.pieces, self.weights, strict=True) if w)
        rate = 8 * max(self.budget - bytes_high, 1) / parameters
        spread = float(np.sqrt(np.mean(np.square(vector.numpy(), dtype=np.float64)))) or 1.0
        low = math.log(spread) - min(rate, 24) * math.log(2) + 1
        goal, f_high = math.log(self.budget), math.log(bytes_high) - math.log(self.budget)
        while (f_low := math.log(self._bytes(vector, math.exp(low))) - goal) < 0 and low > math.log(peak) - 20:
            high, f_high = low, f_low
            if f_low > math.log(_CLOSE):
                return math.exp(low)
            low -= 1
        if f_low < 0:
            return math.exp(low)  # the budget is more than anything needs
        fits = high
        for _ in range(_PASSES):
            middle = (low * f_high - high * f_low) / (f_high - f_low)
            f = math.log(self._bytes(vector, math.exp(middle))) - goal
            if f <= 0:
                fits = min(fits, middle)
                if f > math.log(_CLOSE):
                    break
                high, f_high, f_low = middle, f, f_low / 2
            else:
                low, f_low, f_high = middle, f, f_high / 2
        return math.exp(fits)
