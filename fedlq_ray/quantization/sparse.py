"""Quantizers that send few elements and their positions: top-k, and sparse ternary compression.

Both choose the k = max(1, round(fraction * n)) elements of largest magnitude. Ties are broken by the lower index, so
at most k are sent. Chosen zeros are not sent, because they decode to zero anyway: a layer with fewer than k nonzero
elements sends only these, and a zero layer sends none. The bytes depend on the positions, so `size` returns None.
"""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_header, require_finite
from fedlq_ray.quantization.coding import golomb
from fedlq_ray.quantization.coding.packing import look_up, pack, packed_size, unpack

GOLOMB, BITMAP = 0, 1  # how positions are sent: by Golomb codes, or one bit per element if that is shorter


@dataclass(frozen=True)
class TopK:
    """Send the elements of largest magnitude as float32, all others as zero.

    Source: Stich et al., NeurIPS 2018, arXiv:1809.07599, top_k: |Q(x) - x|^2 <= (1 - k/n) |x|^2. It is biased: use it
    with error feedback, as the authors do.
    Departs from it: k applies per layer; positions are sent by Golomb's code.
    Body: GOLOMB or BITMAP (1 byte), elements sent (4 bytes), their values (float32 each), their positions.
    """

    number: ClassVar[int] = 7

    fraction: float = 1.0  # of a layer's elements, above 0 and up to 1
    HEADER = struct.Struct("<BI")

    def __post_init__(self) -> None:
        _require_fraction(self.fraction)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        values = x.numpy()
        positions = _largest(values, self.fraction)
        way, where = _write_positions(positions, len(values))
        return self.HEADER.pack(way, len(positions)) + values[positions].astype("<f4").tobytes() + where

    def decode(self, body: memoryview, count: int) -> Tensor:
        way, chosen = (int(v) for v in read_header(body, self.HEADER))
        start, stop = self.HEADER.size, self.HEADER.size + 4 * chosen
        if len(body) < stop:
            raise PayloadError(f"{len(body)} bytes, but {chosen} values alone take {stop}")
        values = np.frombuffer(body[start:stop], "<f4").astype(np.float32)
        require_finite(torch.from_numpy(values))
        if (values == 0).any():
            raise PayloadError("one of the values is zero")
        return _scatter(values, _read_positions(way, body[stop:], chosen, count), count)

    def size(self, count: int) -> None:
        """None for any count: the bytes depend on where the elements lie."""
        return None


@dataclass(frozen=True)
class Stc:
    """Send the elements of largest magnitude as their sign times their mean magnitude mu, all others as zero.

    Source: sparse ternary compression. Sattler et al., IEEE TNNLS 2019, arXiv:1903.02891, Algorithm 1. It is biased:
    use it with error feedback, as the authors do. Each element sent takes one bit for its sign and
    b* + 1 / (1 - (1 - p)^(2^b*)) bits for its position.
    Departs from it: k applies per layer, not to the whole update; mu is the mean of the elements sent, so chosen zeros
    do not count.
    Body: GOLOMB or BITMAP (1 byte), elements sent (4 bytes), mu (float32), signs (1 bit each; 1 is minus), positions.
    """

    number: ClassVar[int] = 8

    fraction: float = 1.0  # of a layer's elements, above 0 and up to 1
    HEADER = struct.Struct("<BIf")

    def __post_init__(self) -> None:
        _require_fraction(self.fraction)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        values = x.numpy()
        positions = _largest(values, self.fraction)
        sent = values[positions].astype(np.float64)  # a sum of float32 may overflow
        mu = as_float32(float(np.abs(sent).mean())) if len(sent) else 0.0
        way, where = _write_positions(positions, len(values))
        return self.HEADER.pack(way, len(sent), mu) + pack((sent < 0).astype(np.uint8), 1) + where

    def decode(self, body: memoryview, count: int) -> Tensor:
        way, chosen, mu = read_header(body, self.HEADER)
        way, chosen = int(way), int(chosen)
        # Sent elements are not zero, so mu is above 0. Without elements mu is 0.0; str distinguishes it from -0.0.
        sound = mu > 0 if chosen else str(mu) == "0.0"
        if not sound:
            raise PayloadError(f"a mean magnitude of {mu:g} for {chosen} elements")
        start, stop = self.HEADER.size, self.HEADER.size + packed_size(chosen, 1)
        if len(body) < stop:
            raise PayloadError(f"{len(body)} bytes, but {chosen} signs alone take {stop}")
        signed = look_up(body[start:stop], chosen, 1, np.array([mu, -mu], np.float32))
        return _scatter(signed, _read_positions(way, body[stop:], chosen, count), count)

    def size(self, count: int) -> None:
        """None for any count: the bytes depend on where the elements lie."""
        return None


def _require_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and up to 1, got {fraction!r}")


def _largest(values: NDArray[np.float32], fraction: float) -> NDArray[np.int64]:
    """Sorted positions of the nonzero elements among the k of largest magnitude; ties go to the lower position."""
    count = len(values)
    k = max(1, round(fraction * count))
    magnitude = np.abs(values)
    threshold = np.partition(magnitude, count - k)[count - k]
    chosen = magnitude > threshold
    ties = np.flatnonzero(magnitude == threshold)
    chosen[ties[: k - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen & (magnitude > 0))


def _write_positions(positions: NDArray[np.int64], count: int) -> tuple[int, bytes]:
    """Returns how the positions are sent, and their bytes: the shorter way, or Golomb's code if both are equal."""
    coded = golomb.encode(positions, count)
    if len(coded) <= packed_size(count, 1):
        return GOLOMB, coded
    mask = np.zeros(count, np.uint8)
    mask[positions] = 1
    return BITMAP, pack(mask, 1)


def _read_positions(way: int, data: memoryview, chosen: int, count: int) -> NDArray[np.int64]:
    if way == GOLOMB:
        if len(data) > packed_size(count, 1):
            raise PayloadError(f"{len(data)} bytes of positions, but a bitmap takes {packed_size(count, 1)}")
        return golomb.decode(data, chosen, count)
    if way != BITMAP:
        raise PayloadError(f"positions sent in unknown way {way}; ways are {GOLOMB} and {BITMAP}")
    positions = np.flatnonzero(unpack(data, count, 1))
    if len(positions) != chosen:
        raise PayloadError(f"{len(positions)} positions, expected {chosen}")
    if _write_positions(positions, count)[0] != BITMAP:
        raise PayloadError("positions are sent as a bitmap, but Golomb's code is not longer")
    return positions


def _scatter(values: NDArray[np.float32], positions: NDArray[np.int64], count: int) -> Tensor:
    """Returns zeros (count,) with `values` at `positions`."""
    dense = np.zeros(count, np.float32)
    dense[positions] = values
    return torch.from_numpy(dense)
