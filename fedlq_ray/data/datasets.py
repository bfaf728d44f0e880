"""Datasets by name or by import path."""

import gzip
import socket
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlq_ray.config import parts
from fedlq_ray.data.arrays import ARRAYS, CLIENTS, Array, Dataset, as_dataset
from fedlq_ray.data.readers import hugging_face, leaf, table
from fedlq_ray.data.text import shakespeare
from fedlq_ray.errors import ConfigError, first_line
from fedlq_ray.files import expand
from fedlq_ray.problems import Classification, Problem

CACHE = "~/.cache/fedlq"


def _shipped(name: str) -> Callable[[str | None], tuple[Any, ...]]:
    """A dataset that is a file of this package, made from scikit-learn, whose import takes 2 s, by
    `tests/data/test_datasets.py`.

    digits: handwritten digits (Alpaydin and Kaynak, UCI, CC BY 4.0), with a stratified fifth to test on.
    diabetes: ten measurements of 442 patients, and how far their disease went in a year (Efron et al., Annals of
    Statistics 32, 2004), with a random fifth to test on.
    """

    def read(path: str | None) -> tuple[Any, ...]:
        if path is not None:
            raise ConfigError(f"data.path: {name} is part of fedlq_ray and needs no path; data.name=npz reads a file")
        with np.load(Path(__file__).with_name(f"{name}.npz")) as file:
            return tuple(file[key] for key in ARRAYS)

    return read


def read_idx(file: Path) -> Array:
    """Reads the array in an IDX file (LeCun's MNIST format), gzipped or plain."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as exc:
        raise ConfigError(f"data.path: {file}: cannot be read, or is damaged ({exc})") from exc
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ConfigError(f"data.path: {file}: not an IDX file of bytes")
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).tolist())
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != np.prod(shape, dtype=object):
        raise ConfigError(f"data.path: {file}: holds {body.size} bytes, but its header claims {shape}")
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
    """Returns the folder for downloads, or an empty list if there is no home folder."""
    try:
        return [Path(CACHE).expanduser()]
    except RuntimeError:
        return []


def _mnist_like(name: str, torchvision_name: str) -> Callable[[str | None], Any]:
    def read(path: str | None) -> Any:
        usual = [
            Path("/usr/share/datasets") / name,  # Debian's package
            *(folder for cache in _cache() for folder in (cache / name, cache / torchvision_name / "raw")),
            Path("data") / torchvision_name / "raw",  # torchvision's own download, laid out as in the cache
        ]
        places = [Path(path)] if path else usual
        for folder in places:
            arrays = _idx_folder(folder)
            if arrays is not None:
                return arrays
        if path:
            raise ConfigError(f"data.path: {path}: holds no {name} (four files named *-ubyte or *-ubyte.gz)")
        return _downloaded(name, torchvision_name, places)

    return read


def _cifar(name: str, torchvision_name: str, inside: str) -> Callable[[str | None], Any]:
    def read(path: str | None) -> Any:
        if path and Path(path).suffix == ".npz":
            return _npz(path)
        places = [Path(path)] if path else [*_cache(), Path("data")]
        for folder in places:
            if (folder / inside).is_dir():
                try:
                    return _torchvision_arrays(torchvision_name, folder, download=False)
                except RuntimeError as exc:  # torchvision checks the files' md5
                    raise ConfigError(
                        f"data.path: {folder / inside}: incomplete or damaged; delete it or unpack it again"
                    ) from exc
        if path:
            raise ConfigError(f"data.path: {path}: neither an .npz nor a folder with {inside}")
        return _downloaded(name, torchvision_name, places)

    return read


def _downloaded(name: str, torchvision_name: str, places: list[Path]) -> Any:
    if not _cache():
        looked = ", ".join(map(str, places))
        raise ConfigError(
            f"data.name: {name} was not found in {looked}, and there is no home folder to download it to; set "
            "data.path to its location"
        )
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        return _torchvision_arrays(torchvision_name, _cache()[0], download=True)
    except Exception as exc:  # no network, no torchvision, a changed server
        raise ConfigError(
            f"data.name: {name} was not found in {', '.join(map(str, places))}, and the download failed "
            f"({type(exc).__name__}: {first_line(exc)}); set data.path to its location"
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
        raise ConfigError("data.path: data.name=npz needs the path of the file")
    try:
        # Opened here, because NumPy leaves a damaged file open.
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = [key for key in ARRAYS if key not in file]
            if missing:
                raise ConfigError(f"data.path: {path}: has no {', '.join(missing)}; it has {', '.join(file.files)}")
            return {key: file[key] for key in (*ARRAYS, *CLIENTS) if key in file}
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


DATASETS: dict[str, Callable[..., Any]] = {
    "digits": _shipped("digits"),
    "shakespeare": shakespeare,
    "diabetes": _shipped("diabetes"),
    "fashion-mnist": _mnist_like("fashion-mnist", "FashionMNIST"),
    "mnist": _mnist_like("mnist", "MNIST"),
    "cifar10": _cifar("cifar10", "CIFAR10", "cifar-10-batches-py"),
    "cifar100": _cifar("cifar100", "CIFAR100", "cifar-100-python"),
    "npz": _npz,
    "leaf": leaf,
    "table": table,
    "hf": hugging_face,
}


def load(
    name: str,
    path: str | None = None,
    args: Mapping[str, Any] | None = None,
    layout: str = "auto",
    problem: Problem = Classification(),
) -> Dataset:
    """Loads a dataset by name, or from a user's function by import path; the rest is as in `make_dataset`.

    Raises:
        ConfigError: the dataset cannot be loaded, or its arrays are wrong.
    """
    path = path and expand(path, "data.path")
    factory = parts.find("data.name", name, DATASETS)
    if path is not None and not (parts.takes(factory, "path") or parts.takes_all(factory)):
        raise ConfigError(f"data.path: {name} has no parameter path, so {path} would be ignored")
    data = parts.call("data.name", factory, {"path": path}, args or {})
    source = f"data.path: {path}" if path else f"data.name: {name}"
    return as_dataset(data, name, source=source, layout=layout, problem=problem)
