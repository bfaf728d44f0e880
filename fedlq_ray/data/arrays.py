"""Datasets as arrays: their layout, and the checks that all of them pass once."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedlq_ray.errors import ConfigError
from fedlq_ray.problems import Classification, Problem, Tokens
from fedlq_ray.problems.base import whole_numbers

Array = NDArray[Any]
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CLIENTS = ("clients_train", "clients_test")


@dataclass(frozen=True)
class Dataset:
    """The arrays of a learning problem.

    Attributes:
        x_train, x_test: images (n, height, width, channels), series (n, length, channels) or flat features (n, f),
            uint8 or float32; or tokens (n, length) int32.
        y_train, y_test: targets (n, ...), as the problem converts them: labels (n,) int64 for classification.
        num_classes: the size of a model's last dimension: classes, tokens, or numbers to predict.
        mean, std: float32, of the training set, per channel or feature; empty for tokens.
        clients_train, clients_test: whose sample each is, (n,) text; None if samples belong to nobody.
        vocabulary: the number of tokens; 0 if samples are not tokens.
    """

    name: str
    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    num_classes: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    clients_train: NDArray[np.str_] | None = None
    clients_test: NDArray[np.str_] | None = None
    vocabulary: int = 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a model's input without the batch: (channels, height, width), (channels, length) or (f,); (length,)
        for tokens."""
        *places, channels = self.x_train.shape[1:]
        return (channels, *places)

    @property
    def description(self) -> str:
        """One line that describes how the arrays were interpreted."""
        *places, channels = self.x_train.shape[1:]
        if self.vocabulary:
            kind = f"texts of {channels} tokens, {self.vocabulary} different ones"
        elif not places:
            kind = f"{channels} features"
        elif len(places) == 1:
            kind = f"series of {places[0]} steps, {channels} channel{'s' * (channels > 1)}"
        else:
            what = "grey images" if channels == 1 else "images"
            kind = f"{what} of {places[0]}x{places[1]}" + (f", {channels} channels" if channels > 1 else "")
        samples = f"{len(self.y_train)} training and {len(self.y_test)} test samples"
        if self.y_train.dtype.kind == "f":
            samples += f", {self.num_classes} number{'s' * (self.num_classes > 1)} each to predict"
        elif not self.vocabulary:
            samples += f" of {self.num_classes} classes"
        return f"{self.name}: {samples}; {kind}"

    def digest(self) -> str:
        """Returns 32 hex digits that change if any of the arrays changes."""
        whole = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            whole.update(f"{array.dtype} {array.shape}".encode())
            whole.update(np.ascontiguousarray(array).data)
        for ids in (self.clients_train, self.clients_test):
            if ids is not None:
                whole.update("\n".join(ids.tolist()).encode())
        return whole.hexdigest()[:32]


def inputs(x: Array, mean: NDArray[np.float32], std: NDArray[np.float32], device: torch.device | str = "cpu") -> Tensor:
    """Converts stored samples to a model's inputs: float32, normalised, channels first; tokens int64, as they are.

    Features are (n, f), series (n, channels, length), images (n, channels, height, width), channels_last in memory.
    """
    stored = torch.from_numpy(x if x.flags.writeable else x.copy()).to(device)
    if x.dtype == np.int32:
        return stored.long()
    rows = stored.reshape(len(x), math.prod(x.shape[1:])).float()
    # Per element, not per channel: a loop over whole rows is many times faster than one over three channels.
    by_element = [torch.from_numpy(np.broadcast_to(v, x.shape[1:]).reshape(-1).copy()).to(device) for v in (mean, std)]
    tensor = (rows - by_element[0]).div_(by_element[1]).view(stored.shape)
    if x.ndim == 3:
        return tensor.transpose(1, 2).contiguous()
    return tensor.permute(0, 3, 1, 2) if x.ndim == 4 else tensor


def make_dataset(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    *,
    name: str,
    source: str | None = None,
    layout: str = "auto",
    problem: Problem = Classification(),
    clients_train: Any = None,
    clients_test: Any = None,
) -> Dataset:
    """Checks and converts arrays; images (n, height, width) get a channel axis.

    Args:
        problem: what the samples are for; it checks the targets.
        clients_train, clients_test: whose sample each is, (n,); None if they belong to nobody.
        layout: layout of the samples (`data.layout`); "auto" derives it from their shape.
        source: where the arrays came from, for messages, such as `data.path: my.npz`; by default `name`.
    Raises:
        ConfigError: an array is wrong; the message names it.
    """
    where = source or name
    if isinstance(problem, Tokens) and layout == "auto":
        layout = "tokens"
    x = {key: _samples(where, key, value, layout) for key, value in (("x_train", x_train), ("x_test", x_test))}
    y = {
        key: problem.targets(f"{where}: {key}", _array(where, key, value))
        for key, value in (("y_train", y_train), ("y_test", y_test))
    }
    for part in ("train", "test"):
        if len(x[f"x_{part}"]) != len(y[f"y_{part}"]):
            raise ConfigError(f"{where}: {len(x[f'x_{part}'])} samples in x_{part}, {len(y[f'y_{part}'])} in y_{part}")
    if x["x_train"].shape[1:] != x["x_test"].shape[1:]:
        shapes = x["x_train"].shape[1:], x["x_test"].shape[1:]
        raise ConfigError(f"{where}: samples of x_train are {shapes[0]}, of x_test {shapes[1]}; they must be the same")
    outputs, vocabulary = problem.outputs(y["y_train"]), 0
    if layout == "tokens":
        vocabulary = max(int(x["x_train"].max()) + 1, outputs if isinstance(problem, Tokens) else 0)
        outputs = vocabulary if isinstance(problem, Tokens) else outputs
        _require_known(where, x["x_test"], vocabulary)
    _require_outputs(where, y["y_train"], y["y_test"], outputs)
    empty = np.zeros(0, np.float32)
    mean, std = (empty, empty) if vocabulary else _moments(x["x_train"])
    ids = [
        _ids(where, key, given, len(x[of]))
        for key, given, of in (("clients_train", clients_train, "x_train"), ("clients_test", clients_test, "x_test"))
    ]
    return Dataset(
        name, x["x_train"], y["y_train"], x["x_test"], y["y_test"], outputs, mean, std, ids[0], ids[1], vocabulary
    )


def _require_known(where: str, x_test: Array, vocabulary: int) -> None:
    """Requires that every token of the test samples is in the vocabulary, which the training samples have."""
    beyond = np.argwhere(x_test >= vocabulary)
    if len(beyond):
        place = tuple(beyond[0].tolist())
        raise ConfigError(
            f"{where}: x_test{list(place)} is token {x_test[place]}, but the largest of the training samples is "
            f"{vocabulary - 1}"
        )


def _require_outputs(where: str, y_train: Array, y_test: Array, outputs: int) -> None:
    """Requires that a model with these outputs can predict the targets of both sets, and has something to learn."""
    if y_train.shape[1:] != y_test.shape[1:]:
        raise ConfigError(
            f"{where}: targets of y_train are {y_train.shape[1:]}, of y_test {y_test.shape[1:]}; they must be the same"
        )
    if y_train.dtype.kind == "f":
        return
    if y_train.min() == y_train.max():
        raise ConfigError(f"{where}: y_train has only one class, {y_train.max()}; it must have two or more")
    beyond = np.argwhere(y_test >= outputs)
    if len(beyond):
        place = tuple(beyond[0].tolist())
        raise ConfigError(
            f"{where}: y_test{list(place)} is {y_test[place]}, but the largest label of y_train is {outputs - 1}"
        )


def _ids(where: str, key: str, given: Any, samples: int) -> NDArray[np.str_] | None:
    """Clients' ids as text, one per sample."""
    if given is None:
        return None
    ids = _array(where, key, given)
    if ids.shape != (samples,) or ids.dtype.kind not in "iuUSO":
        raise ConfigError(
            f"{where}: {key} must be one number or text per sample, {samples} in all, got {ids.dtype} of shape "
            f"{ids.shape}"
        )
    return ids.astype(str)


def _array(where: str, key: str, value: Any) -> Array:
    if np.ma.is_masked(value):
        raise ConfigError(f"{where}: {key} has masked values; fill them, or drop their rows")
    try:
        return np.asarray(value)
    except Exception as exc:  # lists of unequal lengths, tensors that need gradients or lie on a GPU
        raise ConfigError(f"{where}: {key} cannot be converted to a NumPy array ({exc})") from exc


def _layout(where: str, key: str, shape: tuple[int, ...]) -> str:
    """Derives the layout of samples from their shape.

    Raises:
        ConfigError: the shape is ambiguous.
    """
    if len(shape) == 2:
        return "features"
    sides = "x".join(map(str, shape[1:]))
    if len(shape) == 3:
        if shape[1] == shape[2]:
            return "images"
        raise ConfigError(
            f"{where}: {key} has shape {shape}: grey images of {sides} (data.layout=images), series of {shape[1]} "
            f"steps with {shape[2]} channels (series), or of {shape[2]} steps with {shape[1]} channels "
            "(channels_first)? Set data.layout"
        )
    first, middle, last = shape[1:]
    # Images mostly have fewer channels than rows or columns of pixels, and are mostly square.
    if first < min(middle, last) or first == last or middle == last or min(first, middle) == 1 and first < last:
        raise ConfigError(
            f"{where}: {key} has shape {shape}: images of {first}x{middle} with {last} channels (data.layout=images), "
            f"or of {middle}x{last} with {first} channels, as in PyTorch (channels_first)? Set data.layout"
        )
    return "images"


_DIMENSIONS = {
    "tokens": ((2,), "(n, length)"),
    "features": ((2, 3, 4, 5, 6), "(n, ...)"),
    "images": ((3, 4), "(n, height, width[, channels])"),
    "series": ((3,), "(n, length, channels)"),
    "channels_first": ((3, 4), "(n, channels, length) or (n, channels, height, width)"),
}


def _arranged(where: str, key: str, x: Array, layout: str) -> Array:
    """Arranges samples as in `Dataset`: features (n, f), series (n, length, channels), images with channels last."""
    if 0 in x.shape or layout == "auto" and x.ndim not in (2, 3, 4):
        raise ConfigError(
            f"{where}: {key} has shape {x.shape}; features are (n, f), series (n, length, channels), images (n, "
            "height, width[, channels])"
        )
    layout = _layout(where, key, x.shape) if layout == "auto" else layout
    dimensions, due = _DIMENSIONS[layout]
    if x.ndim not in dimensions:
        raise ConfigError(f"{where}: {key} has shape {x.shape}, but data.layout={layout} needs {due}")
    if layout == "features":
        return x.reshape(len(x), -1)
    if layout == "channels_first":
        return np.moveaxis(x, 1, -1)
    return x[..., None] if layout == "images" and x.ndim == 3 else x


def _samples(where: str, key: str, value: Any, layout: str) -> Array:
    x = _array(where, key, value)
    if x.dtype.kind not in "fui":
        raise ConfigError(f"{where}: {key} holds {x.dtype}, not numbers")
    x = _arranged(where, key, x, layout)
    if layout == "tokens":
        found = whole_numbers(x)
        if found is None or (found < 0).any() or (found >= 1_000_000).any():
            raise ConfigError(f"{where}: {key} must hold tokens, whole numbers from 0 to 999999, got {x.dtype}")
        return found.astype(np.int32)
    with np.errstate(over="ignore"):  # values beyond float32's range become infinite and are rejected below
        x = np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32)
    if x.dtype != np.uint8 and not np.isfinite(x).all():
        row = np.argwhere(~np.isfinite(x))[0][0]
        raise ConfigError(f"{where}: {key}[{row}] holds a NaN, an infinity or a value beyond float32's range")
    return x


def _moments(x: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    axes = tuple(range(x.ndim - 1))
    total, squares = np.zeros(x.shape[-1]), np.zeros(x.shape[-1])
    for start in range(0, len(x), 4096):  # a float64 copy of the whole array may not fit in memory
        chunk = x[start : start + 4096].astype(np.float64)
        total += chunk.sum(axis=axes)
        squares += (chunk**2).sum(axis=axes)
    n = x.size / x.shape[-1]
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0)).astype(np.float32)
    # The threshold is relative to the mean, so that features in small units count. Deviations below it are rounding.
    return mean.astype(np.float32), np.where(std > 1e-6 * abs(mean), std, 1).astype(np.float32)


GivenData = Dataset | Sequence[ArrayLike] | Mapping[str, ArrayLike]


def as_dataset(
    data: GivenData,
    name: str = "data",
    *,
    source: str | None = None,
    layout: str = "auto",
    problem: Problem = Classification(),
) -> Dataset:
    """Converts a Dataset, four arrays, or a mapping of them to a Dataset; the rest is as in `make_dataset`.

    A mapping may also have `clients_train` and `clients_test`.

    Raises:
        ConfigError: `data` is none of these, or its arrays are wrong.
    """
    if isinstance(data, Dataset):
        if layout != "auto":
            raise ConfigError(f"data.layout: {layout} is for arrays, but the data is a Dataset, which has a layout")
        return data
    ids: dict[str, Any] = {}
    if isinstance(data, Mapping):
        missing = [key for key in ARRAYS if key not in data]
        if missing:
            raise ConfigError(f"data.name: {name} returned no {', '.join(missing)}")
        ids = {key: data[key] for key in CLIENTS if key in data}
        data = tuple(data[key] for key in ARRAYS)
    if not isinstance(data, tuple | list) or len(data) != 4:
        raise ConfigError(
            f"data.name: {name} returned a {type(data).__name__}, not the four arrays {', '.join(ARRAYS)}"
        )
    return make_dataset(*data, name=name, source=source, layout=layout, problem=problem, **ids)
