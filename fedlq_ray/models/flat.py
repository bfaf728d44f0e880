"""A model as one flat vector, and layers as segments of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlq_ray.errors import ConfigError


@dataclass(frozen=True)
class Layer:
    """A named segment of the flat vector: the parameters that one module owns directly, or its float buffers."""

    name: str
    start: int
    stop: int
    buffer: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start


def _storage_view(segment: Tensor, shape: torch.Size) -> Tensor:
    """A segment seen in a parameter's shape; convolutions lie in channels_last order, as their inputs do."""
    if len(shape) == 4:
        out, channels, height, width = shape
        return segment.view(out, height, width, channels).permute(0, 3, 1, 2)
    return segment.view(shape)


class FlatModel:
    """A module whose parameters, and then float buffers, are views of one float32 vector.

    Attributes:
        module: the module; training it changes `vector`.
        vector: (d,) float32; parameters first, `num_parameters` of them, then float buffers (batch-norm statistics).
        grad: (num_parameters,) float32; every parameter's gradient is a view of it, so it is zeroed, never replaced.
        trained: the (start, stop) runs of the vector that training may move: all parameters that are not frozen.
        layers: the segments, in order. Integer buffers are in none: they stay where they are.
    Args:
        module: with its parameters on the CPU, from where it goes to `device`.
        device: "cpu" or "cuda", where all of it then lives.
    Raises:
        ConfigError: a parameter is not float32 on the CPU, or there is none.
    """

    def __init__(self, module: nn.Module, device: str = "cpu") -> None:
        self.module = module
        owned: list[tuple[str, list[nn.Parameter]]] = []
        buffers: list[tuple[str, list[tuple[nn.Module, str, Tensor]]]] = []
        seen: set[int] = set()
        for path, part in module.named_modules():
            parameters = [p for p in part._parameters.values() if p is not None and id(p) not in seen]
            seen.update(map(id, parameters))
            if parameters:
                owned.append((path or "(root)", parameters))
            floats = [
                (part, n, b) for n, b in part._buffers.items() if b is not None and b.is_floating_point() and b.numel()
            ]
            if floats:
                buffers.append((f"{path or '(root)'}.buffers", floats))
        if not owned:
            raise ConfigError("model.name: the model has no parameters to train")
        for name, tensor in module.named_parameters():
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise ConfigError(
                    f"model.name: parameter {name} is {tensor.dtype} on {tensor.device}, not float32 on cpu"
                )
        module.to(device)
        self.num_parameters = sum(p.numel() for _, ps in owned for p in ps)
        total = self.num_parameters + sum(b.numel() for _, bs in buffers for _, _, b in bs)
        self.vector = torch.zeros(total, device=device)
        self.grad = torch.zeros(self.num_parameters, device=device)
        layers, at = [], 0
        trained: list[tuple[int, int]] = []
        for name, parameters in owned:
            start = at
            for parameter in parameters:
                view = _storage_view(self.vector[at : at + parameter.numel()], parameter.shape)
                view.copy_(parameter.data)
                parameter.data = view
                end = at + parameter.numel()
                if parameter.requires_grad:
                    parameter.grad = _storage_view(self.grad[at:end], parameter.shape)
                    joins = trained and trained[-1][1] == at
                    trained.append((trained.pop()[0] if joins else at, end))
                at = end
            layers.append(Layer(name, start, at))
        for name, group in buffers:
            start = at
            for part, buffer_name, value in group:
                view = self.vector[at : at + value.numel()].view(value.shape)
                view.copy_(value)
                part._buffers[buffer_name] = view
                at += value.numel()
            layers.append(Layer(name, start, at, buffer=True))
        self.layers, self.trained = tuple(layers), tuple(trained)

    @property
    def device(self) -> torch.device:
        return self.vector.device

    def load(self, vector: Tensor) -> None:
        """Copy a flat vector (d,) float32 in, from whatever device."""
        if vector.shape != self.vector.shape or vector.dtype != torch.float32:
            raise ValueError(f"a vector {tuple(vector.shape)} {vector.dtype}, where {tuple(self.vector.shape)} is due")
        self.vector.copy_(vector)

    def parameters_of(self, vector: Tensor) -> dict[str, Tensor]:
        """Another flat vector (num_parameters,) as parameters by name, views that gradients pass through.

        For `torch.func.functional_call`; buffers stay the module's own.
        """
        named = list(self.module.named_parameters())
        pieces = vector.split([p.numel() for _, p in named])
        return {name: _storage_view(piece, p.shape) for (name, p), piece in zip(named, pieces, strict=True)}

    def state_dict(self, vector: Tensor | None = None) -> dict[str, Tensor]:
        """An ordinary state_dict of contiguous copies, of `vector` (d,) where given."""
        if vector is not None:
            self.load(vector)
        state = self.module.state_dict()
        return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
