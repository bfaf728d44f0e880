"""Elias's codes of positive integers, gamma and omega, which need no frequency table.

Source: Elias, IEEE Trans. Inf. Theory 21(2), 1975. Gamma codes v as w = floor(log2 v) in unary (w zeros and a one) and
the w bits of v below its leading bit: 2w + 1 bits. Omega, the recursive code of the QSGD paper, writes v in binary,
preceded by its length minus 1 in binary, and so on down to 2 or 3; a zero ends the code. It is shorter than gamma for
v >= 128 and longer for w = 2, 4 and 5.
Departs from it: integers are not written one after another. All unary codes come first, then the first remaining bit of
all integers that have one, then the second; for omega, the first group of all integers, then the second. The result is
as long as the original, and unambiguous because the reader knows the number of integers. Neither side loops over
elements, only over the bits of the largest integer.

Bits are arrays of 0 and 1 (uint8), integers are int64 below 2**53.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import PayloadError

Bits = NDArray[np.uint8]
Ints = NDArray[np.int64]


class Code(NamedTuple):
    """One of Elias's codes.

    Args:
        write: converts integers (n,), each at least 1, to bits; n may be 0.
        read: takes bits, the number of integers, and the largest allowed integer; returns the integers and the
            remaining bits. Raises PayloadError if the bits end too early or an integer is too large. Its time and
            memory are bounded by the number of bits.
        lengths: bits per integer, by w = floor(log2 v), for w = 0 to 52.
    """

    write: Callable[[Ints], Bits]
    read: Callable[[Bits, int, int], tuple[Ints, Bits]]
    lengths: Ints

    def length(self, values: Ints) -> int:
        """Number of bits that `write` returns for the integers."""
        return int(np.bincount(_log2(values), minlength=len(self.lengths)) @ self.lengths)


def _write_gamma(values: Ints) -> Bits:
    widths = _log2(values)
    unary = np.zeros(len(values) + int(widths.sum()), np.uint8)
    unary[np.cumsum(widths + 1) - 1] = 1
    return np.concatenate([unary, _write_low(values, widths)])


def _read_gamma(bits: Bits, count: int, most: int) -> tuple[Ints, Bits]:
    widest = most.bit_length() - 1
    ends = np.flatnonzero(bits[: count * (widest + 1)])[:count]
    if len(ends) < count:
        raise PayloadError(f"{len(ends)} of {count} integers up to {most}")
    widths = np.diff(ends, prepend=-1) - 1
    values, rest = _read_low(bits[ends[-1] + 1 if count else 0 :], widths, widest)
    return _at_most(values, most), rest


def _write_omega(values: Ints) -> Bits:
    chain = [values]  # v, floor(log2 v), ..., 1
    while chain[-1].max(initial=1) > 1:
        chain.append(np.maximum(_log2(chain[-1]), 1))
    table = np.stack(chain)
    groups = (table > 1).sum(axis=0)
    parts, which = [], np.arange(len(values))
    for step in range(1, len(chain) + 1):
        more = groups[which] >= step  # a group's first bit, which is 1, or the zero that ends the code
        which = which[more]
        lead = table[groups[which] - step, which]
        parts += [more.astype(np.uint8), _write_low(lead, _log2(lead))]
    return np.concatenate(parts)


def _read_omega(bits: Bits, count: int, most: int) -> tuple[Ints, Bits]:
    if len(bits) < count:
        raise PayloadError(f"{len(bits)} bits for {count} integers")
    widest = most.bit_length() - 1
    values, which = np.ones(count, np.int64), np.arange(count)
    while len(which):
        more, bits = bits[: len(which)], bits[len(which) :]
        if len(more) < len(which):
            raise PayloadError("the data ends within an integer")
        which = which[more == 1]
        values[which], bits = _read_low(bits, values[which], widest)
    return _at_most(values, most), bits


def _write_low(values: Ints, widths: Ints) -> Bits:
    """Returns the `widths` lowest bits of each integer: the first bits of all integers, then the second bits, ..."""
    planes = [np.zeros(0, np.uint8)]
    while len(values):
        more = widths > 0
        values, widths = values[more], widths[more] - 1
        planes.append((values >> widths & 1).astype(np.uint8))
    return np.concatenate(planes)


def _read_low(bits: Bits, widths: Ints, widest: int) -> tuple[Ints, Bits]:
    """Returns the integers, each a one followed by `widths` bits, and the remaining bits."""
    if widths.max(initial=0) > widest:  # checked first, because the sum of such widths may overflow
        raise PayloadError(f"an integer of more than {widest + 1} bits")
    if widths.sum() > len(bits):
        raise PayloadError("the data ends within an integer")
    values, which, at = np.ones(len(widths), np.int64), np.arange(len(widths)), 0
    for plane in range(int(widths.max(initial=0))):
        which = which[widths[which] > plane]
        values[which] = 2 * values[which] + bits[at : at + len(which)]
        at += len(which)
    return values, bits[at:]


def _log2(values: Ints) -> Ints:
    """floor(log2) of integers from 1 to 2**53, which float64 represents exactly."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1


def _at_most(values: Ints, most: int) -> Ints:
    if values.max(initial=1) > most:
        raise PayloadError(f"an integer above {most}")
    return values


def _omega_length(width: int) -> int:
    return _omega_length(width.bit_length() - 1) + width + 1 if width else 1


GAMMA = Code(_write_gamma, _read_gamma, 2 * np.arange(53) + 1)
OMEGA = Code(_write_omega, _read_omega, np.array([_omega_length(width) for width in range(53)]))
