"""Costs of training, floating-point operations and memory, measured once per model."""

import copy

import torch
from torch import nn
from torch.utils import flop_counter

from fedlq_ray.errors import ConfigError


def _without_compiler() -> None:
    """Lets PyTorch count without importing its compiler.

    It hides the counter from the compiler, which it imports for that (2 s); nothing is compiled here. Where PyTorch
    does it in another way, counting takes longer.
    """
    hidden = getattr(getattr(flop_counter, "_FlopCounterMode", None), "__torch_dispatch__", None)
    if (counts := getattr(hidden, "__wrapped__", None)) is not None:
        counts.__dynamo_disable = counts


def example(input_shape: tuple[int, ...], vocabulary: int = 0) -> torch.Tensor:
    """Inputs for a model, all zero: (2, ...), int64 for tokens, else float32."""
    return torch.zeros(2, *input_shape, dtype=torch.long if vocabulary else torch.float32)


def training_flops(module: nn.Module, input_shape: tuple[int, ...], vocabulary: int = 0) -> float:
    """Returns the FLOPs of one sample's forward and backward pass; a multiplication and its addition count as two.

    PyTorch's own counter (matrix products and convolutions) counts them for a batch of two on a copy of the module.

    Raises:
        ConfigError: the model cannot take a training step (for example, its output is not a single tensor).
    """
    twin = copy.deepcopy(module).train()
    try:
        _without_compiler()
        with flop_counter.FlopCounterMode(display=False) as counter:
            twin(example(input_shape, vocabulary)).sum().backward()
    except Exception as exc:  # a user's model may raise anything
        raise ConfigError(
            f"model.name: a training step fails on inputs of shape {input_shape}: {type(exc).__name__}: {exc}"
        ) from exc
    return float(counter.get_total_flops()) / 2


def saved_bytes(module: nn.Module, input_shape: tuple[int, ...], vocabulary: int = 0) -> float:
    """Returns the bytes per sample that a forward pass keeps for its backward pass; parameters are not counted."""
    twin = copy.deepcopy(module).train()
    parameters = {parameter.data_ptr() for parameter in twin.parameters()}
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes * (tensor.data_ptr() not in parameters)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        twin(example(input_shape, vocabulary))
    return kept / 2
