"""Where randomness comes from: the configuration's seed and what it is for, never a global state.

Every draw is keyed by (seed, purpose, numbers such as round and client). So a client's round draws the same
numbers in whatever process, order or attempt it runs.
"""

import zlib

import numpy as np
import torch


def _sequence(seed: int, purpose: str, *keys: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *keys])


def numpy_rng(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A NumPy generator for one purpose; `keys` are non-negative, such as round and client."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, *keys)))


def torch_seed(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed for PyTorch for one purpose."""
    return int(_sequence(seed, purpose, *keys).generate_state(1, np.uint64)[0] >> 1)


def torch_rng(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A PyTorch generator, on the CPU, for one purpose."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, *keys))
