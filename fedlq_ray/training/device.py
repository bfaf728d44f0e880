"""The device that models run on, and the settings that make its results reproducible."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from fedlq_ray.errors import ConfigError


@contextlib.contextmanager
def reproducible(device: str) -> Iterator[None]:
    """Use one thread, since more would change sums; on a GPU, deterministic kernels in full float32. Restores settings.

    A GPU's results depend on its type and on PyTorch's version, and differ from a CPU's.

    Raises:
        ConfigError: PyTorch finds no GPU in this process.
    """
    threads = torch.get_num_threads()
    deterministic, tf32 = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    torch.set_num_threads(1)
    try:
        if device == "cuda":
            require_gpu()
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS results may vary between calls
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False  # filling launches one more kernel per tensor
            torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call imports PyTorch's compiler: 2 s
            torch.use_deterministic_algorithms(deterministic)
        memory.fill_uninitialized_memory = filling
        torch.backends.cudnn.allow_tf32 = tf32


def emulates_bfloat16() -> bool:
    """Whether this processor lacks instructions for bfloat16, so that PyTorch converts to float32 and back."""
    known: Any = torch.cpu
    tests = (getattr(known, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return not any(test() for test in tests if test)


def require_gpu() -> None:
    """Raises ConfigError if PyTorch finds no GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("train.device=cuda: PyTorch finds no GPU in the process that trains")
