"""Elias's gamma code for whole numbers above 0: short for small ones, with no limit known beforehand.

Elias, IEEE Trans. Inf. Theory 21(2), 1975: a number of k + 1 binary digits is k zeros, a one, and its k lower digits.
Here all prefixes come first and then all lower digits: the same bits, in an order that decodes without a loop.
"""

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import PayloadError

_MOST = 31  # binary digits after the first; more is refused


def encode(values: NDArray[np.int64]) -> bytes:
    """The code of numbers (n,), each from 1 to 2**32 - 1, filled up with zeros to whole bytes."""
    digits = _digits(values)
    ends = np.cumsum(digits + 1)
    starts = np.cumsum(digits) - digits
    prefix = int(ends[-1]) if len(values) else 0
    bits = np.zeros(prefix + int(digits.sum()), np.uint8)
    bits[ends - 1] = 1
    for place in range(int(digits.max(initial=0))):  # over binary digits, not over numbers
        having = digits > place
        bits[prefix + starts[having] + place] = (values[having] >> (digits[having] - 1 - place)) & 1
    return np.packbits(bits).tobytes()


def decode(data: bytes | memoryview, count: int) -> tuple[NDArray[np.int64], int]:
    """The first `count` numbers of `data`, and how many bytes they took.

    Raises:
        PayloadError: the bytes end too early, a number is beyond 32 binary digits, or the filling is not zero.
    """
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    ones = np.flatnonzero(bits)[:count]
    if len(ones) < count:
        raise PayloadError(f"{len(ones)} numbers where {count} were due")
    digits = np.diff(ones, prepend=-1) - 1
    if digits.max(initial=0) > _MOST:
        raise PayloadError(f"a number of {int(digits.max()) + 1} binary digits, where {_MOST + 1} are the most")
    prefix = int(ones[-1]) + 1 if count else 0
    end = prefix + int(digits.sum())
    used = -(-end // 8)
    if used > len(data):
        raise PayloadError(f"{len(data)} bytes where the numbers take {used}")
    if bits[end : 8 * used].any():
        raise PayloadError("the filling after the last number is not zero")
    starts = prefix + np.cumsum(digits) - digits
    values = np.ones(count, np.int64)
    for place in range(int(digits.max(initial=0))):
        having = digits > place
        values[having] = 2 * values[having] + bits[starts[having] + place]
    return values, used


def _digits(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Binary digits after the first: floor(log2)."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
