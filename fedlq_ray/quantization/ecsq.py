"""Entropy-coded scalar quantization: one uniform step, a wide dead zone, and a range coder.

At low rates nothing that codes an element by itself is far better: on a Gaussian it stays within 0.254 bit of the
rate-distortion function R(D) = log2(sigma^2 / D) / 2, and closer where most codes are zero (Sullivan, IEEE Trans.
Inf. Theory 42(5), 1996, on Laplacian sources).
"""

import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_header
from fedlq_ray.quantization.cells import count_below

TOP = 4095  # the highest code; a step too small for it is raised
_DEPTHS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])  # how many codes a model may describe one by one
_SHIFTED = 4  # codes whose value is sent: 1, 2, 3, and all from 4 on together
_LAZY = 2.0  # codes that a lazy decoder may pass on average
_LOGIT = 16.0  # hazards go as bytes of sixteenths of a logit, so from 0.0003 to 0.9997
_PRIOR = 4.0  # elements' worth of belief that a code's hazard is that of those above
_LOSS = 1.5e-4  # bits that the range coder's rounding costs a symbol, at most (tested: 0.5 to 1.3)
# Bits by hazard byte: of stopping at a code, and of going on.
_STOP, _GO = (np.log2(1 + np.exp(sign * (np.arange(256) - 128) / _LOGIT)) for sign in (-1, 1))
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Model(NamedTuple):
    """How likely each code 0..top is: hazards P(code = k | code >= k) as bytes, the last for all that follow."""

    top: int
    hazards: bytes

    def probabilities(self) -> Floats:
        """(top + 1,) float64, above 0 and of sum 1."""
        logits = (np.frombuffer(self.hazards, np.uint8).astype(np.float64) - 128) / _LOGIT
        hazard = np.full(self.top + 1, 1 / (1 + np.exp(-logits[-1])))
        known = min(len(logits), self.top)
        hazard[:known] = 1 / (1 + np.exp(-logits[:known]))
        hazard[self.top] = 1.0
        survival = np.concatenate([[1.0], (1 - hazard[:-1]).cumprod()])
        p: Floats = np.maximum(hazard * survival, 1e-12)
        return p / p.sum()

    def coded(self) -> Floats:
        """The probabilities that the range coder makes of them: each is 2^-24 and a share of what is left."""
        return (self.probabilities() * (2**24 - self.top - 1) + 1) / 2**24


def fit(counts: Counts) -> Model:
    """The model that codes these counts (of code 0, 1, ..., of which there is one) in the fewest bits, with itself."""
    top = len(counts) - 1
    # Of the elements that reach a code, some stop there and the others go on.
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
    """How many bits code 1 costs more than code 0, 2 than 1, ..., the sign included: smooth in the counts."""
    stop, go = counts[:-1], counts[:0:-1].cumsum()[::-1]
    rest_stop, rest_go = (part[::-1].cumsum()[::-1] for part in (stop, go))
    hazard = (stop + _PRIOR * (rest_stop + 0.5) / (rest_stop + rest_go + 1)) / (stop + go + _PRIOR)
    bits = np.concatenate([-np.log2(hazard), [0.0]])
    more: Floats = _steps(bits) - np.log2(1 - hazard)
    more[0] += 1
    return more


def _hazards(stop: Counts, go: Counts) -> NDArray[np.uint8]:
    logits = np.log(np.maximum(stop, 1e-9) / np.maximum(go, 1e-9))
    return np.minimum(np.maximum(np.rint(logits * _LOGIT) + 128, 0), 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """A layer's |x| in order, and the sums of its first 0, 1, ..., n: what any step makes of it takes microseconds."""

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
    """A layer's quantizer: the highest magnitude of code 0, 1, ..., what codes stand for, and the bytes it will take.

    `num_bytes` is not below the truth; above it by a word at most, and by 30 bytes a million elements.
    """

    step: float
    edges: NDArray[np.float32]
    model: Model
    shifts: NDArray[np.int8]
    num_bytes: int


@dataclass(frozen=True)
class Ecsq:
    """Code x as multiples of `step`, with rate-distortion-optimised rounding and a range coder.

    A value goes to the code that is least in (error / step)^2 + trade x bits: small values mostly to zero. A code
    stands for the mean of what it codes (a centroid): the reconstruction has the least error, so that error feedback
    contracts; it is biased. Entropy coder: `constriction`'s range coder with a parametric model of a few bytes.

    Body: step (float32), highest code (2 bytes), length of the model (1 byte), hazards, shifts of the first codes'
    values (a byte each, 1/256 of a step), then the range coder's words: magnitudes, and signs of what is not zero.
    A layer of zeros is the step alone.

    Args:
        step: distance of two codes, above 0.
        trade: squared steps that a bit is worth; at high rates the optimum is ln(2) / 6 = 0.1155. At the same bytes,
            0.08 to 0.16 differ by less than 1 % of error at any rate.
        designed: what `design` gave for the layer to be encoded, where that is known.
    """

    step: float
    trade: float = 0.13
    designed: Design | None = field(default=None, compare=False, repr=False)
    HEADER = struct.Struct("<fHB")

    def __post_init__(self) -> None:
        if not self.step > 0 or not self.trade >= 0:
            raise ValueError(f"step must be above 0 and trade not below, got {self.step!r} and {self.trade!r}")

    def design(self, layer: Magnitudes) -> Design:
        """The codes' edges and values, and their model: plain rounding, and one improvement (more gain nothing)."""
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
        return self.send(x)[0]

    def send(self, x: Tensor) -> tuple[bytes, Tensor]:
        """What `encode` makes, and what `decode` makes of that: the codes are at hand, and need not be read back."""
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
            raise PayloadError(f"{len(rest)} bytes where a model takes {depth + shifts} and words of 4 follow")
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
            raise PayloadError("the range coder's words are not those of the codes that they decode to")
        return _decoded(codes, nonzero, signs, step, top, np.frombuffer(rest[depth : depth + shifts], np.int8))

    def size(self, count: int) -> None:
        return None


def _steps(values: NDArray[Any]) -> NDArray[Any]:
    """`np.diff`, which takes longer than all else on a few values."""
    return values[1:] - values[:-1]


def _float32(values: Floats) -> NDArray[np.float32]:
    """The nearest float32, which is finite."""
    return np.minimum(values, np.finfo(np.float32).max).astype(np.float32)


def _words(codes: NDArray[np.int32], signs: NDArray[np.int32], model: Model) -> bytes:
    """The range coder's bytes."""
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(codes, _categorical(model))
    coder.encode(signs, constriction.stream.model.Uniform(2))
    return coder.get_compressed().astype("<u4").tobytes()  # type: ignore[no-any-return]


def _decoded(
    codes: NDArray[np.int32],
    nonzero: NDArray[np.int64],
    signs: NDArray[np.int32],
    step: float,
    top: int,
    shifts: NDArray[np.int8],
) -> Tensor:
    """What codes stand for; `signs` are 1 where one that is not zero is negative."""
    out = np.take(_float32(step * _values(top, shifts)), codes)
    minus = nonzero[signs == 1]
    out[minus] = -out[minus]
    return torch.from_numpy(out)


def _categorical(model: Model, decode: bool = False) -> Any:
    """The coder's model. A lazy one finds a low code faster, and any slower; the words are the same."""
    p = model.probabilities()
    lazy = decode and float(p @ np.arange(len(p))) < _LAZY
    return constriction.stream.model.Categorical(p, lazy=lazy, perfect=False)


def _shifts(counts: Counts, sums: Floats) -> NDArray[np.int8]:
    """How far the mean of what a code codes lies from it, in 1/256 of a step: of codes 1, 2, 3, and 4 or more."""
    codes = np.arange(len(counts))
    kinds = codes[1 : _SHIFTED + 1]
    means = np.add.reduceat(sums - codes * counts, kinds) / np.maximum(np.add.reduceat(counts, kinds), 1)
    return np.minimum(np.maximum(np.rint(256 * means), -128), 127).astype(np.int8)


def _values(top: int, shifts: NDArray[np.int8]) -> Floats:
    """What the codes 0..top stand for, in steps."""
    codes = np.arange(top + 1)
    values = codes.astype(np.float64)
    if len(shifts):
        values[1:] += shifts[np.minimum(codes[1:], len(shifts)) - 1] / 256
    return values
