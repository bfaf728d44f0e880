"""Quantizers that take each element by itself: float32, float16, and stochastic min-max."""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_bits, read_header, require_bits, require_finite
from fedlq_ray.quantization.packing import pack, packed_size, unpack


@dataclass(frozen=True)
class Absent:
    """A layer that is not sent: no bytes, and zeros where it is decoded."""

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        return b""

    def decode(self, body: memoryview, count: int) -> Tensor:
        if len(body):
            raise PayloadError(f"{len(body)} bytes of a layer that is not sent")
        return torch.zeros(count)

    def size(self, count: int) -> int:
        return 0


@dataclass(frozen=True)
class Float32:
    """No quantization: little-endian float32."""

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        return x.numpy().astype("<f4").tobytes()

    def decode(self, body: memoryview, count: int) -> Tensor:
        return _floats(body, count, "<f4")

    def size(self, count: int) -> int:
        return 4 * count


@dataclass(frozen=True)
class Float16:
    """Half precision, rounded to nearest; values beyond its range become its largest."""

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        return x.clamp(-65504.0, 65504.0).numpy().astype("<f2").tobytes()

    def decode(self, body: memoryview, count: int) -> Tensor:
        return _floats(body, count, "<f2")

    def size(self, count: int) -> int:
        return 2 * count


def _floats(body: memoryview, count: int, dtype: str) -> Tensor:
    due = count * np.dtype(dtype).itemsize
    if len(body) != due:
        raise PayloadError(f"{len(body)} bytes where {count} elements take {due}")
    return require_finite(torch.from_numpy(np.frombuffer(body, dtype).astype(np.float32)))


@dataclass(frozen=True)
class MinMax:
    """Round, at random and without bias, onto 2**bits values evenly spaced from a layer's least to its greatest.

    Source: Suresh et al., ICML 2017, arXiv:1611.00429, stochastic k-level quantization.
    Departs from it: the range is a layer's (or, with `strategy.scope=model`, the whole vector's), without rotation.
    Body: bits (1 byte), low and step (float32 each), codes of `bits` bits.
    """

    bits: int
    HEADER = struct.Struct("<Bff")

    def __post_init__(self) -> None:
        require_bits(self.bits)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        top = 2**self.bits - 1
        low, high = (float(v) for v in x.double().aminmax())
        step = as_float32((high - low) / top)
        if step == 0:  # a constant layer decodes exactly, whatever its codes
            codes = torch.zeros_like(x)
        else:
            noise = torch.rand(x.shape, generator=rng)
            # A float32 step may be short of the range by a rounding: 256 would wrap to 0 in uint8.
            codes = ((x.double() - low) / step + noise).floor().clamp_(0, top)
        return self.HEADER.pack(self.bits, low, step) + pack(codes.to(torch.uint8).numpy(), self.bits)

    def decode(self, body: memoryview, count: int) -> Tensor:
        bits, low, step = read_header(body, self.HEADER)
        codes = torch.from_numpy(unpack(body[self.HEADER.size :], count, read_bits(bits)).astype(np.float64))
        return require_finite((codes * step + low).float())  # in float64, where no product overflows

    def size(self, count: int) -> int:
        return self.HEADER.size + packed_size(count, self.bits)
