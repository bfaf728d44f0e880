"""Sends only signs, with or without their mean magnitude."""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_header
from fedlq_ray.quantization.coding.packing import look_up, pack, packed_size


@dataclass(frozen=True)
class Sign:
    """Send each element as its sign times the layer's mean magnitude |x|_1 / n.

    Source: Karimireddy et al., ICML 2019, arXiv:1901.09847, Algorithm 1 (EF-signSGD): |Q(x) - x|^2 =
    (1 - |x|_1^2 / (n |x|^2)) |x|^2, a contraction. It is biased: use it with error feedback, as the authors do.
    Unscaled, each element is 1 or -1: a vote, as in signSGD with majority vote (Bernstein et al., ICML 2018,
    arXiv:1802.04434).
    Departs from it: sgn(0) is 1, because one bit has no third value; an all-zero layer decodes to zeros.
    Body: scale (float32), one bit per element; 1 is plus.

    Args:
        scaled: whether to scale by the mean magnitude; otherwise the scale is 1.
    """

    number: ClassVar[int] = 6

    scaled: bool = True
    HEADER = struct.Struct("<f")

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        values = x.numpy()
        mean = float(np.abs(values).mean(dtype=np.float64))  # in float32 a sum may overflow
        scale = as_float32(mean) if self.scaled else float(mean > 0)
        return self.HEADER.pack(scale) + pack((values >= 0).view(np.uint8), 1)

    def decode(self, body: memoryview, count: int) -> Tensor:
        (scale,) = read_header(body, self.HEADER)
        if np.signbit(scale):
            raise PayloadError(f"the scale {scale:g} is negative")
        minus_plus = np.array([-scale, scale], np.float32)
        return torch.from_numpy(look_up(body[self.HEADER.size :], count, 1, minus_plus))

    def size(self, count: int) -> int:
        return self.HEADER.size + packed_size(count, 1)
