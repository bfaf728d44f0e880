"""Models of texts: tokens (n, length) int64 in, logits out, at every position or after the last."""

import torch
from torch import Tensor, nn

from fedlq_ray.errors import ConfigError


class _Recurrent(nn.Module):
    def __init__(
        self, vocabulary: int, outputs: int, embedding: int, hidden: int, layers: int, positions: bool
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, outputs)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(x))
        logits: Tensor = self.fc(states if self.positions else states[:, -1])
        return logits


def lstm(
    input_shape: tuple[int, ...],
    num_classes: int,
    vocabulary: int,
    positions: bool = True,
    embedding: int = 8,
    hidden: int = 256,
    layers: int = 2,
) -> nn.Module:
    """An embedding, LSTM layers, and a linear layer: LEAF's model for Shakespeare (Caldas et al., arXiv:1812.01097),
    with 0.82 M parameters for 80 tokens."""
    _require_tokens("lstm", vocabulary)
    return _Recurrent(vocabulary, num_classes, embedding, hidden, layers, positions)


class _Transformer(nn.Module):
    def __init__(
        self, length: int, vocabulary: int, outputs: int, width: int, heads: int, layers: int, positions: bool
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.fc = nn.Linear(width, outputs)
        self.positions = positions
        mask = torch.triu(torch.full((length, length), float("-inf")), 1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        states = self.blocks(self.embedding(x) + self.places, mask=self.mask, is_causal=True)
        logits: Tensor = self.fc(states if self.positions else states[:, -1])
        return logits


def transformer(
    input_shape: tuple[int, ...],
    num_classes: int,
    vocabulary: int,
    positions: bool = True,
    width: int = 128,
    heads: int = 4,
    layers: int = 4,
) -> nn.Module:
    """A causal transformer with learned positions and normalisation before each block, 0.8 M parameters."""
    _require_tokens("transformer", vocabulary)
    return _Transformer(input_shape[0], vocabulary, num_classes, width, heads, layers, positions)


def _require_tokens(name: str, vocabulary: int) -> None:
    if not vocabulary:
        raise ConfigError(f"model.name: {name} takes tokens; set data.layout=tokens if the samples are tokens")
