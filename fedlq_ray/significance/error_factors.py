"""The error factor q of unbiased quantizers: E|Q(x) - x|^2 <= q |x|^2 for every x of a layer's size, E Q(x) = x.

One function per quantizer of docs/theory.md, and one for the plans of a round.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlq_ray.quantization import Float32, MinMax, Qsgd, QsgdElias, Quantizer, TernGrad
from fedlq_ray.training.local import Plan

Floats = NDArray[np.floating[Any]]

# Mean squared error of the Lloyd-Max quantizer of a unit Gaussian: Max, "Quantizing for minimum distortion", IRE
# Transactions on Information Theory 6, 1960, table I, for 2, 4, 8 and 16 values.
_LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def minmax_q(bits: ArrayLike, size: ArrayLike) -> Floats:
    """q of stochastic min-max, size / (2 (2^bits - 1)^2), since max - min <= sqrt(2) |x|; 0 at 32 bits (float32).

    Source: Suresh et al., ICML 2017, arXiv:1611.00429.
    """
    return minmax_error(bits, size, sqrt(2))


def minmax_error(bits: ArrayLike, size: ArrayLike, span: ArrayLike) -> Floats:
    """The maximum of E|Q(x) - x|^2 for stochastic min-max: size span^2 / (4 (2^bits - 1)^2), span = max - min.

    Elements that are uniform within their steps have two thirds of this error.
    """
    bits = _levels(bits)
    return np.where(bits == 32, 0.0, np.asarray(size) * np.square(span) / (4 * (2.0**bits - 1) ** 2))


def qsgd_q(bits: ArrayLike, size: ArrayLike) -> Floats:
    """q of `Qsgd`, whose s is 2^(bits - 1) - 1: min(size / (4 s^2), sqrt(size) / s), and size - 1 at 1 bit.

    Source: Alistarh et al., NeurIPS 2017, arXiv:1610.02132, lemma 3.1, whose size / s^2 is four times ours.
    """
    bits, size = _levels(bits), np.asarray(size, dtype=float)
    s = np.maximum(2.0 ** (bits - 1) - 1, 1)
    q = np.where(bits == 1, size - 1, np.minimum(size / (4 * s**2), np.sqrt(size) / s))
    return np.where(bits == 32, 0.0, q)


def lloyd_max_q(bits: int) -> float:
    """q of a uniformly random rotation, Lloyd-Max centroids and the unbiased scale: D / (1 - D), for large layers.

    Source: Vargaftik et al., EDEN, ICML 2022, arXiv:2108.08842. This is a limit, not a bound: q of small layers is
    slightly larger, and randomised Hadamard rotations are only nearly unbiased.
    """
    if bits not in _LLOYD_MAX:
        raise ValueError(f"bits must be 1 to 4, got {bits!r}")
    return _LLOYD_MAX[bits] / (1 - _LLOYD_MAX[bits])


def _levels(bits: ArrayLike) -> Floats:
    """Returns the levels as floats. Raises ValueError unless each is 1 to 8, or 32."""
    levels = np.asarray(bits, dtype=float)
    if not (((levels >= 1) & (levels <= 8)) | (levels == 32)).all():
        raise ValueError(f"bits must be 1 to 8, or 32, got {bits!r}")
    return levels


def elias_q(levels: int, size: int, bucket: int | None = None, norm: str = "l2") -> float:
    """q of `QsgdElias` with s = `levels`: min(d / (4 s^2), sqrt(d) / s), where d elements share a norm. With norm
    "max", the second term is (1 + sqrt(d)) / (2 s), and at s = 1 q is `terngrad_q`, because the quantizer is the same.

    Source: Alistarh et al., as for `qsgd_q`; a bucket counts as a layer.
    """
    shared = min(bucket or size, size)
    if norm == "max" and levels == 1:
        return terngrad_q(shared)
    return min(shared / (4 * levels**2), (sqrt(shared) if norm == "l2" else (1 + sqrt(shared)) / 2) / levels)


def terngrad_q(size: int) -> float:
    """q of TernGrad without clipping, (sqrt(size) - 1) / 2: E|Q(x) - x|^2 = max|x| |x|_1 - |x|^2. Relative to |x|^2, it
    is largest if one element is 1 and the others are 1 / (1 + sqrt(size)).

    Source: the error is from Wen et al., NeurIPS 2017, arXiv:1705.07878; the bound is ours.
    """
    return (sqrt(size) - 1) / 2


def quantizer_q(quantizer: Quantizer, size: int) -> float:
    """q of a quantizer for a layer of `size` elements.

    Raises:
        ValueError: the quantizer is biased, or its q is not known: EDEN has a limit (`lloyd_max_q`), but no bound.
    """
    if isinstance(quantizer, Float32):
        return 0.0
    if isinstance(quantizer, MinMax):
        return float(minmax_q(quantizer.bits, size))
    if isinstance(quantizer, Qsgd):
        return float(qsgd_q(quantizer.bits, size))
    if isinstance(quantizer, QsgdElias):
        return elias_q(quantizer.levels, size, quantizer.bucket, quantizer.norm)
    if isinstance(quantizer, TernGrad) and quantizer.clip is None:
        return terngrad_q(size)
    raise ValueError(f"{quantizer}: biased, or its q is not known, so the bound does not cover it")


def plan_q(plans: Sequence[Plan]) -> Floats:
    """q of each segment of each client's plan: (clients, segments).

    Raises:
        ValueError: as `quantizer_q`; also if a plan uses error feedback or lets clients choose their quantizers.
    """
    rows = []
    for plan in plans:
        if callable(plan.segments) or plan.error_feedback:
            raise ValueError("the bound is for plans without error feedback that name each layer's quantizer")
        rows.append([quantizer_q(s.quantizer, s.stop - s.start) for s in plan.segments])
    return np.array(rows)
