"""Datasets by name, by import path or as arrays; checked once, here."""

import functools
import gzip
import hashlib
import math
import socket
import zipfile
import zlib
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
from fedlq_ray.files import expand

Array = NDArray[Any]
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CACHE = "~/.cache/fedlq"


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

    def digest(self) -> str:
        """32 hex digits that change with any of the arrays."""
        whole = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            whole.update(f"{array.dtype} {array.shape}".encode())
            whole.update(np.ascontiguousarray(array).data)
        return whole.hexdigest()[:32]


def inputs(x: Array, mean: NDArray[np.float32], std: NDArray[np.float32], device: torch.device | str = "cpu") -> Tensor:
    """Stored samples as a model takes them: float32, normalised; images (n, channels, height, width), channels_last."""
    stored = torch.from_numpy(x if x.flags.writeable else x.copy()).to(device)
    rows = stored.reshape(len(x), math.prod(x.shape[1:])).float()
    # Of every element, not of every channel: a loop over whole rows is many times as fast as one over three channels.
    by_element = [torch.from_numpy(np.broadcast_to(v, x.shape[1:]).reshape(-1).copy()).to(device) for v in (mean, std)]
    tensor = (rows - by_element[0]).div_(by_element[1]).view(stored.shape)
    return tensor.permute(0, 3, 1, 2) if x.ndim == 4 else tensor


def make_dataset(
    x_train: Any, y_train: Any, x_test: Any, y_test: Any, *, name: str, source: str | None = None
) -> Dataset:
    """Check and convert arrays; images (n, height, width) get their channel.

    Args:
        source: where the arrays came from, for messages, such as `data.path: my.npz`; by default `name`.
    Raises:
        ConfigError: what is wrong with which array.
    """
    where = source or name
    x = {"x_train": _samples(where, "x_train", x_train), "x_test": _samples(where, "x_test", x_test)}
    y = {"y_train": _labels(where, "y_train", y_train), "y_test": _labels(where, "y_test", y_test)}
    for part in ("train", "test"):
        if len(x[f"x_{part}"]) != len(y[f"y_{part}"]):
            raise ConfigError(f"{where}: {len(x[f'x_{part}'])} samples in x_{part}, {len(y[f'y_{part}'])} in y_{part}")
    if x["x_train"].shape[1:] != x["x_test"].shape[1:]:
        shapes = x["x_train"].shape[1:], x["x_test"].shape[1:]
        raise ConfigError(f"{where}: samples of x_train are {shapes[0]}, of x_test {shapes[1]}; they must be alike")
    classes = int(y["y_train"].max()) + 1
    if y["y_train"].min() == classes - 1:
        raise ConfigError(f"{where}: y_train has one class only, {classes - 1}; there must be two or more")
    beyond = np.flatnonzero(y["y_test"] >= classes)
    if len(beyond):
        row = beyond[0]
        raise ConfigError(
            f"{where}: y_test[{row}] is {y['y_test'][row]}, but the labels of y_train end at {classes - 1}"
        )
    mean, std = _moments(x["x_train"])
    return Dataset(name, x["x_train"], y["y_train"], x["x_test"], y["y_test"], classes, mean, std)


def _array(where: str, key: str, value: Any) -> Array:
    try:
        return np.asarray(value)
    except Exception as exc:  # lists of unequal lengths, tensors that need gradients or lie on a GPU
        raise ConfigError(f"{where}: {key} cannot be made a NumPy array ({exc})") from exc


def _samples(where: str, key: str, value: Any) -> Array:
    x = _array(where, key, value)
    if x.dtype.kind not in "fui":
        raise ConfigError(f"{where}: {key} holds {x.dtype}, not numbers")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise ConfigError(
            f"{where}: {key} has shape {x.shape}; features are (n, f), images (n, height, width[, channels])"
        )
    # Square planes after an axis of 1 or 3: PyTorch's order, which would train on rows as if they were colours.
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[2] == x.shape[3] > 4:
        raise ConfigError(f"{where}: {key} has shape {x.shape}; channels go last: {key}.transpose(0, 2, 3, 1)")
    x = x[..., None] if x.ndim == 3 else x
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes an infinity, and is refused below
        x = np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32)
    if x.dtype != np.uint8 and not np.isfinite(x).all():
        row = np.argwhere(~np.isfinite(x))[0][0]
        raise ConfigError(f"{where}: {key}[{row}] holds a NaN, an infinity or what float32 cannot hold")
    return x


def _labels(where: str, key: str, value: Any) -> NDArray[np.int64]:
    y = _array(where, key, value)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "ui":
        raise ConfigError(f"{where}: {key} must be one whole number a sample, got {y.dtype} of shape {y.shape}")
    wrong = np.flatnonzero((y.astype(np.int64) < 0) | (y.astype(np.int64) >= 100_000))
    if len(wrong):
        raise ConfigError(f"{where}: {key}[{wrong[0]}] is {y[wrong[0]]}, out of range; labels are 0 to 99999")
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
    std = np.sqrt(np.maximum(squares / n - mean**2, 0)).astype(np.float32)
    # Relative to the mean, so that features in small units count; what is below is a constant's rounding.
    return mean.astype(np.float32), np.where(std > 1e-6 * abs(mean), std, 1).astype(np.float32)


def _digits(path: str | None) -> tuple[Any, ...]:
    if path is not None:
        raise ConfigError(f"data.path: digits comes with scikit-learn, not from {path}; data.name=npz reads a file")
    return _digits_split()


@functools.cache
def _digits_split() -> tuple[Any, ...]:
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
    except (OSError, EOFError, zlib.error) as exc:
        raise ConfigError(f"data.path: {file}: cannot be read, or is damaged ({exc})") from exc
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


def _cache() -> list[Path]:
    """Where downloads are kept, or nothing where there is no home folder."""
    try:
        return [Path(CACHE).expanduser()]
    except RuntimeError:
        return []


def _mnist_like(name: str, torchvision_name: str) -> Callable[[str | None], Any]:
    def read(path: str | None) -> Any:
        usual = [
            Path("/usr/share/datasets") / name,  # Debian's package
            *(folder for cache in _cache() for folder in (cache / name, cache / torchvision_name / "raw")),
            Path("data") / torchvision_name / "raw",  # torchvision's own download, as in the cache
        ]
        places = [Path(path)] if path else usual
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
    places = [Path(path)] if path else [*_cache(), Path("data")]
    for folder in places:
        if (folder / "cifar-10-batches-py").is_dir():
            try:
                return _torchvision_arrays("CIFAR10", folder, download=False)
            except RuntimeError as exc:  # torchvision checks the files' md5
                raise ConfigError(
                    f"data.path: {folder / 'cifar-10-batches-py'}: is incomplete or damaged; delete it, or unpack anew"
                ) from exc
    if path:
        raise ConfigError(f"data.path: {path}: is neither an .npz nor a folder with cifar-10-batches-py")
    return _downloaded("cifar10", "CIFAR10", places)


def _downloaded(name: str, torchvision_name: str, places: list[Path]) -> Any:
    if not _cache():
        looked = ", ".join(map(str, places))
        raise ConfigError(
            f"data.name: {name} was not found in {looked}, and there is no home folder to download it to; give its "
            "place as data.path"
        )
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        return _torchvision_arrays(torchvision_name, _cache()[0], download=True)
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
    except (
        OSError,
        ValueError,
        EOFError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        TypeError,
    ) as exc:
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
    path = path and expand(path, "data.path")
    factory = parts.find("data.name", name, DATASETS)
    data = parts.call("data.name", factory, {"path": path}, args or {})
    return as_dataset(data, name, source=f"data.path: {path}" if path else f"data.name: {name}")


def as_dataset(data: Any, name: str = "data", *, source: str | None = None) -> Dataset:
    """A Dataset of a Dataset, of four arrays, or of a mapping of them; `source` is for messages.

    Raises:
        ConfigError: it is none of these, or its arrays are wrong.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, Mapping):
        missing = [key for key in ARRAYS if key not in data]
        if missing:
            raise ConfigError(f"data.name: {name} gave no {', '.join(missing)}")
        data = tuple(data[key] for key in ARRAYS)
    if not isinstance(data, tuple | list) or len(data) != 4:
        raise ConfigError(f"data.name: {name} gave a {type(data).__name__}, not the four arrays {', '.join(ARRAYS)}")
    return make_dataset(*data, name=name, source=source)
