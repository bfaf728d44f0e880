"""Costs of training, floating-point operations and memory, measured once per model."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter

from fedlq_ray.errors import ConfigError

Shape = Sequence[int]


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


def _rnn_flops(inputs: Shape, input_weight: Shape, state_weight: Shape, *_: Any, **__: Any) -> int:
    """A recurrent layer of oneDNN, which PyTorch's counter does not know; inputs are (length, batch, features)."""
    return 2 * math.prod(inputs[:2]) * (math.prod(input_weight) + math.prod(state_weight))


def _rnn_backward_flops(*arguments: Any, **_: Any) -> int:
    return 2 * _rnn_flops(*arguments)


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """The two products of attention on a CPU; queries are (batch, heads, length, width). A mask saves nothing."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward_flops(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Without the products that the implementation computes again."""
    return 2 * _attention_flops(query, key, value)


def _convolution_backward_flops(
    gradient: Shape, inputs: Shape, weight: Shape, *arguments: Any, out_shape: Any = None
) -> int:
    """PyTorch's own formula multiplies the weights' gradient by the number of groups."""
    transposed, mask = arguments[4], arguments[7]
    batch, _, *places = inputs if transposed else gradient
    gradients: int = sum(mask[:2])
    return 2 * batch * math.prod(places) * math.prod(weight) * gradients


_OWN = {
    name: formula
    for name, formula in (
        (getattr(torch.ops.aten, "mkldnn_rnn_layer", None), _rnn_flops),
        (getattr(torch.ops.aten, "mkldnn_rnn_layer_backward", None), _rnn_backward_flops),
        (getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None), _attention_flops),
        (
            getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None),
            _attention_backward_flops,
        ),
        (torch.ops.aten.convolution_backward, _convolution_backward_flops),
    )
    if name is not None
}


def training_flops(module: nn.Module, input_shape: tuple[int, ...], vocabulary: int = 0) -> float:
    """Returns the FLOPs of one sample's forward and backward pass; a multiplication and its addition count as two.

    PyTorch's own counter (matrix products, attention and convolutions), with recurrent layers added, counts them for a
    batch of two on a copy of the module.

    Raises:
        ConfigError: the model cannot take a training step (for example, its output is not a single tensor).
    """
    twin = copy.deepcopy(module).train()
    try:
        _without_compiler()
        with flop_counter.FlopCounterMode(display=False, custom_mapping=_OWN) as counter:
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
