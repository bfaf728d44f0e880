"""Min-max over a clipped range, rounded to nearest: the contraction that error feedback needs."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.quantization.base import as_float32
from fedlq_ray.quantization.coding.packing import pack
from fedlq_ray.quantization.scalar import MinMax

_SAMPLE = 2**16  # elements that the range is chosen on, evenly spaced in the layer
_COARSE = 2.0 ** np.arange(0, -8, -0.5)  # fractions of the full range that are tried, then finer ones around the best
_FINE = 2.0 ** np.array([-0.375, -0.25, -0.125, 0.125, 0.25, 0.375])
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Clipped(MinMax):
    """Round to the nearest of 2**bits evenly spaced values; their range has the least squared error.

    Ranges that shrink towards the layer's mean are tried; values outside are clipped. The two scalars are then those of
    least squares (x regressed on its codes). The error is therefore what a projection loses: never more than |x|^2, so
    error feedback contracts. It is biased. On N(0, 1) the error is that of the best uniform
    quantizer: .363 / .119 / .0374 / .0115 at 1 to 4 bits (Max, IRE Trans. Inf. Theory 6(1), 1960, table II).
    Body: as `MinMax`.
    """

    number: ClassVar[int] = 14
    family: ClassVar[str] = "clipped"
    unbiased: ClassVar[bool] = False

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        values, top = x.numpy().astype(np.float64), 2**self.bits - 1
        mean, low, high = float(values.mean()), float(values.min()), float(values.max())
        sample = values[:: -(-len(values) // _SAMPLE)]

        def codes(part: Floats, fraction: float) -> Floats:
            start, step = mean + fraction * (low - mean), fraction * (high - low) / top
            found: Floats = np.rint((part - start) / step).clip(0, top)
            return found

        def error(fraction: float) -> float:
            found = codes(sample, fraction)
            start, step = _fitted(sample, found)
            return float(np.square(sample - start - step * found).sum())

        if high <= low or as_float32((high - low) / top) == 0:
            start, step, found = as_float32(mean), 0.0, np.zeros(len(values))
        else:
            coarse = min(_COARSE.tolist(), key=error)
            best = min([coarse, *(coarse * f for f in _FINE.tolist() if coarse * f <= 1)], key=error)
            found = codes(values, best)
            start, step = _fitted(values, found)
        header = self.HEADER.pack(self.bits, as_float32(start), as_float32(step))
        return header + pack(found.astype(np.uint8), self.bits)


def _fitted(values: Floats, codes: Floats) -> tuple[float, float]:
    """Intercept and slope of the least squares line from codes to values."""
    centre, mean = codes.mean(), values.mean()
    around = codes - centre
    square = float(np.square(around).sum())
    slope = float((around * (values - mean)).sum()) / square if square else 0.0
    return float(mean - slope * centre), slope
