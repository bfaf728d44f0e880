"""QSGD as published: any number of levels, buckets, and Elias's code, in which zeros are cheap."""

import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import elias
from fedlq_ray.quantization.base import read_header
from fedlq_ray.quantization.packing import pack, unpack

MOST = 2**16  # levels


@dataclass(frozen=True)
class QsgdElias:
    """Round each |x| / norm, at random and without bias, onto 0, 1/s, ..., 1; send norms, levels by Elias, and signs.

    Source: Alistarh et al., NeurIPS 2017, arXiv:1610.02132: with the Euclidean norm of a bucket of d elements
    E|Q(x) - x|^2 <= min(d / s^2, sqrt(d) / s) |x|^2. Buckets and the greatest magnitude as norm are what its section 5
    trains with.
    Departs from it: Elias's gamma code of level + 1 for every element; the paper codes the gaps between non-zeros.
    Body: levels and bucket (uint32 each), a norm a bucket (float32), levels, a bit a non-zero for its sign.

    Args:
        levels: s, 1 to 2**16.
        bucket: elements that share a norm; None for all of a layer.
    """

    levels: int = 4
    bucket: int | None = 512
    norm: Literal["l2", "max"] = "l2"
    HEADER = struct.Struct("<II")

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= MOST or (self.bucket is not None and self.bucket < 1):
            raise ValueError(f"levels must be 1 to {MOST} and bucket at least 1: {self.levels!r}, {self.bucket!r}")

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        values = x.numpy().astype(np.float64)
        bucket = min(self.bucket or len(values), len(values))
        starts = np.arange(0, len(values), bucket)
        if self.norm == "max":
            norms = np.maximum.reduceat(np.abs(values), starts)
        else:
            norms = np.sqrt(np.add.reduceat(np.square(values), starts))
        norms = np.minimum(norms, np.finfo(np.float32).max).astype("<f4")
        each = np.repeat(norms.astype(np.float64), bucket)[: len(values)]
        unit = np.divide(np.abs(values), each, out=np.zeros_like(values), where=each > 0)
        noise = torch.rand(x.shape, generator=rng, dtype=torch.float64).numpy()
        # A norm that float32 rounded down may be short of an element.
        levels = np.minimum(np.floor(unit * self.levels + noise), self.levels).astype(np.int64)
        signs = np.signbit(values[levels > 0]).astype(np.uint8)
        return self.HEADER.pack(self.levels, bucket) + norms.tobytes() + elias.encode(levels + 1) + pack(signs, 1)

    def decode(self, body: memoryview, count: int) -> Tensor:
        top, bucket = (int(v) for v in read_header(body, self.HEADER))
        if not 1 <= top <= MOST or not 1 <= bucket <= count:
            raise PayloadError(f"{top} levels in buckets of {bucket}, of {count} elements")
        rest = body[self.HEADER.size :]
        buckets = -(-count // bucket)
        if len(rest) < 4 * buckets:
            raise PayloadError(f"{len(rest)} bytes where {buckets} norms take {4 * buckets}")
        norms = np.frombuffer(rest[: 4 * buckets], "<f4")
        if not np.isfinite(norms).all() or (norms < 0).any():
            raise PayloadError("a norm is negative or not finite")
        rest = rest[4 * buckets :]
        if 8 * len(rest) < count:  # before anything as large as `count` is made
            raise PayloadError(f"{len(rest)} bytes where {count} levels take a bit each at least")
        numbers, used = elias.decode(rest, count)
        levels = numbers - 1
        if levels.max(initial=0) > top:
            raise PayloadError(f"level {int(levels.max())} of {top}")
        nonzero = np.flatnonzero(levels)
        negative = unpack(rest[used:], len(nonzero), 1)
        out = np.zeros(count)
        out[nonzero] = levels[nonzero] / top * norms.astype(np.float64)[nonzero // bucket] * np.where(negative, -1, 1)
        return torch.from_numpy(out.astype(np.float32))

    def size(self, count: int) -> None:
        return None
