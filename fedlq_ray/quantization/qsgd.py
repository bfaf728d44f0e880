"""QSGD: a norm, and each element's fraction of it, rounded at random."""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_bits, read_header, require_bits
from fedlq_ray.quantization.coding.packing import look_up, pack, packed_size


@dataclass(frozen=True)
class Qsgd:
    """Round each |x| / norm at random, without bias, to one of s + 1 values from 0 to 1; send sign and value.

    Source: Alistarh et al., NeurIPS 2017, arXiv:1610.02132, section 3.1: E|Q(x) - x|^2 <= min(n/s^2, sqrt(n)/s) |x|^2,
    with the layer's Euclidean norm.
    Departs from it: codes have a fixed length instead of Elias's; s = 2**(bits - 1) - 1. One bit leaves no room for
    zero, so the two values are -norm and norm, unbiased with E|Q(x) - x|^2 = (n - 1) |x|^2.
    Body: bits (1 byte), norm (float32), codes of `bits` bits.
    """

    number: ClassVar[int] = 3
    family: ClassVar[str] = "qsgd"

    bits: int = 8
    HEADER = struct.Struct("<Bf")
    unbiased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_bits(self.bits)

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        norm = as_float32(float(x.double().norm()))
        unit = x / norm if norm > 0 else torch.zeros_like(x)
        noise = torch.rand(x.shape, generator=rng)
        if self.bits == 1:
            codes = unit.add_(1).div_(2).add_(noise).clamp_(max=1)
        else:
            s = 2 ** (self.bits - 1) - 1
            codes = unit.abs_().mul_(s).add_(noise).floor_().clamp_(max=s).copysign_(x).add_(s)
        return self.HEADER.pack(self.bits, norm) + pack(codes.numpy().astype(np.uint8), self.bits)

    def decode(self, body: memoryview, count: int) -> Tensor:
        bits, norm = read_header(body, self.HEADER)
        if norm < 0:
            raise PayloadError(f"the norm {norm:g} is negative")
        codes, s = torch.arange(2.0 ** read_bits(bits)), 2 ** (int(bits) - 1) - 1
        levels = (codes - s) * (norm / s) if s else (codes * 2 - 1) * norm
        if s:
            levels[-1] = torch.nan  # no encoder produces this code
        values = look_up(body[self.HEADER.size :], count, int(bits), levels.numpy())
        if np.isnan(values).any():
            raise PayloadError(f"a code above {2 * s}")
        return torch.from_numpy(values)

    def size(self, count: int) -> int:
        return self.HEADER.size + packed_size(count, self.bits)
