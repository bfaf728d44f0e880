"""A model as one flat vector, and layers as segments of it."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlq_ray.errors import ConfigError

# Elements at a multiple of which a tensor begins: by what a GPU's libraries load at a time.
ALIGNMENT = {"cpu": 1, "cuda": 16}


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
    """A module whose parameters, and then float buffers, are views of one float32 storage.

    The flat vector (d,), which `load` takes and `read` gives, has them one after another without gaps. So has the
    storage on a CPU; on a GPU each begins at a multiple of 16 elements, as libraries there ask.

    Attributes:
        module: the module; training it changes `storage`.
        storage: float32; parameters first, then float buffers (batch-norm statistics); gaps hold zeros.
        grad: float32, as long as the parameters' part of `storage`; every parameter's gradient is a view of it, so it
            is zeroed, never replaced.
        trained: the (start, stop) runs of `storage` that training may move: all parameters that are not frozen.
        num_parameters: how many elements of the flat vector are parameters; the rest are buffers.
        layers: the segments of the flat vector, in order. Integer buffers are in none: `load` gives them the
            values that they had at first, so that nothing of one client comes to the next.
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
        step = ALIGNMENT[device]
        sizes = [p.numel() for _, ps in owned for p in ps] + [b.numel() for _, bs in buffers for _, _, b in bs]
        ends = list(itertools.accumulate(-(-size // step) * step for size in sizes))
        places = iter(zip([0, *ends], sizes, strict=False))  # where each begins in the storage
        self.storage = torch.zeros(ends[-1], device=device)
        self.grad = torch.zeros(ends[sum(len(ps) for _, ps in owned) - 1], device=device)
        # The flat vector's elements in the storage; None where it is the storage.
        spots = [torch.arange(at, at + size) for at, size in zip([0, *ends], sizes, strict=False)]
        self._spots = None if sum(sizes) == ends[-1] else torch.cat(spots).to(device)
        layers, flat = [], 0
        trained: list[tuple[int, int]] = []
        for name, parameters in owned:
            start = flat
            for parameter in parameters:
                at, size = next(places)
                view = _storage_view(self.storage[at : at + size], parameter.shape)
                view.copy_(parameter.data)
                parameter.data = view
                if parameter.requires_grad:
                    parameter.grad = _storage_view(self.grad[at : at + size], parameter.shape)
                    joins = trained and trained[-1][1] == at
                    trained.append((trained.pop()[0] if joins else at, at + -(-size // step) * step))
                flat += size
            layers.append(Layer(name, start, flat))
        for name, group in buffers:
            start = flat
            for part, buffer_name, value in group:
                at, size = next(places)
                view = self.storage[at : at + size].view(value.shape)
                view.copy_(value)
                part._buffers[buffer_name] = view
                flat += size
            layers.append(Layer(name, start, flat, buffer=True))
        self.layers, self.trained, self._size = tuple(layers), tuple(trained), flat
        whole = [(p, n, b) for p in module.modules() for n, b in p._buffers.items() if b is not None]
        self._views = [(p, n, b) for p, n, b in whole if b.is_floating_point() and b.numel()]
        self._counters = [(p, n, b, b.clone()) for p, n, b in whole if not b.is_floating_point()]

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def load(self, vector: Tensor) -> None:
        """Copy a flat vector (d,) float32 in, from whatever device."""
        for part, name, view in self._views:
            part._buffers[name] = view
        for part, name, counter, value in self._counters:
            part._buffers[name] = counter.copy_(value)
        if vector.shape != (self._size,) or vector.dtype != torch.float32:
            raise ValueError(f"a vector {tuple(vector.shape)} {vector.dtype}, where {(self._size,)} is due")
        if self._spots is None:
            self.storage.copy_(vector)
        else:
            self.storage[self._spots] = vector.to(self.device)

    def read(self) -> Tensor:
        """The flat vector (d,), a copy on the CPU."""
        for part, name, view in self._views:
            if part._buffers[name] is not view:  # a module may put another tensor in a buffer's place
                part._buffers[name] = view.copy_(part._buffers[name])  # type: ignore[arg-type]
        return self.flat(self.storage)

    def flat(self, values: Tensor) -> Tensor:
        """Without gaps what has the layout of `storage` or `grad`: a copy on the CPU."""
        if self._spots is None:
            return values.detach().clone()
        spots = self._spots if len(values) == len(self.storage) else self._spots[: self.num_parameters]
        return values.detach()[spots].cpu()

    def parameters_of(self, vector: Tensor) -> dict[str, Tensor]:
        """Another flat vector (num_parameters,) as parameters by name, views that gradients pass through.

        For `torch.func.functional_call`; buffers stay the module's own.
        """
        named = list(self.module.named_parameters())
        pieces = vector.split([p.numel() for _, p in named])
        if self._spots is not None:
            pieces = tuple(piece.clone() for piece in pieces)  # which lies as libraries ask
        return {name: _storage_view(piece, p.shape) for (name, p), piece in zip(named, pieces, strict=True)}

    def state_dict(self, vector: Tensor | None = None) -> dict[str, Tensor]:
        """An ordinary state_dict of contiguous copies, of `vector` (d,) where given."""
        if vector is not None:
            self.load(vector)
        state = self.module.state_dict()
        return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
