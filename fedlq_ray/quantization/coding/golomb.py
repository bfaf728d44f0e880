"""Golomb-Rice codes of sorted positions: each gap is a unary quotient and a remainder of b* bits.

Source: Sattler et al., IEEE TNNLS 2019, arXiv:1903.02891, Golomb encoding of positions: if each element is chosen with
probability p, a position takes b* + 1 / (1 - (1 - p)^(2^b*)) bits on average.
Departs from it: p is the chosen fraction k / n, which both sides know. One bit string holds all remainders, then all
quotients. It is as long as the paper's, which puts each quotient next to its remainder, but since the count is known,
neither side needs a loop.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.coding.packing import packed_size


def rice_bits(chosen: int, count: int) -> int:
    """b* = 1 + floor(log2(ln(phi - 1) / ln(1 - p))), the bits per remainder, for p = chosen / count in (0, 1].

    For p > 0.62 the formula is negative, and 0 is used.
    """
    if chosen == count:
        return 0
    golden = (math.sqrt(5) + 1) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log1p(-chosen / count))))


def encode(positions: NDArray[np.int64], count: int) -> bytes:
    """Encodes positions (k,), sorted, distinct, and from 0 to count - 1, as bits padded with zeros to whole bytes.

    Most significant bit first: k remainders, then for each quotient q the unary code of q zeros and a one.
    """
    if not len(positions):
        return b""
    bits = rice_bits(len(positions), count)
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum((gaps >> bits) + 1) - 1
    unary = np.zeros(ends[-1] + 1, np.uint8)
    unary[ends] = 1
    remainders = ((gaps[:, None] >> _shifts(bits)) & 1).astype(np.uint8)
    return np.packbits(np.concatenate([remainders.ravel(), unary])).tobytes()


def decode(data: bytes | memoryview, chosen: int, count: int) -> NDArray[np.int64]:
    """Returns the positions (chosen,) that `encode` turned into `data`, in time and memory bounded by its length.

    Raises:
        PayloadError: no positions have this code; a bit string has at most one reading.
    """
    if not 0 <= chosen <= count:
        raise PayloadError(f"{chosen} positions for {count} elements")
    if not chosen:
        if len(data):
            raise PayloadError(f"{len(data)} bytes for no positions")
        return np.zeros(0, np.int64)
    bits = rice_bits(chosen, count)
    fixed = chosen * bits
    # The gaps sum to at most count - chosen, so the quotients sum to at most (count - chosen) >> bits.
    least, most = fixed + chosen, fixed + chosen + ((count - chosen) >> bits)
    if not packed_size(least, 1) <= len(data) <= packed_size(most, 1):
        raise PayloadError(f"{len(data)} bytes, but {chosen} positions of {count} take {least} to {most} bits")
    flat = np.unpackbits(np.frombuffer(data, np.uint8))
    ends = np.flatnonzero(flat[fixed:])
    if len(ends) != chosen or len(data) != packed_size(fixed + int(ends[-1]) + 1, 1):
        raise PayloadError(f"{len(ends)} quotients in {len(data)} bytes do not make {chosen} positions")
    remainders = flat[:fixed].reshape(chosen, bits).astype(np.int64) @ (1 << _shifts(bits))
    gaps = ((np.diff(ends, prepend=-1) - 1) << bits) + remainders
    positions: NDArray[np.int64] = np.cumsum(gaps + 1) - 1
    if positions[-1] >= count:
        raise PayloadError(f"a position of {positions[-1]}, but there are only {count} elements")
    return positions


def _shifts(bits: int) -> NDArray[np.int64]:
    return np.arange(bits - 1, -1, -1, dtype=np.int64)
