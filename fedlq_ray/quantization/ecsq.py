"""Entropy-coded scalar quantization: one uniform step, a wide dead zone, and a range coder.

At low rates nothing that codes an element by itself is far better: on a Gaussian it stays within 0.254 bit of the
rate-distortion function R(D) = log2(sigma^2 / D) / 2, and closer where most codes are zero (Sullivan, IEEE Trans.
Inf. Theory 42(5), 1996, on Laplacian sources).
"""

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_header, require_finite

TOP = 4095  # the highest code; a step too small for it is raised
_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # how many codes a model may describe one by one
_SHIFTED = 4  # codes whose value is sent: 1, 2, 3, and all from 4 on together
_LOGIT = 16.0  # hazards go as bytes of sixteenths of a logit, so from 0.0003 to 0.9997
Floats = NDArray[np.float64]


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
        survival = np.concatenate([[1.0], np.cumprod(1 - hazard[:-1])])
        p: Floats = np.maximum(hazard * survival, 1e-12)
        return p / p.sum()


def fit(counts: NDArray[np.int64]) -> tuple[Model, float]:
    """The model that codes these counts (of code 0, 1, ...) in the fewest bits, itself included; and those bits."""
    top = len(counts) - 1
    at_least = np.cumsum(counts[::-1])[::-1]
    best: tuple[float, Model] | None = None
    for depth in _DEPTHS:
        tail = counts[depth - 1 :].sum() / max(1, at_least[depth - 1 :].sum()) if depth <= top else 0.5
        hazard = np.append(counts[: depth - 1] / np.maximum(at_least[: depth - 1], 1), tail)[: max(1, top)]
        logits = np.log(np.maximum(hazard, 1e-9) / np.maximum(1 - hazard, 1e-9))
        model = Model(top, np.clip(np.rint(logits * _LOGIT) + 128, 0, 255).astype(np.uint8).tobytes())
        bits = 8 * len(model.hazards) - float(counts @ np.log2(model.probabilities()))
        if best is None or bits < best[0]:
            best = bits, model
        if depth > top:
            break
    assert best is not None
    return best[1], best[0]


class Coded(NamedTuple):
    """An encoder's choices: codes of magnitudes (n,), where they stand for what, and what they will take."""

    codes: NDArray[np.int32]
    model: Model
    shifts: NDArray[np.int8]
    step: float
    num_bytes: float


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
        trade: squared steps that a bit is worth; at high rates the optimum is ln(2) / 6 = 0.1155.
    """

    step: float
    trade: float = 0.13
    HEADER = struct.Struct("<fHB")

    def __post_init__(self) -> None:
        if not self.step > 0 or not self.trade >= 0:
            raise ValueError(f"step must be above 0 and trade not below, got {self.step!r} and {self.trade!r}")

    def quantize(self, x: Tensor) -> Coded:
        """The codes of a layer (n,), and how many bytes they will take, within a few."""
        magnitude = np.abs(x.numpy().astype(np.float64))
        step = as_float32(max(self.step, float(magnitude.max()) / TOP, 1e-37))
        u = magnitude / step
        # What rounds to zero at any rate is left out of all that follows.
        above = np.flatnonzero(u > 0.5)
        v = u[above]
        codes = np.minimum(np.rint(v), TOP).astype(np.int32)
        centroids = np.arange(int(codes.max(initial=0)) + 1, dtype=np.float64)
        for _ in range(2):
            counts = np.bincount(codes, minlength=len(centroids))
            counts[0] += len(u) - len(v)
            rates = -np.log2(fit(counts)[0].probabilities()) + (np.arange(len(counts)) > 0)
            gaps = np.diff(centroids)
            cuts = (centroids[1:] + centroids[:-1]) / 2 + self.trade * np.diff(rates) / (2 * gaps)
            codes = np.searchsorted(np.maximum.accumulate(cuts), v).astype(np.int32)
            centroids = _values(len(centroids) - 1, _shifts(codes, v))
        top = int(codes.max(initial=0))
        counts = np.bincount(codes, minlength=top + 1)
        counts[0] += len(u) - len(v)
        model, bits = fit(counts)
        shifts = _shifts(codes, v)[: min(top, _SHIFTED)]
        whole = np.zeros(len(u), np.int32)
        whole[above] = codes
        fixed = self.HEADER.size + len(shifts) + 2  # the coder's last word is half used on average
        return Coded(whole, model, shifts, step, fixed + (bits + counts[1:].sum()) / 8 if top else self.HEADER.size)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        codes, model, shifts, step, _ = self.quantize(x)
        if not model.top:
            return self.HEADER.pack(step, 0, 0)
        words = _words(codes, np.signbit(x.numpy()[codes > 0]).astype(np.int32), model)
        return self.HEADER.pack(step, model.top, len(model.hazards)) + model.hazards + shifts.tobytes() + words

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
        values = step * _values(top, np.frombuffer(rest[depth : depth + shifts], np.int8))
        coder = constriction.stream.queue.RangeDecoder(np.frombuffer(rest[depth + shifts :], "<u4").astype(np.uint32))
        try:
            codes = coder.decode(_categorical(model), count)
            nonzero = np.flatnonzero(codes)
            signs = coder.decode(constriction.stream.model.Uniform(2), len(nonzero)) if len(nonzero) else codes[:0]
        except (AssertionError, ValueError) as exc:
            raise PayloadError(f"the range coder's words are damaged: {exc}") from exc
        if _words(codes, signs, model) != bytes(rest[depth + shifts :]):
            raise PayloadError("the range coder's words are not those of the codes that they decode to")
        out = np.zeros(count, np.float64)
        out[nonzero] = values[codes[nonzero]] * np.where(signs, -1, 1)
        with np.errstate(over="ignore"):
            return require_finite(torch.from_numpy(out.astype(np.float32)))

    def size(self, count: int) -> None:
        return None


def _words(codes: NDArray[np.int32], signs: NDArray[np.int32], model: Model) -> bytes:
    """The range coder's bytes."""
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(codes, _categorical(model))
    coder.encode(signs, constriction.stream.model.Uniform(2))
    return coder.get_compressed().astype("<u4").tobytes()  # type: ignore[no-any-return]


def _categorical(model: Model) -> Any:
    return constriction.stream.model.Categorical(model.probabilities(), perfect=False)


def _shifts(codes: NDArray[np.int32], u: Floats) -> NDArray[np.int8]:
    """How far the mean of what a code codes lies from it, in 1/256 of a step: of codes 1, 2, 3, and 4 or more."""
    kinds = np.minimum(codes, _SHIFTED)
    counts = np.maximum(np.bincount(kinds, minlength=_SHIFTED + 1)[1:], 1)
    means = np.bincount(kinds, weights=u - codes, minlength=_SHIFTED + 1)[1:] / counts
    return np.clip(np.rint(256 * means), -128, 127).astype(np.int8)


def _values(top: int, shifts: NDArray[np.int8]) -> Floats:
    """What the codes 0..top stand for, in steps."""
    codes = np.arange(top + 1)
    values = codes.astype(np.float64)
    if len(shifts):
        values[1:] += shifts[np.minimum(codes[1:], len(shifts)) - 1] / 256
    return values
