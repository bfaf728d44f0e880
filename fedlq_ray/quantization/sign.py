"""One bit an element: its sign."""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization.base import as_float32, read_header
from fedlq_ray.quantization.packing import pack, packed_size, unpack


@dataclass(frozen=True)
class Sign:
    """sgn(x) times the mean magnitude, which is a contraction; or, not `scaled`, plain signs to vote with.

    Source: Karimireddy et al., ICML 2019, arXiv:1901.09847 (scaled sign); Bernstein et al., ICML 2018,
    arXiv:1802.04434 (plain). sgn(0) is 1, since a bit has no third value; a layer of zeros comes back as zeros.
    Body: scale (float32), a bit an element, 1 where it is negative.
    """

    scaled: bool = True
    HEADER = struct.Struct("<f")

    def encode(self, x: Tensor, rng: Generator) -> bytes:
        mean = float(x.double().abs().mean())
        scale = as_float32(mean) if self.scaled else float(mean > 0)
        return self.HEADER.pack(scale) + pack((x < 0).to(torch.uint8).numpy(), 1)

    def decode(self, body: memoryview, count: int) -> Tensor:
        (scale,) = read_header(body, self.HEADER)
        if scale < 0:
            raise PayloadError(f"a scale of {scale:g}, which is negative")
        negative = unpack(body[self.HEADER.size :], count, 1)
        return torch.from_numpy(np.where(negative, np.float32(-scale), np.float32(scale)))

    def size(self, count: int) -> int:
        return self.HEADER.size + packed_size(count, 1)
