"""Codes of 1 to 8 bits, packed without gaps, most significant bit first."""

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import PayloadError


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: NDArray[np.uint8], bits: int) -> bytes:
    """Codes (n,) below 2**bits as ceil(n * bits / 8) bytes; the last byte is filled up with zeros."""
    if bits == 8:
        return codes.tobytes()
    return np.packbits(np.unpackbits(codes[:, None], axis=1)[:, 8 - bits :]).tobytes()


def unpack(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint8]:
    """The `count` codes that `pack` made into `data`.

    Raises:
        PayloadError: the length is not that of `count` codes, or the filling of the last byte is not zero.
    """
    if len(data) != packed_size(count, bits):
        raise PayloadError(
            f"{len(data)} bytes of codes where {count} codes of {bits} bits take {packed_size(count, bits)}"
        )
    raw = np.frombuffer(data, np.uint8)
    if bits == 8:
        return raw
    flat = np.unpackbits(raw)
    if flat[count * bits :].any():
        raise PayloadError("the filling after the last code is not zero")
    columns = flat[: count * bits].reshape(count, bits)
    return np.right_shift(np.packbits(columns, axis=1)[:, 0], 8 - bits, dtype=np.uint8)
