"""The cost of levels in bytes and in error: functions shared by several strategies."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray.errors import ConfigError
from fedlq_ray.strategies.base import StrategyContext

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
Table = NDArray[np.float64]


def layer_sizes(context: StrategyContext, levels: Sequence[int]) -> NDArray[np.int64]:
    """Bytes of each layer that may be quantized, header included, at each level: (L, levels)."""
    return np.array([[context.size(layer, b) for b in levels] for layer in context.quantized], np.int64)


def squared_errors(context: StrategyContext, vector: Tensor, levels: Sequence[int]) -> Table:
    """|Q_b(x_l) - x_l|^2 of each layer at each level, (L, levels): one draw of the rounding, so an estimate.

    The noise is the same in every call and independent of the payload's, so a choice by these errors does not depend on
    the payload's draws.
    """
    table = np.zeros((len(context.quantized), len(levels)))
    for row, layer in enumerate(context.quantized):
        piece = vector[layer.start : layer.stop]
        for column, bits in enumerate(levels):
            quantizer = context.quantizer_at(bits)
            body = quantizer.encode(piece, torch.Generator().manual_seed(0))
            back = quantizer.decode(memoryview(body), layer.size)
            table[row, column] = float((back.double() - piece.double()).square().sum())
    return table


def require_update(context: StrategyContext) -> None:
    """Raises ConfigError if clients send models: a strategy that learns levels from updates would misjudge them."""
    if context.config.payload != "update":
        raise ConfigError(f"strategy.payload: {context.config.name} learns its levels from updates; use update")
