"""torchvision's models and datasets, without its compiled operators if they cannot be loaded."""

import difflib
import pickle
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fedlq_ray.errors import ConfigError

_declared: list[torch.library.Library] = []  # kept alive, because a library's operators are removed along with it


def import_torchvision() -> ModuleType:
    """Imports and returns the module `torchvision`.

    A torchvision that was compiled for another build of PyTorch (such as the package index's CUDA build with a CPU-only
    PyTorch) fails to import because of its object-detection operators. Datasets and classifiers do not need them, so
    this function declares them and imports again.
    Raises:
        ConfigError: the second import fails too, or torchvision is not installed.
    """
    try:
        import torchvision
    except RuntimeError as exc:
        if "torchvision::" not in str(exc):
            raise ConfigError(f"torchvision cannot be imported: {exc}") from exc
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        try:
            import torchvision
        except (RuntimeError, ImportError) as again:
            raise ConfigError(f"torchvision does not fit this torch {torch.__version__}: {again}") from again
    except ImportError as exc:
        raise ConfigError(f"torchvision cannot be imported: {exc}") from exc
    module: ModuleType = torchvision
    return module


def build_torchvision(name: str, input_shape: tuple[int, ...], num_classes: int, args: dict[str, Any]) -> nn.Module:
    """Returns an untrained torchvision classifier; if possible, it is traced, so that clients need no torchvision.

    Raises:
        ConfigError: the model does not exist, or does not fit images of this shape.
    """
    if len(input_shape) != 3 or input_shape[0] != 3:
        raise ConfigError(f"model.name: torchvision's models take images with 3 channels; this data is {input_shape}")
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"model.name: torchvision has no classifier {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        module: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **args)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"model.name: torchvision:{name}: {exc}") from exc
    return traced(module, input_shape) or module


def traced(module: nn.Module, input_shape: tuple[int, ...]) -> nn.Module | None:
    """Returns the module as a graph that unpickles without torchvision, or None if the graph is not equivalent."""
    try:
        graph = torch.fx.symbolic_trace(module)
        data = pickle.dumps(graph)
    except Exception:  # tracing can fail in many ways, depending on the forward pass
        return None
    used = [getattr(node.target, "__module__", "") or "" for node in graph.graph.nodes]
    used += [type(part).__module__ for part in graph.modules()]
    if any(m.startswith("torchvision") for m in used) or b"torchvision.ops" in data:
        return None
    if graph.state_dict().keys() != module.state_dict().keys():
        return None
    x = torch.ones(2, *input_shape)
    try:
        with torch.no_grad():
            # Kernels may round differently if parameters have other addresses.
            same = torch.allclose(graph.eval()(x), module.eval()(x), rtol=1e-4, atol=1e-5)
    except Exception:  # the graph froze a training-mode branch or a size, or the input does not fit; later checks tell
        same = False
    module.train()  # the mode in which it was built
    return graph.train() if same else None
