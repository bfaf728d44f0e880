"""Entropy-coded scalar quantization: one uniform step, a wide dead zone, and a range coder.

At low rates no scheme that codes each element separately is much better: on a Gaussian it stays within 0.254 bit of
the rate-distortion function R(D) = log2(sigma^2 / D) / 2, and closer if most codes are zero (Sullivan, IEEE Trans.
Inf. Theory 42(5), 1996, on Laplacian sources).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.quantization.base import as_float32
from fedlq_ray.quantization.coding.cells import count_below
from fedlq_ray.quantization.coding.codes import (
    HEADER,
    LOSS,
    TOP,
    Codes,
    Counts,
    Floats,
    Magnitudes,
    Model,
    fit,
    float32,
    geometric_bytes,
    pack,
    unpack,
)

_SHIFTED = 4  # codes whose values are sent: 1, 2, 3, and one value for all codes from 4
_PRIOR = 4.0  # weight, in elements, of the prior that a code's hazard equals that of the codes above


def _dearer(counts: Counts) -> Floats:
    """Extra bits of code 1 over code 0, of 2 over 1, ..., the sign included; they are smooth in the counts."""
    stop, go = counts[:-1], counts[:0:-1].cumsum()[::-1]
    rest_stop, rest_go = (part[::-1].cumsum()[::-1] for part in (stop, go))
    hazard = (stop + _PRIOR * (rest_stop + 0.5) / (rest_stop + rest_go + 1)) / (stop + go + _PRIOR)
    bits = np.concatenate([-np.log2(hazard), [0.0]])
    more: Floats = _steps(bits) - np.log2(1 - hazard)
    more[0] += 1
    return more


class Design(NamedTuple):
    """A layer's quantizer: `edges` (the highest magnitudes of codes 0, 1, ...), the codes' values, and its bytes.

    `num_bytes` is never below the true size. It exceeds it by at most a word, plus 30 bytes per million elements.
    """

    step: float
    edges: NDArray[np.float32]
    model: Model
    shifts: NDArray[np.int8]
    num_bytes: int


@dataclass(frozen=True)
class Ecsq:
    """Code x as multiples of `step`, with rate-distortion-optimised rounding and a range coder.

    Each value gets the code that minimises (error / step)^2 + trade x bits, so small values mostly become zero. A code
    decodes to the mean of the values that it codes (a centroid). This reconstruction has the least error, so error
    feedback contracts; it is biased. The entropy coder is `constriction`'s range coder with a parametric model of a few
    bytes.

    Body: step (float32), highest code (2 bytes), length of the model (1 byte), hazards, shifts of the first codes'
    values (1 byte each, in 1/256 of a step), then the range coder's words: magnitudes, and the signs of nonzero codes.
    The body of an all-zero layer ends after the length.

    Args:
        step: distance between adjacent codes, above 0.
        trade: price of a bit in squared steps; at high rates the optimum is ln(2) / 6 = 0.1155. At equal bytes, the
            errors for 0.08 to 0.16 differ by less than 1 % at any rate.
        designed: the result of `design` for the layer to encode, if already known.
    """

    number: ClassVar[int] = 10
    coarsest: ClassVar[float] = 4.0

    step: float = 1.0
    trade: float = 0.13
    designed: Design | None = field(default=None, compare=False, repr=False)
    HEADER = HEADER

    def __post_init__(self) -> None:
        if not self.step > 0 or not self.trade >= 0:
            raise ValueError(f"step must be above 0 and trade at least 0, got {self.step!r} and {self.trade!r}")

    def design(self, layer: Magnitudes) -> Design:
        """Choose the codes' edges, values and model: plain rounding, then one refinement (more would gain nothing)."""
        step = max(self.step, layer.peak / TOP, 1e-37)
        edges: Floats = np.arange(min(round(layer.peak / step), TOP), dtype=np.float64) + 0.5
        step, count = as_float32(step), len(layer.values)
        for last in (False, True):
            ends = float32(edges * step)
            bounds = np.concatenate([[0], layer.values.searchsorted(ends, side="right"), [count]])
            top = int(bounds.searchsorted(count)) - 1
            if not top:
                break
            counts = _steps(bounds[: top + 2])
            shifts = _shifts(counts, _steps(layer.sums[bounds[: top + 2]]) / step)
            if last:
                model = fit(counts)
                nonzero = count - int(counts[0])
                bits = counts @ model.bits() + nonzero + LOSS * (count + nonzero)
                fixed = self.HEADER.size + len(model.hazards) + len(shifts)
                return Design(step, ends[:top], model, shifts, fixed + 4 * int(bits / 32 + 1.1))
            centroids = _values(top, shifts)
            edges = (centroids[1:] + centroids[:-1]) / 2 + self.trade * _dearer(counts) / (2 * _steps(centroids))
            edges = np.maximum.accumulate(np.maximum(edges, 0.5))
        return Design(step, ends[:0], Model(0, b""), np.zeros(0, np.int8), self.HEADER.size)

    def fitted(self, layer: Magnitudes) -> tuple["Ecsq", float]:
        design = self.design(layer)
        return Ecsq(self.step, self.trade, design), design.num_bytes

    @staticmethod
    def rough(layer: Magnitudes, steps: Floats) -> Floats:
        steps = np.maximum(steps, layer.peak / TOP)
        count = len(layer.values)
        zone = np.full(len(steps), 0.5)  # values below this many steps become zero; it grows with the share of zeros
        for _ in range(2):
            zeros = np.searchsorted(layer.values, np.minimum(zone * steps, layer.peak).astype(np.float32), side="right")
            nonzero = count - zeros
            zone = 0.55 + 0.065 * np.log2((zeros + 1) / (nonzero + 1)).clip(0)
        return geometric_bytes(count, nonzero, (layer.sums[-1] - layer.sums[zeros]) / steps)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        return self.roundtrip(x, rng)[0]

    def roundtrip(self, x: Tensor, rng: Generator) -> tuple[bytes, Tensor]:
        step, edges, model, shifts, _ = self.designed or self.design(Magnitudes.of(x))
        if not model.top:
            return pack(step, model, np.zeros(0, np.int32), np.zeros(0, np.int32)), torch.zeros(len(x))
        values = x.numpy()
        magnitudes = np.abs(values)
        above = np.flatnonzero(magnitudes > edges[0])
        codes = np.zeros(len(values), np.int32)
        codes[above] = count_below(edges[1:], magnitudes[above]) + 1
        signs = np.signbit(values[above]).astype(np.int32)
        return pack(step, model, codes, signs, shifts.tobytes()), _decoded(codes, above, signs, step, model.top, shifts)

    def decode(self, body: memoryview, count: int) -> Tensor:
        found = unpack(body, count, _SHIFTED)
        shifts = np.frombuffer(found.own, np.int8)
        return _decoded(found.codes, found.nonzero, found.signs, found.step, found.top, shifts)

    def size(self, count: int) -> None:
        return None


def _steps(values: NDArray[Any]) -> NDArray[Any]:
    """`np.diff`, which would dominate the running time on a few values."""
    steps: NDArray[Any] = values[1:] - values[:-1]
    return steps


def _decoded(
    codes: Codes,
    nonzero: NDArray[np.int64],
    signs: Codes,
    step: float,
    top: int,
    shifts: NDArray[np.int8],
) -> Tensor:
    """Returns the values of the codes; `signs` has one entry per nonzero code, 1 if it is negative."""
    out = np.take(float32(step * _values(top, shifts)), codes)
    minus = nonzero[signs == 1]
    out[minus] = -out[minus]
    return torch.from_numpy(out)


def _shifts(counts: Counts, sums: Floats) -> NDArray[np.int8]:
    """Distances from codes 1, 2, 3, and 4 or more to the means of the values that they code, in 1/256 of a step."""
    codes = np.arange(len(counts))
    kinds = codes[1 : _SHIFTED + 1]
    means = np.add.reduceat(sums - codes * counts, kinds) / np.maximum(np.add.reduceat(counts, kinds), 1)
    return np.minimum(np.maximum(np.rint(256 * means), -128), 127).astype(np.int8)


def _values(top: int, shifts: NDArray[np.int8]) -> Floats:
    """Values of the codes 0..top, in steps."""
    codes = np.arange(top + 1)
    values = codes.astype(np.float64)
    if len(shifts):
        values[1:] += shifts[np.minimum(codes[1:], len(shifts)) - 1] / 256
    return values
