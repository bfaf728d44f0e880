"""Golomb-Rice codes of sorted positions: the gap between neighbours as a unary quotient and a remainder of b* bits.

Source: Sattler et al., IEEE TNNLS 2019, arXiv:1903.02891, Golomb encoding of positions: where each element is chosen
with probability p, a position takes b* + 1 / (1 - (1 - p)^(2^b*)) bits on average.
Departs from it: p is the share that was chosen, k of n, which both sides know. All remainders come first and all
quotients follow, in one string of bits: as long as the paper's, where each quotient lies beside its remainder, but
with the count known neither side needs a loop.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.packing import packed_size


def rice_bits(chosen: int, count: int) -> int:
    """b* = 1 + floor(log2(ln(phi - 1) / ln(1 - p))), bits of a remainder, for p = chosen / count in (0, 1].

    Below 0 by that formula where p > 0.62, where 0 serves.
    """
    if chosen == count:
        return 0
    golden = (math.sqrt(5) + 1) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log1p(-chosen / count))))


def encode(positions: NDArray[np.int64], count: int) -> bytes:
    """Positions (k,), sorted, distinct, and from 0 to count - 1, as bits filled up with zeros to whole bytes.

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
    """The positions (chosen,) that `encode` made into `data`; what it needs is bounded by the bytes that are there.

    Raises:
        PayloadError: no such positions have this code; each string of bits has one reading at most.
    """
    if not 0 <= chosen <= count:
        raise PayloadError(f"{chosen} positions of {count} elements")
    if not chosen:
        if len(data):
            raise PayloadError(f"{len(data)} bytes for no positions")
        return np.zeros(0, np.int64)
    bits = rice_bits(chosen, count)
    fixed = chosen * bits
    # The gaps add up to count - chosen at most, hence the quotients to that many 2**bits.
    least, most = fixed + chosen, fixed + chosen + ((count - chosen) >> bits)
    if not packed_size(least, 1) <= len(data) <= packed_size(most, 1):
        raise PayloadError(f"{len(data)} bytes where {chosen} positions of {count} take {least} to {most} bits")
    flat = np.unpackbits(np.frombuffer(data, np.uint8))
    ends = np.flatnonzero(flat[fixed:])
    if len(ends) != chosen or len(data) != packed_size(fixed + int(ends[-1]) + 1, 1):
        raise PayloadError(f"{len(ends)} quotients in {len(data)} bytes do not make {chosen} positions")
    remainders = flat[:fixed].reshape(chosen, bits).astype(np.int64) @ (1 << _shifts(bits))
    gaps = ((np.diff(ends, prepend=-1) - 1) << bits) + remainders
    positions: NDArray[np.int64] = np.cumsum(gaps + 1) - 1
    if positions[-1] >= count:
        raise PayloadError(f"a position of {positions[-1]} where {count} elements are")
    return positions


def _shifts(bits: int) -> NDArray[np.int64]:
    return np.arange(bits - 1, -1, -1, dtype=np.int64)
