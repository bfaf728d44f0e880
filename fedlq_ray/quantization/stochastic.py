"""Stochastic rounding to multiples of one step, and a range coder: no value is lost on average.

Where only some clients send in a round, error feedback returns what a client lost many rounds later, and a dead zone
withholds small values until then. Unbiased noise is averaged over the cohort instead.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.quantization.base import as_float32
from fedlq_ray.quantization.coding.codes import (
    HEADER,
    LOSS,
    TOP,
    Codes,
    Floats,
    Magnitudes,
    Model,
    fit,
    float32,
    geometric_bytes,
    pack,
    unpack,
)

_SIGMAS = 2.0  # margin of the predicted bytes, in standard deviations


@dataclass(frozen=True)
class StochasticStep:
    """Round each x / step at random to one of the two nearest integers, so that the expected value is x.

    E|Q(x) - x|^2 = step^2 sum f (1 - f), where f is the fraction of |x| / step: about step x |x|_1 if the step is above
    most values, and step^2 / 6 per element if it is below most. At equal bytes, up to 0.3 bits per parameter, its error
    on a client's update is 1.5 times smaller than that of QSGD with Elias codes (docs/quantizers.md), by one step for
    all layers, and by the coder.
    Body: step (float32), highest code (2 bytes), length of the model (1 byte), hazards, then the range coder's words:
    magnitudes, and the signs of nonzero codes. The body of an all-zero layer ends after the length.

    Args:
        step: distance between adjacent values, above 0. A step that is too small for the highest code is raised.
    """

    number: ClassVar[int] = 13
    coarsest: ClassVar[float] = 1e4

    step: float = 1.0
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise ValueError(f"step must be above 0, got {self.step!r}")

    def fitted(self, layer: Magnitudes) -> tuple["StochasticStep", float]:
        step, count = _allowed(self.step, layer.peak), len(layer.values)
        counts = _expected(layer, step)
        if len(counts) < 2:
            return self, HEADER.size
        model = fit(counts)
        nonzero = count - counts[0]
        bits = counts @ model.bits() + nonzero * (1 + LOSS) + LOSS * count
        spread = _SIGMAS * np.sqrt(nonzero) * (1 - np.log2(max(1 - model.coded()[0], 1e-12)))
        return self, HEADER.size + len(model.hazards) + (bits + spread) / 8 + 2

    @staticmethod
    def rough(layer: Magnitudes, steps: Floats) -> Floats:
        steps = np.maximum(steps, layer.peak / TOP)
        small = np.searchsorted(layer.values, np.minimum(steps, layer.peak).astype(np.float32), side="right")
        count = len(layer.values)
        nonzero = layer.sums[small] / steps + count - small
        return geometric_bytes(count, nonzero, layer.sums[-1] / steps)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        return self.roundtrip(x, rng)[0]

    def roundtrip(self, x: Tensor, rng: Generator) -> tuple[bytes, Tensor]:
        values = x.numpy()
        magnitudes = np.abs(values)
        step = _allowed(self.step, float(magnitudes.max()))
        raised = torch.rand(x.shape, generator=rng, dtype=torch.float64).numpy()
        raised += magnitudes / np.float64(step)
        nonzero = np.flatnonzero(raised >= 1)
        codes = np.minimum(raised[nonzero], TOP).astype(np.int32)
        counts = np.bincount(codes, minlength=1)
        counts[0] = len(values) - len(codes)
        signs = np.signbit(values[nonzero]).astype(np.int32)
        every = np.zeros(len(values), np.int32)
        every[nonzero] = codes
        model = fit(counts) if len(codes) else Model(0, b"")
        return pack(step, model, every, signs), _decoded(len(values), nonzero, codes, signs, step)

    def decode(self, body: memoryview, count: int) -> Tensor:
        found = unpack(body, count)
        return _decoded(count, found.nonzero, found.codes[found.nonzero], found.signs, found.step)

    def size(self, count: int) -> None:
        """Always None: the number of bytes depends on the elements."""
        return None


def _allowed(step: float, peak: float) -> float:
    """The step as sent: float32, and large enough for the highest code."""
    raised = as_float32(max(step, peak / TOP, 1e-37))
    return raised if raised * TOP >= peak else float(np.nextafter(np.float32(raised), np.float32(np.inf)))


def _expected(layer: Magnitudes, step: float) -> Floats:
    """Expected number of elements with each code, 0 to the highest."""
    top = min(int(np.ceil(layer.peak / step)), TOP)
    edges: Floats = np.arange(top + 1, dtype=np.float64) * step
    ends = layer.values.searchsorted(float32(edges), side="right")
    ends[0], ends[-1] = 0, len(layer.values)
    # Of the elements between two multiples, the fraction above the lower one is rounded up.
    inside, sums = ends[1:] - ends[:-1], layer.sums[ends]
    up = (sums[1:] - sums[:-1]) / step - np.arange(top) * inside
    counts = np.zeros(top + 1)
    counts[:-1] += inside - up
    counts[1:] += up
    return np.maximum(counts, 0.0)


def _decoded(count: int, nonzero: NDArray[np.int64], codes: Codes, signs: Codes, step: float) -> Tensor:
    """The values (count,) of the codes above 0: their positions, themselves, and 1 for a negative one."""
    out = np.zeros(count, np.float32)
    values = float32(codes * np.float64(step))
    out[nonzero] = np.where(signs, -values, values)
    return torch.from_numpy(out)
