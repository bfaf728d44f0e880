"""Fine-grained quantization: bits per parameter by its magnitude, and a map of these bits."""

import bisect
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_header
from fedlq_ray.quantization.coding.packing import pack, packed_size, unpack

CHOICES = (0, 2, 4, 8)  # bits per parameter, by its two bits in the map
MAP_BITS = 2
_COSTS = [high - low for low, high in pairwise(CHOICES)]


@dataclass(frozen=True)
class FineGrained:
    """Choose 0, 2, 4 or 8 bits per element to minimise sum x^2 / 4^b at a given total; the map is sent and billed.

    Source: Li et al., FedFQ, arXiv:2408.08977: the choice of bits, the objective, and stochastic rounding of
    |x| / max|x| within each group of equal bits, as in the authors' code.
    Departs from it: bits are found exactly, not by simulated annealing (the objective is a sum of convex terms, so
    taking the steps with the most gain per bit is optimal, up to the last step that fits); the b bits include the sign,
    so they give 2**(b-1) - 1 steps from 0 to the maximum, whereas the authors' code has 2**b and a separate sign; the
    map is billed.
    An element of 0 bits decodes to 0, so the quantizer is biased.
    Body: the maxima of the groups of 2, 4 and 8 bits (float32 each), the map (2 bits per element), each group's codes.
    """

    number: ClassVar[int] = 11

    bits: float = 4.0
    HEADER = struct.Struct("<fff")

    def __post_init__(self) -> None:
        if not MAP_BITS < self.bits <= MAP_BITS + CHOICES[-1]:
            raise ValueError(
                f"bits include {MAP_BITS} for the map: they must be above {MAP_BITS} and at most 10, got {self.bits!r}"
            )

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        values = x.numpy().astype(np.float64)
        groups = assign(np.abs(values), int((self.bits - MAP_BITS) * len(values)))
        noise = torch.rand(x.shape, generator=rng).numpy()
        peaks, bodies = [], [pack(groups, MAP_BITS)]
        for group, bits in enumerate(CHOICES[1:], start=1):
            chosen = groups == group
            piece, steps = values[chosen], 2 ** (bits - 1) - 1
            peak = as_float32(float(np.abs(piece).max(initial=0.0)))
            unit = np.abs(piece) / peak if peak > 0 else np.zeros_like(piece)
            codes = np.sign(piece) * np.clip(np.floor(unit * steps + noise[chosen]), 0, steps) + steps
            peaks.append(peak)
            bodies.append(pack(codes.astype(np.uint8), bits))
        return self.HEADER.pack(*peaks) + b"".join(bodies)

    def decode(self, body: memoryview, count: int) -> Tensor:
        peaks = read_header(body, self.HEADER)
        if min(peaks) < 0:
            raise PayloadError("a group's maximum is negative")
        at = self.HEADER.size + packed_size(count, MAP_BITS)
        groups = unpack(body[self.HEADER.size : at], count, MAP_BITS)
        values = np.zeros(count)
        for group, (bits, peak) in enumerate(zip(CHOICES[1:], peaks, strict=True), start=1):
            chosen = groups == group
            members, steps = int(chosen.sum()), 2 ** (bits - 1) - 1
            end = at + packed_size(members, bits)
            codes = unpack(body[at:end], members, bits).astype(np.float64)
            if (codes > 2 * steps).any():
                raise PayloadError(f"a code above {2 * steps} in the group of {bits} bits")
            values[chosen] = (codes - steps) * (peak / steps)
            at = end
        if at != len(body):
            raise PayloadError(f"{len(body) - at} bytes follow the last group")
        return torch.from_numpy(values.astype(np.float32))

    def size(self, count: int) -> int | None:
        return None  # each group is padded to whole bytes, and zeros take no bits


def assign(sizes: NDArray[np.float64], budget: int) -> NDArray[np.uint8]:
    """Returns each element's index into CHOICES, by taking the steps that lower sum x^2 / 4^b most per bit.

    Args:
        sizes: magnitudes (n,).
        budget: total bits for all elements.
    """
    peak = float(sizes.max())
    energy = (sizes / peak) ** 2 if peak > 0 else np.zeros_like(sizes)
    falling = _gains(np.sort(energy))

    def spent(least: int) -> int:
        """Bits of all steps that gain more than the float64 with this bit pattern; patterns sort as the numbers do."""
        return sum(
            cost * (len(gains) - int(np.searchsorted(gains, _number(least), side="right")))
            for cost, gains in zip(_COSTS, falling, strict=True)
        )

    infinity = int(np.float64(np.inf).view(np.int64))
    pattern = bisect.bisect_left(range(infinity), True, key=lambda least: spent(least) <= budget)
    least, left = _number(pattern), budget - spent(pattern)
    steps = _gains(energy)
    groups = np.zeros(len(sizes), np.uint8)
    for gains in steps:
        groups += gains > least
    for cost, gains in zip(_COSTS, steps, strict=True):
        equal = np.flatnonzero(gains == least) if least > 0 else np.zeros(0, np.int64)
        taken = equal[: left // cost]
        groups[taken] += 1
        left -= cost * len(taken)
        if len(taken) < len(equal):
            break
    return groups


def _gains(energy: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Gain per bit of each step. It falls at least 16-fold from one step to the next, so steps are taken in order."""
    return [energy * (4.0**-low - 4.0**-high) / (high - low) for low, high in pairwise(CHOICES)]


def _number(pattern: int) -> np.float64:
    return np.int64(pattern).view(np.float64)
