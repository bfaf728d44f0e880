"""Codes of 1 to 8 bits, packed without gaps, most significant bit first.

Eight codes, one byte each, form a 64-bit word. Three steps move neighbours together, after which the word's low `bits`
bytes hold the eight packed codes. Unpacking reverses these steps.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import PayloadError

_LANES = (8, 16, 32)  # distance in bits between adjacent codes, then between pairs, then between fours


def packed_size(count: int, bits: int) -> int:
    """Number of bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: NDArray[np.uint8], bits: int) -> bytes:
    """Packs codes (n,) below 2**bits into ceil(n * bits / 8) bytes; the last byte is padded with zeros."""
    if bits == 8:
        return codes.tobytes()
    if bits == 1:
        return np.packbits(codes).tobytes()
    if len(codes) % 8:
        whole = np.append(codes, np.zeros(-len(codes) % 8, np.uint8))
        return pack(whole, bits)[: packed_size(len(codes), bits)]
    words = codes.view("<u8")
    for lane in _LANES:
        width, mask = bits * lane // 8, _mask(bits, lane)
        words = (words & mask) << width | words >> lane & mask
    return _low_bytes(words.astype(">u8"), bits).tobytes()


def unpack(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint8]:
    """Returns the `count` codes that `pack` packed into `data`.

    Raises:
        PayloadError: the length is not that of `count` codes, or the padding of the last byte is not zero.
    """
    raw = _checked(data, count, bits)
    if bits == 8:
        return raw
    if bits == 1:
        return np.unpackbits(raw, count=count)
    padded = np.zeros(-(-count // 8) * bits, np.uint8)
    padded[: len(raw)] = raw
    words = np.zeros(len(padded) // bits, ">u8")
    _low_bytes(words, bits)[:] = padded.view(f"V{bits}")
    words = words.astype("<u8")
    for lane in reversed(_LANES):
        width, mask = bits * lane // 8, _mask(bits, lane)
        words = words >> width & mask | (words & mask) << lane
    return words.view(np.uint8)[:count]


def look_up(data: bytes | memoryview, count: int, bits: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Looks up the values (count,) of packed codes in `values` (2**bits,): `values[unpack(data, count, bits)]`.

    Raises:
        PayloadError: as `unpack`.
    """
    if 8 % bits:
        return np.take(values, unpack(data, count, bits))
    return np.take(values[_codes_of_bytes(bits)], _checked(data, count, bits), axis=0).reshape(-1)[:count]


def _checked(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint8]:
    """Returns the packed bytes. Raises PayloadError if their length or their padding is wrong."""
    if len(data) != packed_size(count, bits):
        raise PayloadError(
            f"{len(data)} bytes of codes, but {count} codes of {bits} bits take {packed_size(count, bits)}"
        )
    raw = np.frombuffer(data, np.uint8)
    if len(raw) and raw[-1] & (1 << -count * bits % 8) - 1:
        raise PayloadError("the padding after the last code is not zero")
    return raw


def _mask(bits: int, lane: int) -> np.uint64:
    """Mask of the first of every two lanes, as wide as its codes."""
    return np.uint64(sum((1 << bits * lane // 8) - 1 << at for at in range(0, 64, 2 * lane)))


def _low_bytes(words: NDArray[np.uint64], bits: int) -> NDArray[np.void]:
    """A view of the last `bits` bytes of big-endian words, for `bits` below 8."""
    return words.view([("zeros", f"V{8 - bits}"), ("low", f"V{bits}")])["low"]


@cache
def _codes_of_bytes(bits: int) -> NDArray[np.int64]:
    """The codes in each possible byte (256, 8 / bits), for `bits` that divide 8."""
    shifts = np.arange(8 - bits, -1, -bits)
    codes: NDArray[np.int64] = np.arange(256)[:, None] >> shifts & 2**bits - 1
    return codes
