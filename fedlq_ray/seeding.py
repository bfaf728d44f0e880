"""Random generators, keyed by the configuration's seed and a purpose, never by a global state.

Every draw is keyed by (seed, purpose, numbers such as round and client). A client's round therefore draws the same
numbers in every process, order and attempt. Users' models and functions may draw from the global generators of PyTorch,
NumPy and Python: `seeded` keys those in the same way.
"""

import contextlib
import random
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch


def _sequence(seed: int, purpose: str, *keys: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *keys])


def numpy_rng(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """Returns a NumPy generator for one purpose; `keys` are non-negative, such as round and client."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, *keys)))


def torch_seed(seed: int, purpose: str, *keys: int) -> int:
    """Returns a 63-bit seed for PyTorch for one purpose."""
    return int(_sequence(seed, purpose, *keys).generate_state(1, np.uint64)[0] >> 1)


def torch_rng(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """Returns a PyTorch generator, on the CPU, for one purpose."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, *keys))


@contextlib.contextmanager
def seeded(seed: int, purpose: str, *keys: int, gpus: Sequence[torch.device] = ()) -> Iterator[None]:
    """Seeds the global generators of PyTorch, NumPy and Python for one purpose, and restores them afterwards.

    Args:
        gpus: GPUs to seed as well.
    """
    number = torch_seed(seed, purpose, *keys)
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=gpus):
        # Without GPUs, torch.manual_seed records a stack trace for each call: 1.4 ms per client.
        (torch.manual_seed if gpus else torch.default_generator.manual_seed)(number)
        np.random.seed(number % 2**32)
        random.seed(number)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)
