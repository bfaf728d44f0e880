"""What training costs: floating-point operations, counted once a model."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def training_flops(module: nn.Module, input_shape: tuple[int, ...]) -> float:
    """FLOPs of one sample's forward and backward pass; a multiplication and its addition count as two.

    Counted by PyTorch's own counter (matrix products and convolutions) on a batch of two, with a copy of the module.
    """
    twin = copy.deepcopy(module).train()
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(2, *input_shape)).sum().backward()
    return counter.get_total_flops() / 2
