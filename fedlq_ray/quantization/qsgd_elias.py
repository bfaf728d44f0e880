"""QSGD as in its paper: any number of levels, in buckets, with Elias's codes."""

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import read_header, require_finite
from fedlq_ray.quantization.coding.elias import GAMMA, OMEGA, Bits, Code, Ints

MOST = 2**20  # levels


@dataclass(frozen=True)
class QsgdElias:
    """Round each |x| / norm at random, without bias, to 0, 1/s, .., 1; send the nonzero levels and their signs.

    Source: Alistarh et al., NeurIPS 2017, arXiv:1610.02132, sections 3.1 to 3.3: buckets of d elements with one norm
    each, and E|Q(x) - x|^2 <= min(d/s^2, sqrt(d)/s) |x|^2 in each. With norm "max", which the authors train with, it is
    at most d/(4 s^2) max|x|^2, because the variance of a rounding is at most a quarter of the squared step.
    The paper has two ways to send levels: `sparse` sends the distance from the previous nonzero element and the level,
    for each nonzero element; `dense` sends level + 1 for every element. Both use Elias's omega code, as in the paper,
    or his gamma code, which is shorter for most small integers. The encoder uses the shortest of the four.
    Departs from it: distances continue across buckets; distances, levels and signs are grouped by kind (see `elias`),
    which takes no more bits.
    On N(0, 1) with the defaults and s = 1 / 4 / 16: error 16.9 / 3.5 / .33 of |x|^2; .43 / 1.03 / 2.33 bits per
    element, .06 of them for norms; the entropy of the signed levels is .25 / .73 / 1.76.
    Body: way (1 byte), levels and bucket (uint32 each; bucket 0 is the whole layer), a float32 norm per bucket, codes.

    Args:
        levels: s, 1 to 2**20; not bits.
        bucket: number of elements that share a norm; None for the whole layer.
        norm: Euclidean ("l2"), or the largest magnitude ("max").
    """

    number: ClassVar[int] = 4

    levels: int = 4
    bucket: int | None = 512
    norm: Literal["l2", "max"] = "l2"
    HEADER = struct.Struct("<BII")
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= MOST:
            raise ValueError(f"levels must be 1 to {MOST}, got {self.levels!r}")
        if self.bucket is not None and not 1 <= self.bucket < 2**32:
            raise ValueError(f"bucket must be 1 to {2**32 - 1} or None, got {self.bucket!r}")
        if self.norm not in ("l2", "max"):
            raise ValueError(f"norm must be l2 or max, got {self.norm!r}")

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        wide = x.numpy().astype(np.float64)  # in which the square of a float32 cannot overflow or underflow
        magnitudes, width = np.abs(wide), min(self.bucket or len(wide), len(wide))
        norms = self._norms(magnitudes, width)
        unit = magnitudes / _spread(np.where(norms > 0, norms, 1.0), width, len(wide))
        noise = torch.rand(x.shape, generator=rng, dtype=torch.float64).numpy()
        # No norm is below an element, because rounding to float32 preserves order. Noise near 1 may round a sum up.
        levels = np.floor(unit * self.levels + noise).clip(max=self.levels).astype(np.int64)
        where = np.flatnonzero(levels)
        way, bits = _write(_Codes(where, levels[where], wide[where] < 0), len(wide))
        header = self.HEADER.pack(way, self.levels, self.bucket or 0)
        return header + norms.tobytes() + np.packbits(bits).tobytes()

    def _norms(self, magnitudes: NDArray[np.float64], width: int) -> NDArray[np.float32]:
        starts = np.arange(0, len(magnitudes), width)
        if self.norm == "max":
            norms = np.maximum.reduceat(magnitudes, starts)
        else:
            norms = np.sqrt(np.add.reduceat(np.square(magnitudes), starts))
        return np.minimum(norms, np.finfo(np.float32).max).astype("<f4")

    def decode(self, body: memoryview, count: int) -> Tensor:
        way, s, bucket = (int(v) for v in read_header(body, self.HEADER))
        if way >= len(_WAYS):
            raise PayloadError(f"codes sent in unknown way {way}; ways are 0 to {len(_WAYS) - 1}")
        if not 1 <= s <= MOST:
            raise PayloadError(f"{s} levels; 1 to {MOST} are allowed")
        width = min(bucket or count, count)
        start, stop = self.HEADER.size, self.HEADER.size + 4 * -(-count // width)
        if len(body) < stop:
            raise PayloadError(f"{len(body)} bytes, but the scalars and norms alone take {stop}")
        norms = np.frombuffer(body[start:stop], "<f4")
        require_finite(torch.from_numpy(norms.copy()))
        norms = norms.astype(np.float64)
        if np.signbit(norms).any():
            raise PayloadError("a norm is negative")
        where, levels, minus = _read(np.unpackbits(np.frombuffer(body[stop:], np.uint8)), way, count, s)
        scales = norms[where // width]
        if (scales == 0).any():
            raise PayloadError("an element is not zero, but its norm is")
        dense = np.zeros(count, np.float32)
        dense[where] = levels / s * scales * (1 - 2.0 * minus)
        return torch.from_numpy(dense)

    def size(self, count: int) -> None:
        """Always None: the number of bytes depends on the elements."""
        return None


# `way` indexes this tuple of codes and whether zeros are omitted. Of ways of equal length, the first is used.
_WAYS: tuple[tuple[Code, bool], ...] = ((GAMMA, False), (OMEGA, False), (GAMMA, True), (OMEGA, True))


class _Codes(NamedTuple):
    """The nonzero elements (k,): their positions, their levels, and whether they are negative."""

    where: Ints
    levels: Ints
    minus: NDArray[np.bool_]


def _spread(norms: NDArray[Any], width: int, count: int) -> NDArray[Any]:
    """Returns each element's norm (count,)."""
    return np.repeat(norms, width)[:count]


def _sparse(codes: _Codes) -> list[Ints]:
    """The integers of the sparse ways: the number of nonzero elements plus 1, their distances, and their levels."""
    return [np.array([len(codes.where) + 1]), np.diff(codes.where, prepend=-1), codes.levels]


def _shortest(codes: _Codes, count: int) -> int:
    zeros = count - len(codes.where)
    lengths = [
        sum(code.length(each) for each in _sparse(codes))
        if sparse
        else zeros * int(code.lengths[0]) + code.length(codes.levels + 1)
        for code, sparse in _WAYS
    ]
    return lengths.index(min(lengths))


def _write(codes: _Codes, count: int) -> tuple[int, Bits]:
    """Returns the shortest way and the bits: the integers, then one sign per nonzero element, 1 for minus."""
    way = _shortest(codes, count)
    code, sparse = _WAYS[way]
    if sparse:
        integers = _sparse(codes)
    else:
        integers = [np.ones(count, np.int64)]
        integers[0][codes.where] += codes.levels
    return way, np.concatenate([*map(code.write, integers), codes.minus.astype(np.uint8)])


def _read(bits: Bits, way: int, count: int, s: int) -> _Codes:
    """Inverts `_write` for this way."""
    code, sparse = _WAYS[way]
    if sparse:
        (total,), bits = code.read(bits, 1, count + 1)
        distances, bits = code.read(bits, int(total) - 1, count)
        levels, bits = code.read(bits, len(distances), s)
        if distances.sum(dtype=np.float64) > count:  # in float64, in which it cannot overflow
            raise PayloadError(f"an element beyond the last of {count}")
        where = np.cumsum(distances) - 1
    else:
        integers, bits = code.read(bits, count, s + 1)
        where = np.flatnonzero(integers > 1)
        levels = integers[where] - 1
    minus, filling = bits[: len(where)] == 1, bits[len(where) :]
    if len(minus) < len(where):
        raise PayloadError(f"{len(minus)} signs, expected {len(where)}")
    if len(filling) > 7 or filling.any():
        raise PayloadError("the bits after the last sign are not padding")
    codes = _Codes(where, levels, minus)
    if _shortest(codes, count) != way:
        raise PayloadError(f"codes in way {way}, which is not the shortest")
    return codes
