"""Codes of a layer, magnitudes and signs, as bytes: a range coder with a parametric model of a few bytes."""

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import HIGHEST, read_header

HEADER = struct.Struct("<fHB")
TOP = 4095  # the highest code
LOSS = 1.5e-4  # bits per symbol that the range coder's rounding costs at most (tested: 0.5e-4 to 1.3e-4)
_DEPTHS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])  # numbers of codes that a model may describe separately
_LAZY = 0.12  # a lazy decoder, which tries codes one by one, is faster up to this mean code, times log2 of their number
_LOGIT = 16.0  # a hazard is sent as one byte in units of 1/16 logit, so from 0.0003 to 0.9997
# Bits by hazard byte: of stopping at a code, and of continuing past it.
_STOP, _GO = (np.log2(1 + np.exp(sign * (np.arange(256) - 128) / _LOGIT)) for sign in (-1, 1))
Floats = NDArray[np.float64]
Counts = NDArray[Any]  # int64, or float64 if they are expected counts
Codes = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """A layer's |x|, sorted, and its prefix sums (n + 1,). With these, evaluating a step size takes microseconds."""

    values: NDArray[np.float32]
    sums: Floats

    @classmethod
    def of(cls, x: Tensor) -> "Magnitudes":
        values = np.sort(np.abs(x.numpy()))
        sums = torch.empty(len(values) + 1, dtype=torch.float64)
        sums[0] = 0.0
        # The sums of np.cumsum, in a third of its time.
        torch.cumsum(torch.from_numpy(values), 0, dtype=torch.float64, out=sums[1:])
        return cls(values, sums.numpy())

    @property
    def peak(self) -> float:
        return float(self.values[-1])


def float32(values: Floats) -> NDArray[np.float32]:
    """Rounds to the nearest finite float32."""
    return np.minimum(values, HIGHEST).astype(np.float32)


class Model(NamedTuple):
    """Probabilities of codes 0..top: hazards P(code = k | code >= k) as bytes; the last holds for all later codes."""

    top: int
    hazards: bytes

    def probabilities(self) -> Floats:
        """Probabilities (top + 1,) float64, all above 0, with sum 1."""
        return _table(self).p

    def coded(self) -> Floats:
        """The probabilities that the range coder uses: each gets 2^-24, plus its share of the remainder."""
        return _table(self).coded

    def bits(self) -> Floats:
        """What the range coder takes for each code."""
        return _table(self).bits


class _Table(NamedTuple):
    p: Floats
    coded: Floats
    bits: Floats


@lru_cache(maxsize=128)  # clients, rounds and tries have few different models: at low rates, of one byte each
def _table(model: Model) -> _Table:
    logits = (np.frombuffer(model.hazards, np.uint8).astype(np.float64) - 128) / _LOGIT
    hazard = np.full(model.top + 1, 1 / (1 + np.exp(-logits[-1])))
    known = min(len(logits), model.top)
    hazard[:known] = 1 / (1 + np.exp(-logits[:known]))
    hazard[model.top] = 1.0
    survival = np.concatenate([[1.0], (1 - hazard[:-1]).cumprod()])
    p: Floats = np.maximum(hazard * survival, 1e-12)
    p /= p.sum()
    coded = (p * (2**24 - model.top - 1) + 1) / 2**24
    found = _Table(p, coded, -np.log2(coded))
    for array in found:
        array.flags.writeable = False
    return found


def fit(counts: Counts) -> Model:
    """Returns the model that codes these counts, of codes 0 to the highest that occurs, and itself in fewest bits."""
    top = len(counts) - 1
    if top == 1:
        return Model(1, _hazards(counts[:1], counts[1:]).tobytes())
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


def _hazards(stop: Counts, go: Counts) -> NDArray[np.uint8]:
    logits = np.log(np.maximum(stop, 1e-9) / np.maximum(go, 1e-9))
    hazards: NDArray[np.uint8] = np.minimum(np.maximum(np.rint(logits * _LOGIT) + 128, 0), 255).astype(np.uint8)
    return hazards


def geometric_bytes(count: int, nonzero: NDArray[Any], total: Floats) -> Floats:
    """Approximate bytes of a layer at several steps, which never fall: positions of the codes above 0, their signs, and
    magnitudes with a geometric distribution.

    Args:
        count: elements of the layer.
        nonzero: number of codes above 0 at each step.
        total: sum of the codes at each step.
    """
    mean = np.maximum(total / np.maximum(nonzero, 1e-9), 1.0)
    return np.maximum.accumulate((count * _entropy(nonzero / count) + nonzero * (1 + mean * _entropy(1 / mean))) / 8)


def _entropy(p: Floats) -> Floats:
    """Entropy of a biased coin, in bits."""
    q = 1 - p
    return -p * np.log2(np.maximum(p, 1e-300)) - q * np.log2(np.maximum(q, 1e-300))


class Coded(NamedTuple):
    """A decoded body: codes (count,) from 0 to `top`, the positions of those above 0, their signs (1 for minus), and
    the own bytes of the quantizer."""

    step: float
    top: int
    own: memoryview
    codes: Codes
    nonzero: NDArray[np.int64]
    signs: Codes


def pack(step: float, model: Model, codes: Codes, signs: Codes, own: bytes = b"") -> bytes:
    """A body: step (float32), highest code (2 bytes), length of the model (1 byte), hazards, the quantizer's own bytes,
    then the range coder's words: codes, and the signs of those above 0. If all are 0, it ends after the length."""
    if not model.top:
        return HEADER.pack(step, 0, 0)
    return HEADER.pack(step, model.top, len(model.hazards)) + model.hazards + own + _words(codes, signs, model)


def unpack(body: memoryview, count: int, own: int = 0) -> Coded:
    """Inverts `pack`; the quantizer's own bytes are one per code above 0, at most `own`.

    Raises:
        PayloadError: `pack` cannot have made these bytes.
    """
    step, top, depth = read_header(body, HEADER)
    if step <= 0:
        raise PayloadError(f"a step of {step:g}")
    rest, top, depth = body[HEADER.size :], int(top), int(depth)
    if top == 0:
        if len(rest) or depth:
            raise PayloadError(f"{len(rest)} bytes follow a layer of zeros")
        return Coded(step, 0, rest, np.zeros(count, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32))
    start = depth + min(top, own)
    if top > TOP or not 1 <= depth <= min(top, _DEPTHS[-1]):
        raise PayloadError(f"a model of {depth} codes of {top}")
    if len(rest) < start or (len(rest) - start) % 4:
        raise PayloadError(f"{len(rest)} bytes, but a model takes {start} and 4-byte words follow")
    model, words = Model(top, bytes(rest[:depth])), rest[start:]
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    try:
        codes = coder.decode(categorical(model, decode=True), count)
        nonzero = np.flatnonzero(codes != 0)
        signs = coder.decode(constriction.stream.model.Uniform(2), len(nonzero)) if len(nonzero) else codes[:0]
    except (AssertionError, ValueError) as exc:
        raise PayloadError(f"the range coder's words are damaged: {exc}") from exc
    if _words(codes, signs, model) != words:
        raise PayloadError("the range coder's words differ from the encoding of the codes that they decode to")
    return Coded(step, top, rest[depth:start], codes, nonzero, signs)


def _words(codes: Codes, signs: Codes, model: Model) -> bytes:
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(codes, categorical(model))
    coder.encode(signs, constriction.stream.model.Uniform(2))
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return words


def categorical(model: Model, decode: bool = False) -> Any:
    """Returns the coder's model. A lazy model decodes low codes faster and other codes slower; the words are equal."""
    p = model.probabilities()
    lazy = decode and float(p @ np.arange(len(p))) < _LAZY * math.log2(len(p))
    return constriction.stream.model.Categorical(p, lazy=lazy, perfect=False)
