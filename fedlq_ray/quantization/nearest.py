"""Deterministic rounding to the nearest of evenly spaced values."""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.quantization.base import as_float32, read_bits, read_header, require_bits, require_finite
from fedlq_ray.quantization.coding.packing import look_up, pack, packed_size


@dataclass(frozen=True)
class Nearest:
    """Round to the nearest of 2**bits values from a layer's minimum to its maximum."""

    number: ClassVar[int] = 13
    family: ClassVar[str] = "nearest"

    bits: int = 8
    HEADER = struct.Struct("<Bff")

    def __post_init__(self) -> None:
        require_bits(self.bits)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        low, high = (float(v) for v in x.double().aminmax())
        step, top = as_float32((high - low) / (2**self.bits - 1)), 2**self.bits - 1
        codes = torch.zeros_like(x) if step == 0 else ((x.double() - low) / step).round().clamp_(max=top)
        return self.HEADER.pack(self.bits, low, step) + pack(codes.numpy().astype(np.uint8), self.bits)

    def decode(self, body: memoryview, count: int) -> Tensor:
        bits, low, step = read_header(body, self.HEADER)
        values = (torch.arange(2 ** read_bits(bits), dtype=torch.float64) * step + low).float().numpy()
        return require_finite(torch.from_numpy(look_up(body[self.HEADER.size :], count, int(bits), values)))

    def size(self, count: int) -> int:
        return self.HEADER.size + packed_size(count, self.bits)
