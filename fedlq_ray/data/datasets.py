"""Datasets by name, by import path or as arrays; checked once, here."""

import gzip
import socket
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlq_ray import parts
from fedlq_ray.errors import ConfigError

Array = NDArray[Any]
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CACHE = Path("~/.cache/fedlq")


@dataclass(frozen=True)
class Dataset:
    """Arrays of a classification task.

    Attributes:
        x_train, x_test: images (n, height, width, channels) or flat features (n, f); uint8 or float32.
        y_train, y_test: labels (n,) int64, from 0.
        mean, std: float32, of the training set, a channel or a feature.
    """

    name: str
    x_train: Array
    y_train: NDArray[np.int64]
    x_test: Array
    y_test: NDArray[np.int64]
    num_classes: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """What a model takes, without the batch: (channels, height, width) or (f,)."""
        shape = self.x_train.shape[1:]
        return (shape[2], shape[0], shape[1]) if len(shape) == 3 else shape


def inputs(x: Array, mean: NDArray[np.float32], std: NDArray[np.float32]) -> Tensor:
    """Stored samples as a model takes them: float32, normalised; images (n, channels, height, width), channels_last."""
    tensor = torch.from_numpy((x.astype(np.float32) - mean) / std)
    return tensor.permute(0, 3, 1, 2) if x.ndim == 4 else tensor


def make_dataset(x_train: Any, y_train: Any, x_test: Any, y_test: Any, *, name: str) -> Dataset:
    """Check and convert arrays; images (n, height, width) get their channel.

    Raises:
        ConfigError: what is wrong with which array.
    """
    x = {"x_train": _samples(name, "x_train", x_train), "x_test": _samples(name, "x_test", x_test)}
    y = {"y_train": _labels(name, "y_train", y_train), "y_test": _labels(name, "y_test", y_test)}
    for part in ("train", "test"):
        if len(x[f"x_{part}"]) != len(y[f"y_{part}"]):
            raise ConfigError(f"{name}: {len(x[f'x_{part}'])} samples in x_{part}, {len(y[f'y_{part}'])} in y_{part}")
    if x["x_train"].shape[1:] != x["x_test"].shape[1:]:
        raise ConfigError(f"{name}: samples of x_train are {x['x_train'].shape[1:]}, of x_test {x['x_test'].shape[1:]}")
    classes = int(y["y_train"].max()) + 1
    if classes < 2:
        raise ConfigError(f"{name}: y_train has one class only")
    beyond = np.flatnonzero(y["y_test"] >= classes)
    if len(beyond):
        row = beyond[0]
        raise ConfigError(
            f"{name}: y_test[{row}] is {y['y_test'][row]}, but the labels of y_train end at {classes - 1}"
        )
    mean, std = _moments(x["x_train"])
    return Dataset(name, x["x_train"], y["y_train"], x["x_test"], y["y_test"], classes, mean, std)


def _samples(name: str, key: str, value: Any) -> Array:
    x = np.asarray(value)
    if x.dtype.kind not in "fui":
        raise ConfigError(f"{name}: {key} holds {x.dtype}, not numbers")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise ConfigError(
            f"{name}: {key} has shape {x.shape}; features are (n, f), images (n, height, width[, channels])"
        )
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        row = np.argwhere(~np.isfinite(x))[0][0]
        raise ConfigError(f"{name}: {key}[{row}] holds a NaN or an infinity")
    x = x[..., None] if x.ndim == 3 else x
    return np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32)


def _labels(name: str, key: str, value: Any) -> NDArray[np.int64]:
    y = np.asarray(value)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "ui":
        raise ConfigError(f"{name}: {key} must be one whole number a sample, got {y.dtype} of shape {y.shape}")
    wrong = np.flatnonzero((y.astype(np.int64) < 0) | (y.astype(np.int64) >= 100_000))
    if len(wrong):
        raise ConfigError(f"{name}: {key}[{wrong[0]}] is {y[wrong[0]]}, out of range; labels count from 0")
    return y.astype(np.int64)


def _moments(x: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    axes = tuple(range(x.ndim - 1))
    total, squares = np.zeros(x.shape[-1]), np.zeros(x.shape[-1])
    for start in range(0, len(x), 4096):  # a float64 copy of all of it may not fit
        chunk = x[start : start + 4096].astype(np.float64)
        total += chunk.sum(axis=axes)
        squares += (chunk**2).sum(axis=axes)
    n = x.size / x.shape[-1]
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return mean.astype(np.float32), np.where(std > 1e-6 * np.maximum(1, abs(mean)), std, 1).astype(np.float32)


def _digits(path: str | None) -> tuple[Any, ...]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x, y = digits.images.astype(np.uint8), digits.target
    # The split is a property of the data set: no seed of a configuration moves it.
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    return x_train, y_train, x_test, y_test


def read_idx(file: Path) -> Array:
    """An array of an IDX file (LeCun's MNIST format), gzipped or plain."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as exc:
        raise ConfigError(f"data.path: {file}: {exc}") from exc
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ConfigError(f"data.path: {file}: is not an IDX file of bytes")
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).tolist())
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != np.prod(shape, dtype=object):
        raise ConfigError(f"data.path: {file}: holds {body.size} bytes where its header claims {shape}")
    return body.reshape(shape)


def _idx_folder(folder: Path) -> tuple[Any, ...] | None:
    found = []
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        files = [folder / f"{stem}-ubyte{suffix}" for suffix in (".gz", "")]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            return None
        found.append(read_idx(file))
    return tuple(found)


def _mnist_like(name: str, torchvision_name: str) -> Callable[[str | None], Any]:
    def read(path: str | None) -> Any:
        usual = (f"/usr/share/datasets/{name}", CACHE / torchvision_name / "raw", f"data/{torchvision_name}/raw")
        places = [Path(path)] if path else [Path(p).expanduser() for p in usual]
        for folder in places:
            arrays = _idx_folder(folder)
            if arrays is not None:
                return arrays
        if path:
            raise ConfigError(f"data.path: {path}: holds no {name} (the four files *-ubyte or *-ubyte.gz)")
        return _downloaded(name, torchvision_name, places)

    return read


def _cifar10(path: str | None) -> Any:
    if path and Path(path).suffix == ".npz":
        return _npz(path)
    places = [Path(path)] if path else [CACHE.expanduser(), Path("data")]
    for folder in places:
        if (folder / "cifar-10-batches-py").is_dir():
            return _torchvision_arrays("CIFAR10", folder, download=False)
    if path:
        raise ConfigError(f"data.path: {path}: is neither an .npz nor a folder with cifar-10-batches-py")
    return _downloaded("cifar10", "CIFAR10", places)


def _downloaded(name: str, torchvision_name: str, places: list[Path]) -> Any:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        return _torchvision_arrays(torchvision_name, CACHE.expanduser(), download=True)
    except Exception as exc:  # no network, no torchvision, a changed server
        raise ConfigError(
            f"data.name: {name} was not found in {', '.join(map(str, places))}, and the download failed "
            f"({type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}); give its place as data.path"
            + (", or install Debian's dataset-fashion-mnist" if name == "fashion-mnist" else "")
        ) from exc
    finally:
        socket.setdefaulttimeout(timeout)


def _torchvision_arrays(name: str, root: Path, *, download: bool) -> tuple[Any, ...]:
    from fedlq_ray.models.torchvision_bridge import import_torchvision

    import_torchvision()
    from torchvision import datasets

    arrays: list[Any] = []
    for train in (True, False):
        part = getattr(datasets, name)(str(root), train=train, download=download)
        arrays += [np.asarray(part.data), np.asarray(part.targets)]
    return tuple(arrays)


def _npz(path: str | None) -> dict[str, Any]:
    if path is None:
        raise ConfigError("data.path: data.name=npz needs the file's path")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ARRAYS if key not in file]
            if missing:
                raise ConfigError(f"data.path: {path}: has no {', '.join(missing)}; it has {', '.join(file.files)}")
            return {key: file[key] for key in ARRAYS}
    except FileNotFoundError as exc:
        raise ConfigError(f"data.path: {path}: no such file") from exc
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as exc:
        raise ConfigError(f"data.path: {path}: cannot be read as an .npz of plain arrays ({exc})") from exc


DATASETS: dict[str, Callable[[str | None], Any]] = {
    "digits": _digits,
    "fashion-mnist": _mnist_like("fashion-mnist", "FashionMNIST"),
    "mnist": _mnist_like("mnist", "MNIST"),
    "cifar10": _cifar10,
    "npz": _npz,
}


def load(name: str, path: str | None = None, args: Mapping[str, Any] | None = None) -> Dataset:
    """A dataset by name, or from a user's function by import path.

    Raises:
        ConfigError: it cannot be had, or its arrays are wrong.
    """
    factory = parts.find("data.name", name, DATASETS)
    return as_dataset(parts.call("data.name", factory, {"path": path}, args or {}), name)


def as_dataset(data: Any, name: str = "data") -> Dataset:
    """A Dataset of a Dataset, of four arrays, or of a mapping of them."""
    if isinstance(data, Dataset):
        return data
    if isinstance(data, Mapping):
        missing = [key for key in ARRAYS if key not in data]
        if missing:
            raise ConfigError(f"data.name: {name} gave no {', '.join(missing)}")
        data = tuple(data[key] for key in ARRAYS)
    if not isinstance(data, tuple | list) or len(data) != 4:
        raise ConfigError(f"data.name: {name} gave a {type(data).__name__}, not the four arrays {', '.join(ARRAYS)}")
    return make_dataset(*data, name=name)
