"""Quantizers that code each element separately: float32, float16, and stochastic min-max."""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_bits, read_header, require_bits, require_finite
from fedlq_ray.quantization.coding.packing import look_up, pack, packed_size


@dataclass(frozen=True)
class Absent:
    """A layer that is not sent: it takes no bytes and decodes to zeros."""

    number: ClassVar[int] = 12

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        return b""

    def decode(self, body: memoryview, count: int) -> Tensor:
        if len(body):
            raise PayloadError(f"{len(body)} bytes for a layer that is not sent")
        return torch.zeros(count)

    def size(self, count: int) -> int:
        return 0


@dataclass(frozen=True)
class Float32:
    """No quantization: little-endian float32."""

    number: ClassVar[int] = 0

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        return x.numpy().astype("<f4").tobytes()

    def decode(self, body: memoryview, count: int) -> Tensor:
        return _floats(body, count, "<f4", np.float32)

    def size(self, count: int) -> int:
        return 4 * count


@dataclass(frozen=True)
class Float16:
    """Half precision, rounded to nearest; values beyond its range are clipped to it."""

    number: ClassVar[int] = 1

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        return x.clamp(-65504.0, 65504.0).half().numpy().astype("<f2", copy=False).tobytes()

    def decode(self, body: memoryview, count: int) -> Tensor:
        return _floats(body, count, "<f2", np.float16)

    def size(self, count: int) -> int:
        return 2 * count


def _floats(body: memoryview, count: int, wire: str, native: type) -> Tensor:
    due = count * np.dtype(wire).itemsize
    if len(body) != due:
        raise PayloadError(f"{len(body)} bytes, but {count} elements take {due}")
    return require_finite(torch.from_numpy(np.frombuffer(body, wire).astype(native)).float())


@dataclass(frozen=True)
class MinMax:
    """Round at random, without bias, to one of 2**bits evenly spaced values from a layer's minimum to its maximum.

    Source: Suresh et al., ICML 2017, arXiv:1611.00429, stochastic k-level quantization.
    Departs from it: the range is that of a layer (or, with `strategy.scope=model`, of the whole vector); no rotation.
    Body: bits (1 byte), low and step (float32 each), codes of `bits` bits.
    """

    number: ClassVar[int] = 2
    family: ClassVar[str] = "minmax"

    bits: int = 8
    HEADER = struct.Struct("<Bff")
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_bits(self.bits)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        top = 2**self.bits - 1
        low, high = (float(v) for v in x.double().aminmax())
        step = as_float32((high - low) / top)
        if step == 0:  # a constant layer decodes exactly, whatever the codes are
            levels = torch.zeros_like(x)
        else:
            noise = torch.rand(x.shape, generator=rng)
            # Rounding may make the float32 step too small, and a level of 256 would wrap to 0 in uint8.
            levels = x.double().sub_(low).div_(step).add_(noise).clamp_(max=top)
        return self.HEADER.pack(self.bits, low, step) + pack(levels.numpy().astype(np.uint8), self.bits)

    def decode(self, body: memoryview, count: int) -> Tensor:
        bits, low, step = read_header(body, self.HEADER)
        codes = torch.arange(2 ** read_bits(bits), dtype=torch.float64)  # in which no product overflows
        levels = (codes * step + low).float().numpy()
        return require_finite(torch.from_numpy(look_up(body[self.HEADER.size :], count, int(bits), levels)))

    def size(self, count: int) -> int:
        return self.HEADER.size + packed_size(count, self.bits)
