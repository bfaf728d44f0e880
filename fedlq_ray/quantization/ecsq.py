"""Entropy-coded scalar quantization: one uniform step, a wide dead zone, and a range coder.

At low rates no scheme that codes each element separately is much better: on a Gaussian it stays within 0.254 bit of
the rate-distortion function R(D) = log2(sigma^2 / D) / 2, and closer if most codes are zero (Sullivan, IEEE Trans.
Inf. Theory 42(5), 1996, on Laplacian sources).
"""

import struct
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_header
from fedlq_ray.quantization.coding.cells import count_below

TOP = 4095  # the highest code; a step that is too small for it is raised
_DEPTHS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])  # numbers of codes that a model may describe separately
_SHIFTED = 4  # codes whose values are sent: 1, 2, 3, and one value for all codes from 4
_LAZY = 2.0  # a lazy decoder is used if it skips at most this many codes on average
_LOGIT = 16.0  # a hazard is sent as one byte in units of 1/16 logit, so from 0.0003 to 0.9997
_PRIOR = 4.0  # weight, in elements, of the prior that a code's hazard equals that of the codes above
_LOSS = 1.5e-4  # bits per symbol that the range coder's rounding costs at most (tested: 0.5e-4 to 1.3e-4)
# Bits by hazard byte: of stopping at a code, and of continuing past it.
_STOP, _GO = (np.log2(1 + np.exp(sign * (np.arange(256) - 128) / _LOGIT)) for sign in (-1, 1))
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Model(NamedTuple):
    """Probabilities of codes 0..top: hazards P(code = k | code >= k) as bytes; the last holds for all later codes."""

    top: int
    hazards: bytes

    def probabilities(self) -> Floats:
        """Probabilities (top + 1,) float64, all above 0, with sum 1."""
        logits = (np.frombuffer(self.hazards, np.uint8).astype(np.float64) - 128) / _LOGIT
        hazard = np.full(self.top + 1, 1 / (1 + np.exp(-logits[-1])))
        known = min(len(logits), self.top)
        hazard[:known] = 1 / (1 + np.exp(-logits[:known]))
        hazard[self.top] = 1.0
        survival = np.concatenate([[1.0], (1 - hazard[:-1]).cumprod()])
        p: Floats = np.maximum(hazard * survival, 1e-12)
        p /= p.sum()
        return p

    def coded(self) -> Floats:
        """The probabilities that the range coder uses: each gets 2^-24, plus its share of the remainder."""
        return (self.probabilities() * (2**24 - self.top - 1) + 1) / 2**24


def fit(counts: Counts) -> Model:
    """Returns the model that codes these counts, of codes 0 to the highest that occurs, and itself in fewest bits."""
    top = len(counts) - 1
    # Of the elements that reach a code, some stop there and the others continue to higher codes.
    stop, go = counts[:-1], counts[:0:-1].cumsum()[::-1]
    each = _hazards(stop, go)
    before = np.concatenate([[0.0], (stop * _STOP[each] + go * _GO[each]).cumsum()])
    depths = np.minimum(_DEPTHS[: int(_DEPTHS.searchsorted(top)) + 1], top)
    rest_stop, rest_go = (part[::-1].cumsum()[::-1][depths - 1] for part in (stop, go))
    rest = _hazards(rest_stop, rest_go)
    bits = 8 * depths + before[depths - 1] + rest_stop * _STOP[rest] + rest_go * _GO[rest]
    best = int(np.argmin(bits))
    return Model(top, each[: depths[best] - 1].tobytes() + rest[best].tobytes())


def _dearer(counts: Counts) -> Floats:
    """Extra bits of code 1 over code 0, of 2 over 1, ..., the sign included; they are smooth in the counts."""
    stop, go = counts[:-1], counts[:0:-1].cumsum()[::-1]
    rest_stop, rest_go = (part[::-1].cumsum()[::-1] for part in (stop, go))
    hazard = (stop + _PRIOR * (rest_stop + 0.5) / (rest_stop + rest_go + 1)) / (stop + go + _PRIOR)
    bits = np.concatenate([-np.log2(hazard), [0.0]])
    more: Floats = _steps(bits) - np.log2(1 - hazard)
    more[0] += 1
    return more


def _hazards(stop: Counts, go: Counts) -> NDArray[np.uint8]:
    logits = np.log(np.maximum(stop, 1e-9) / np.maximum(go, 1e-9))
    hazards: NDArray[np.uint8] = np.minimum(np.maximum(np.rint(logits * _LOGIT) + 128, 0), 255).astype(np.uint8)
    return hazards


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """A layer's |x|, sorted, and its prefix sums (n + 1,). With these, evaluating a step size takes microseconds."""

    values: NDArray[np.float32]
    sums: Floats

    @classmethod
    def of(cls, x: Tensor) -> "Magnitudes":
        values = np.sort(np.abs(x.numpy()))
        sums = np.zeros(len(values) + 1)
        np.cumsum(values, dtype=np.float64, out=sums[1:])
        return cls(values, sums)

    @property
    def peak(self) -> float:
        return float(self.values[-1])


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

    step: float = 1.0
    trade: float = 0.13
    designed: Design | None = field(default=None, compare=False, repr=False)
    HEADER = struct.Struct("<fHB")

    def __post_init__(self) -> None:
        if not self.step > 0 or not self.trade >= 0:
            raise ValueError(f"step must be above 0 and trade at least 0, got {self.step!r} and {self.trade!r}")

    def design(self, layer: Magnitudes) -> Design:
        """Choose the codes' edges, values and model: plain rounding, then one refinement (more would gain nothing)."""
        step = max(self.step, layer.peak / TOP, 1e-37)
        edges: Floats = np.arange(min(round(layer.peak / step), TOP), dtype=np.float64) + 0.5
        step, count = as_float32(step), len(layer.values)
        for last in (False, True):
            ends = _float32(edges * step)
            bounds = np.concatenate([[0], layer.values.searchsorted(ends, side="right"), [count]])
            top = int(bounds.searchsorted(count)) - 1
            if not top:
                break
            counts = _steps(bounds[: top + 2])
            shifts = _shifts(counts, _steps(layer.sums[bounds[: top + 2]]) / step)
            if last:
                model = fit(counts)
                nonzero = count - int(counts[0])
                bits = counts @ -np.log2(model.coded()) + nonzero + _LOSS * (count + nonzero)
                fixed = self.HEADER.size + len(model.hazards) + len(shifts)
                return Design(step, ends[:top], model, shifts, fixed + 4 * int(bits / 32 + 1.1))
            centroids = _values(top, shifts)
            edges = (centroids[1:] + centroids[:-1]) / 2 + self.trade * _dearer(counts) / (2 * _steps(centroids))
            edges = np.maximum.accumulate(np.maximum(edges, 0.5))
        return Design(step, ends[:0], Model(0, b""), np.zeros(0, np.int8), self.HEADER.size)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        return self.roundtrip(x, rng)[0]

    def roundtrip(self, x: Tensor, rng: Generator) -> tuple[bytes, Tensor]:
        step, edges, model, shifts, _ = self.designed or self.design(Magnitudes.of(x))
        if not model.top:
            return self.HEADER.pack(step, 0, 0), torch.zeros(len(x))
        values = x.numpy()
        magnitudes = np.abs(values)
        above = np.flatnonzero(magnitudes > edges[0])
        codes = np.zeros(len(values), np.int32)
        codes[above] = count_below(edges[1:], magnitudes[above]) + 1
        signs = np.signbit(values[above]).astype(np.int32)
        words = _words(codes, signs, model)
        body = self.HEADER.pack(step, model.top, len(model.hazards)) + model.hazards + shifts.tobytes() + words
        return body, _decoded(codes, above, signs, step, model.top, shifts)

    def decode(self, body: memoryview, count: int) -> Tensor:
        step, top, depth = read_header(body, self.HEADER)
        if step <= 0:
            raise PayloadError(f"a step of {step:g}")
        rest = body[self.HEADER.size :]
        top, depth = int(top), int(depth)
        if top == 0:
            if len(rest) or depth:
                raise PayloadError(f"{len(rest)} bytes follow a layer of zeros")
            return torch.zeros(count)
        shifts = min(top, _SHIFTED)
        if top > TOP or not 1 <= depth <= min(top, _DEPTHS[-1]):
            raise PayloadError(f"a model of {depth} codes of {top}")
        if len(rest) < depth + shifts or (len(rest) - depth - shifts) % 4:
            raise PayloadError(f"{len(rest)} bytes, but a model takes {depth + shifts} and 4-byte words follow")
        model = Model(top, bytes(rest[:depth]))
        words = rest[depth + shifts :]
        coder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
        try:
            codes = coder.decode(_categorical(model, decode=True), count)
            nonzero = np.flatnonzero(codes != 0)
            signs = coder.decode(constriction.stream.model.Uniform(2), len(nonzero)) if len(nonzero) else codes[:0]
        except (AssertionError, ValueError) as exc:
            raise PayloadError(f"the range coder's words are damaged: {exc}") from exc
        if _words(codes, signs, model) != words:
            raise PayloadError("the range coder's words differ from the encoding of the codes that they decode to")
        return _decoded(codes, nonzero, signs, step, top, np.frombuffer(rest[depth : depth + shifts], np.int8))

    def size(self, count: int) -> None:
        return None


def _steps(values: NDArray[Any]) -> NDArray[Any]:
    """`np.diff`, which would dominate the running time on a few values."""
    steps: NDArray[Any] = values[1:] - values[:-1]
    return steps


def _float32(values: Floats) -> NDArray[np.float32]:
    """Rounds to the nearest finite float32."""
    return np.minimum(values, np.finfo(np.float32).max).astype(np.float32)


def _words(codes: NDArray[np.int32], signs: NDArray[np.int32], model: Model) -> bytes:
    """Returns the range coder's bytes."""
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(codes, _categorical(model))
    coder.encode(signs, constriction.stream.model.Uniform(2))
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return words


def _decoded(
    codes: NDArray[np.int32],
    nonzero: NDArray[np.int64],
    signs: NDArray[np.int32],
    step: float,
    top: int,
    shifts: NDArray[np.int8],
) -> Tensor:
    """Returns the values of the codes; `signs` has one entry per nonzero code, 1 if it is negative."""
    out = np.take(_float32(step * _values(top, shifts)), codes)
    minus = nonzero[signs == 1]
    out[minus] = -out[minus]
    return torch.from_numpy(out)


def _categorical(model: Model, decode: bool = False) -> Any:
    """Returns the coder's model. A lazy model decodes low codes faster and other codes slower; the words are equal."""
    p = model.probabilities()
    lazy = decode and float(p @ np.arange(len(p))) < _LAZY
    return constriction.stream.model.Categorical(p, lazy=lazy, perfect=False)


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
