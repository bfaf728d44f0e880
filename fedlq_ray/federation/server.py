"""The server's step: it adds a cohort's mean update to the weights, or takes a momentum or Adam step with it.

Reddi et al., "Adaptive federated optimization", ICLR 2021, arXiv:2003.00295, Algorithm 2 (FedAvgM, FedAdam): the mean
update replaces the negative gradient. As in the paper, Adam's moments are not bias-corrected.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedlq_ray.config.settings import ServerConfig


class Moments(NamedTuple):
    """The optimizer's state, (d,) float32 each; None before the first step, or if the optimizer does not use it."""

    momentum: Tensor | None = None
    square: Tensor | None = None


def step(config: ServerConfig, moments: Moments, update: Tensor) -> tuple[Tensor, Moments]:
    """Returns the vector to add to the weights, (d,) float32, for this mean update, and the new moments."""
    if config.optimizer == "none":
        return (update if config.lr == 1 else config.lr * update), moments
    before = torch.zeros_like(update) if moments.momentum is None else moments.momentum
    if config.optimizer == "momentum":
        momentum = config.momentum * before + update
        return config.lr * momentum, Moments(momentum, moments.square)
    momentum = config.momentum * before + (1 - config.momentum) * update
    square = torch.zeros_like(update) if moments.square is None else moments.square
    square = config.beta2 * square + (1 - config.beta2) * update.square()
    return config.lr * momentum / (square.sqrt() + config.tau), Moments(momentum, square)
