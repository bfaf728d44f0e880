"""A model as one flat vector, and layers as segments of it."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedlq_ray.errors import ConfigError

# Tensors start at multiples of this many elements, the unit in which a GPU's libraries load.
ALIGNMENT = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Layer:
    """A named segment of the flat vector: the trainable parameters that a module owns directly, or its statistics.

    `matrix`: one of the parameters has two dimensions or more, as weights have, and biases and normalisation have not.
    """

    name: str
    start: int
    stop: int
    buffer: bool = False
    matrix: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns, by name, the buffers that may be statistics: floating-point, not empty, and in the state_dict."""
    found = {}
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            kept = buffer is not None and name not in part._non_persistent_buffers_set
            if kept and buffer.is_floating_point() and buffer.numel():
                found[f"{path}.{name}" if path else name] = buffer
    return found


class _Constant(NamedTuple):
    """A buffer outside the flat vector, and its initial values."""

    owner: nn.Module
    name: str
    buffer: Tensor
    value: Tensor
    path: str

    def changed(self) -> bool:
        now = self.owner._buffers[self.name]
        same = (
            now is not None and now.shape == self.value.shape and torch.allclose(now, self.value, 0, 0, equal_nan=True)
        )
        return not same


def _storage_view(segment: Tensor, shape: torch.Size) -> Tensor:
    """Views a segment in a parameter's shape; convolutions use channels_last order, as their inputs do."""
    if len(shape) == 4:
        out, channels, height, width = shape
        return segment.view(out, height, width, channels).permute(0, 3, 1, 2)
    return segment.view(shape)


def require_trainable(module: nn.Module) -> None:
    """Raises ConfigError if the parameters cannot be views of one float32 storage."""
    named = list(module.named_parameters())
    trained = [(name, tensor) for name, tensor in named if tensor.requires_grad]
    if not trained:
        why = f"all {len(named)} parameters are frozen (requires_grad=False)" if named else "it has no parameters"
        raise ConfigError(f"model.name: there is nothing to train: {why}")
    for name, tensor in named:
        if tensor.device.type != "cpu" or tensor.requires_grad and tensor.dtype != torch.float32:
            raise ConfigError(f"model.name: parameter {name} is {tensor.dtype} on {tensor.device}, not float32 on cpu")
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in named if t.numel())
    for (_, end, name), (start, _, other) in itertools.pairwise(places):
        if start < end:
            raise ConfigError(
                f"model.name: parameters {name} and {other} share memory; to tie them, use one Parameter in both places"
            )


Owned = list[tuple[str, list[nn.Parameter]]]
Buffers = list[tuple[str, list[tuple[nn.Module, str, Tensor]]]]


def _by_layer(module: nn.Module, statistics: Collection[str]) -> tuple[Owned, Buffers]:
    """The trainable parameters, and the buffers in `statistics`, by the name of the submodule that has them."""
    owned: Owned = []
    buffers: Buffers = []
    seen: set[int] = set()
    for path, part in module.named_modules():
        parameters = [p for p in part._parameters.values() if p is not None and p.requires_grad and id(p) not in seen]
        seen.update(map(id, parameters))
        if parameters:
            owned.append((path or "(root)", parameters))
        mine = [
            (part, name, buffer)
            for name, buffer in part._buffers.items()
            if buffer is not None and (f"{path}.{name}" if path else name) in statistics
        ]
        for _, name, buffer in mine:
            if buffer.dtype != torch.float32:
                raise ConfigError(f"model.name: training changes buffer {name}, which is {buffer.dtype}, not float32")
        if mine:
            buffers.append((f"{path or '(root)'}.buffers", mine))
    return owned, buffers


class FlatModel:
    """A module whose trainable parameters, followed by its statistics, are views of one float32 storage.

    The flat vector (d,), which `load` takes and `read` returns, holds them contiguously. So does the storage on a CPU;
    on a GPU, each tensor starts at a multiple of 16 elements, as the libraries require. Frozen parameters and other
    buffers are not part of the vector: they belong to the code, which every client has.

    Attributes:
        module: the module; training it changes `storage`.
        storage: float32; trainable parameters first, then statistics; gaps hold zeros.
        grad: float32, as long as the parameters' part of `storage`; every trainable parameter's gradient is a view of
            it, so it is zeroed, never replaced.
        num_parameters: number of elements of the flat vector that are parameters; the rest are statistics.
        layers: the segments of the flat vector, in order.
    Args:
        module: a module with its parameters on the CPU; it is moved to `device`.
        device: "cpu" or "cuda", where the module and its storage are placed.
        statistics: names of the float buffers that training changes, such as batch-norm's; None: all float buffers
            in the state_dict. `load` resets all other buffers to their initial values, so that no state of one client
            reaches the next.
    Raises:
        ConfigError: a trainable parameter is not float32 on the CPU, two share memory, or there is none; a buffer in
            `statistics` is not float32.
    """

    def __init__(self, module: nn.Module, device: str = "cpu", statistics: Collection[str] | None = None) -> None:
        require_trainable(module)
        self.module = module
        self.statistics = frozenset(float_buffers(module) if statistics is None else statistics)
        owned, buffers = _by_layer(module, self.statistics)
        module.to(device)
        self.num_parameters = sum(p.numel() for _, ps in owned for p in ps)
        step = ALIGNMENT[device]
        sizes = [p.numel() for _, ps in owned for p in ps] + [b.numel() for _, bs in buffers for _, _, b in bs]
        ends = list(itertools.accumulate(-(-size // step) * step for size in sizes))
        places = iter(zip([0, *ends], sizes, strict=False))  # where each starts in the storage
        self.storage = torch.zeros(ends[-1], device=device)
        self.grad = torch.zeros(ends[sum(len(ps) for _, ps in owned) - 1], device=device)
        # Positions of the flat vector's elements in the storage; None if the two are identical.
        spots = [torch.arange(at, at + size) for at, size in zip([0, *ends], sizes, strict=False)]
        self._spots = None if sum(sizes) == ends[-1] else torch.cat(spots).to(device)
        layers, flat = [], 0
        self._owned: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # each parameter, its view and its gradient's
        for name, parameters in owned:
            start = flat
            for parameter in parameters:
                at, size = next(places)
                view = _storage_view(self.storage[at : at + size], parameter.shape)
                view.copy_(parameter.data)
                parameter.data = view
                parameter.grad = _storage_view(self.grad[at : at + size], parameter.shape)
                self._owned.append((parameter, view, parameter.grad))
                flat += size
            layers.append(Layer(name, start, flat, matrix=any(p.ndim > 1 for p in parameters)))
        self._views: list[tuple[nn.Module, str, Tensor]] = []
        for name, group in buffers:
            start = flat
            for part, buffer_name, value in group:
                at, size = next(places)
                view = self.storage[at : at + size].view(value.shape)
                view.copy_(value)
                part._buffers[buffer_name] = view
                self._views.append((part, buffer_name, view))
                flat += size
            layers.append(Layer(name, start, flat, buffer=True))
        self.layers, self._size = tuple(layers), flat
        viewed = {(id(part), name) for part, name, _ in self._views}
        self._constants = [
            _Constant(part, name, buffer, buffer.clone(), f"{path}.{name}" if path else name)
            for path, part in module.named_modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and (id(part), name) not in viewed
        ]

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def load(self, vector: Tensor) -> None:
        """Copy a flat vector (d,) float32 into the storage, from any device."""
        for part, name, view in self._views:
            part._buffers[name] = view
        for constant in self._constants:
            constant.owner._buffers[constant.name] = constant.buffer.copy_(constant.value)
        if vector.shape != (self._size,) or vector.dtype != torch.float32:
            raise ValueError(f"got a vector {tuple(vector.shape)} {vector.dtype}, expected {(self._size,)} float32")
        if self._spots is None:
            self.storage.copy_(vector)
        else:
            self.storage[self._spots] = vector.to(self.device)

    def read(self) -> Tensor:
        """Returns the flat vector (d,), a copy on the CPU."""
        for part, name, view in self._views:
            if part._buffers[name] is not view:  # a module may replace a buffer by another tensor
                part._buffers[name] = view.copy_(part._buffers[name])  # type: ignore[arg-type]  # a view is of a tensor, never None
        return self.flat(self.storage)

    def flat(self, values: Tensor) -> Tensor:
        """Removes the gaps from a tensor laid out as `storage` or `grad`; returns a copy on the CPU."""
        if self._spots is None:
            return values.detach().clone()
        spots = self._spots if len(values) == len(self.storage) else self._spots[: self.num_parameters]
        return values.detach()[spots].cpu()

    def parameters_of(self, vector: Tensor) -> dict[str, Tensor]:
        """Splits a flat vector (num_parameters,) into parameters by name; gradients pass through these views.

        For `torch.func.functional_call`; buffers and frozen parameters are still the module's own.
        """
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        pieces = vector.split([p.numel() for _, p in named])
        if self._spots is not None:
            pieces = tuple(piece.clone() for piece in pieces)  # clones are aligned as the libraries require
        return {name: _storage_view(piece, p.shape) for (name, p), piece in zip(named, pieces, strict=True)}

    def detached(self) -> list[str]:
        """Names of trainable parameters whose values or gradients are no longer in `storage` and `grad`."""
        views = {id(parameter): gradient for parameter, _, gradient in self._owned}
        first, last = self.storage.data_ptr(), self.storage.data_ptr() + self.storage.nbytes
        return [
            name
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
            and (parameter.grad is not views.get(id(parameter)) or not first <= parameter.data_ptr() < last)
        ]

    def attach(self) -> None:
        """Makes parameters and gradients views of `storage` and `grad` again, with the parameters' present values."""
        for parameter, view, gradient in self._owned:
            if (parameter.data_ptr(), parameter.stride()) != (view.data_ptr(), view.stride()):
                parameter.data = view.copy_(parameter.data)
            parameter.grad = gradient
            parameter.requires_grad_(True)

    def changed_constants(self) -> list[str]:
        """Names of float buffers of the state_dict that are not statistics but differ from their initial values."""
        kept = float_buffers(self.module)
        return [constant.path for constant in self._constants if constant.path in kept and constant.changed()]

    def state_dict(self, vector: Tensor | None = None) -> dict[str, Tensor]:
        """Returns an ordinary state_dict of contiguous copies, after loading `vector` (d,) if given."""
        if vector is not None:
            self.load(vector)
        state = self.module.state_dict()
        return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
