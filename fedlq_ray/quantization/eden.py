"""EDEN (and, at one bit, DRIVE): a random rotation, then the best scalar quantizer for a Gaussian."""

import math
import struct
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_header
from fedlq_ray.quantization.coding.cells import count_below
from fedlq_ray.quantization.coding.hadamard import Floats, rotate, unrotate
from fedlq_ray.quantization.coding.packing import look_up, pack

LEAST = 1 / 64  # bits per element, so that a body never represents more than 512 elements per byte


@dataclass(frozen=True)
class Eden:
    """Rotate at random, then send each coordinate's nearest Lloyd-Max centroid for N(0, 1), and one scale.

    With z the rotated x in units of |x|/sqrt(n), and c its centroids, the scale is |x|/sqrt(n) times
    - unbiased: |z|^2/<c, z>, so that the mean over rotations is x. E|Q(x) - x|^2/|x|^2 = .571 / .133 / .036 / .0096 at
      1 to 4 bits: 1/(1 - D) - 1, D being Lloyd-Max's distortion.
    - else: <c, z>/|c|^2, which has the least error, D = .363 / .118 / .0345 / .0095: a contraction, as error
      feedback requires.

    A fraction of a bit is a mixture: the first coordinates get the next higher level and the others the next lower, so
    that n elements take ceil(n bits) bits. A level of 0 bits sends nothing and decodes to 0: below one bit this is
    random sparsification. The rotation makes all coordinates equivalent, so choosing them needs no random draw.

    Source: Vargaftik et al., "DRIVE", NeurIPS 2021, arXiv:2105.08339, and "EDEN", ICML 2022, arXiv:2108.08842.
    Departs from it: the rotation (see `hadamard`) needs no padding; below one bit, coordinates are dropped after the
    rotation instead of before it, when their share of |z|^2 is known (the unbiased scale is then n/sent times that of
    the sent coordinates alone, and has no pole if few are sent); seeds have 4 bytes.
    Body: level and unused bits (1 byte: 8 level + unused), seed (uint32), scale (float32), codes in one bit stream.

    Args:
        bits: bits per element, 1/64 to 8; any fraction.
    """

    number: ClassVar[int] = 9
    family: ClassVar[str] = "eden"

    bits: float = 1.0
    unbiased: bool = True
    HEADER = struct.Struct("<BIf")

    def __post_init__(self) -> None:
        if not LEAST <= self.bits <= 8:
            raise ValueError(f"bits must be 1/64 to 8, got {self.bits!r}")

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        count, total = len(x), math.ceil(len(x) * self.bits)
        seed = int(torch.randint(0, 2**32, (), generator=rng))
        # In float64, in which the square of a float32 cannot overflow or underflow.
        rms = float(np.sqrt(np.square(x.numpy(), dtype=np.float64).mean()))
        z = rotate(np.divide(x.numpy(), rms or 1.0, dtype=np.float64).astype(np.float32), seed)
        c, stream = np.zeros_like(z), []
        for level, part in _groups(count, total):
            if level:
                centroids, boundaries = codebook(level)
                codes = count_below(boundaries, z[part])
                c[part] = np.take(centroids, codes)
                packed = np.frombuffer(pack(codes.astype(np.uint8), level), np.uint8)
                stream.append(np.unpackbits(packed, count=level * len(codes)))
        header = self.HEADER.pack(8 * (total // count) + -total % 8, seed, as_float32(rms * self._scale(z, c, total)))
        return header + np.packbits(np.concatenate(stream)).tobytes()

    def _scale(self, z: Floats, c: Floats, total: int) -> float:
        # NumPy sums in a fixed order; a BLAS product's order may change with the number of threads.
        product = float((c * z).sum(dtype=np.float64))
        if product <= 0:  # the layer is zero, or all sent coordinates are
            return 0.0
        if not self.unbiased:
            return product / float(np.square(c).sum(dtype=np.float64))
        sent = min(total, len(z))
        return len(z) / sent * float(np.square(z[:sent]).sum(dtype=np.float64)) / product

    def decode(self, body: memoryview, count: int) -> Tensor:
        first, seed, scale = read_header(body, self.HEADER)
        stream = body[self.HEADER.size :]
        level, unused = divmod(int(first), 8)
        total = 8 * len(stream) - unused
        if not count * LEAST <= total <= 8 * count or total // count != level:
            raise PayloadError(f"{total} bits of codes do not fit {count} elements at level {level}")
        if scale < 0:
            raise PayloadError(f"the scale {scale:g} is negative")
        flat = np.unpackbits(np.frombuffer(stream, np.uint8))
        if flat[total:].any():
            raise PayloadError("the padding after the last code is not zero")
        c, at = np.zeros(count, np.float32), 0
        for level, part in _groups(count, total):
            if level:
                codes, end = part.stop - part.start, at + level * (part.stop - part.start)
                c[part] = look_up(np.packbits(flat[at:end]).tobytes(), codes, level, codebook(level)[0])
                at = end
        top = float(np.finfo(np.float32).max)  # an input near it may decode to a value beyond it
        values = unrotate(c, int(seed)).astype(np.float64) * scale
        return torch.from_numpy(values.clip(-top, top).astype(np.float32))

    def size(self, count: int) -> int:
        return self.HEADER.size + (math.ceil(count * self.bits) + 7) // 8


def _groups(count: int, total: int) -> list[tuple[int, slice]]:
    """Returns each level and its coordinates, `total` bits together; coordinates of the higher level come first."""
    level, above = divmod(total, count)
    groups = [(level + 1, slice(0, above)), (level, slice(above, count))]
    return [(level, part) for level, part in groups if part.start < part.stop]


@cache
def codebook(level: int) -> tuple[Floats, Floats]:
    """Lloyd-Max for N(0, 1) at 1 to 8 bits: ascending centroids (2**level,), and the boundaries midway between them.

    By symmetry only the positive half is computed: each centroid is the mean of N(0, 1) between its boundaries. Lloyd's
    iteration alone takes about 10^5 steps at 8 bits; Newton's method for the same fixed point takes a few.
    """
    half = _half_centroids(2 ** (level - 1))
    centroids = np.concatenate([-half[::-1], half])
    found = centroids.astype(np.float32), ((centroids[1:] + centroids[:-1]) / 2).astype(np.float32)
    for array in found:
        array.setflags(write=False)  # the cache shares it between callers
    return found


def _half_centroids(k: int) -> NDArray[np.float64]:
    """Returns the k positive centroids."""
    # Start from Panter and Dite's density for many levels, that of N(0, 3), which is close enough.
    c = np.array([3**0.5 * NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * k)) for i in range(k)])
    for _ in range(8):  # from the fifth step, changes are rounding errors
        edges = np.concatenate([[0.0], (c[1:] + c[:-1]) / 2, [np.inf]])
        density = np.exp(-np.square(edges) / 2) / math.sqrt(2 * math.pi)
        tail = np.array([math.erfc(edge / math.sqrt(2)) / 2 for edge in edges])
        mass = tail[:-1] - tail[1:]
        mean = (density[:-1] - density[1:]) / mass
        # Derivatives of the mean with respect to the lower and upper edge; an edge is the mean of its neighbours.
        lower = density[:-1] * (mean - edges[:-1]) / mass / 2
        upper = density[1:-1] * (edges[1:-1] - mean[:-1]) / mass[:-1] / 2
        lower[0] = 0.0  # the edge at 0 is fixed
        c = c + _tridiagonal(-lower, 1 - lower - np.append(upper, 0.0), -upper, mean - c)
    return c


def _tridiagonal(
    lower: NDArray[np.float64], diagonal: NDArray[np.float64], upper: NDArray[np.float64], right: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Solve lower[i] x[i - 1] + diagonal[i] x[i] + upper[i] x[i + 1] = right[i]; all are (k,) except upper (k - 1,)."""
    pivots, x = diagonal.copy(), right.copy()
    for i in range(1, len(x)):  # no pivoting: the diagonal dominates because N(0, 1) is log-concave
        ratio = lower[i] / pivots[i - 1]
        pivots[i] -= ratio * upper[i - 1]
        x[i] -= ratio * x[i - 1]
    x[-1] /= pivots[-1]
    for i in range(len(x) - 2, -1, -1):
        x[i] = (x[i] - upper[i] * x[i + 1]) / pivots[i]
    return x
