"""Readers of data that name their clients: LEAF's folders, tables, and folders of Hugging Face's `datasets`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import ConfigError, first_line


def leaf(path: str | None, shape: Sequence[int] | None = None) -> dict[str, Any]:
    """A folder in the form of LEAF (Caldas et al., arXiv:1812.01097): `train/` and `test/` with JSON files, each with
    `users` and `user_data`: {user: {x: [...], y: [...]}}.

    Samples are numbers, or texts of equal length, which become one token per character (`problem=tokens`).

    Args:
        shape: of a sample, such as [28, 28] for FEMNIST, whose samples are lists of 784 numbers.
    Raises:
        ConfigError: the folder or a file does not have this form.
    """
    if path is None:
        raise ConfigError("data.path: data.name=leaf needs a folder with train/ and test/")
    found = {part: _leaf_part(Path(path) / part) for part in ("train", "test")}
    texts = isinstance(found["train"][0][0], str)
    letters: dict[str, int] = {}
    if texts:
        whole = [text for x, y, _ in found.values() for text in (*x, *y)]
        if not all(isinstance(text, str) for text in whole):
            raise ConfigError(f"data.path: {path}: some samples are text and some are not")
        letters = {letter: token for token, letter in enumerate(sorted(set("".join(whole))))}
    arrays: dict[str, Any] = {}
    for part, (x, y, users) in found.items():
        try:
            if texts:
                arrays[f"x_{part}"] = np.array([[letters[c] for c in text] for text in x])
                arrays[f"y_{part}"] = np.array([[letters[c] for c in text] for text in y]).squeeze(1)
            else:
                samples = np.array(x, np.float32)
                arrays[f"x_{part}"] = samples if shape is None else samples.reshape(len(x), *shape)
                arrays[f"y_{part}"] = np.array(y)
        except (ValueError, TypeError) as exc:
            raise ConfigError(
                f"data.path: {Path(path) / part}: samples are not of one shape ({first_line(exc)}); data.args takes a "
                "shape"
            ) from exc
        arrays[f"clients_{part}"] = np.array(users)
    return arrays


def _leaf_part(folder: Path) -> tuple[list[Any], list[Any], list[str]]:
    """The samples, the targets, and whose sample each is, of all files of a folder."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ConfigError(f"data.path: {folder}: no such folder, or it has no .json file; LEAF has train/ and test/")
    x: list[Any] = []
    y: list[Any] = []
    users: list[str] = []
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))["user_data"]
            for user, own in data.items():
                if len(own["x"]) != len(own["y"]):
                    raise ConfigError(
                        f"data.path: {file}: user {user} has {len(own['x'])} samples in x, and {len(own['y'])} in y"
                    )
                x, y, users = x + own["x"], y + own["y"], users + [str(user)] * len(own["x"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
            told = f"{type(exc).__name__}: {first_line(exc)}"
            raise ConfigError(f"data.path: {file}: is not in LEAF's form ({told})") from exc
    if not x:
        raise ConfigError(f"data.path: {folder}: has no samples")
    return x, y, users


def table(
    path: str | None, target: str | Sequence[str] | None = None, client: str | None = None, test: float = 0.2
) -> dict[str, Any]:
    """A CSV or parquet file: numeric columns are features, but for the target's and the client's.

    Args:
        target: the column, or columns, to predict.
        client: the column that says whose sample a row is.
        test: the share of each client's rows, the last ones, to test on.
    Raises:
        ConfigError: the file cannot be read, lacks a column, or a feature is not a number.
    """
    import pandas as pd

    if path is None:
        raise ConfigError("data.path: data.name=table needs a CSV or parquet file")
    if target is None:
        raise ConfigError("data.args: data.name=table needs the column to predict, such as {target: price}")
    if not 0 < test < 1:
        raise ConfigError(f"data.args: test must be between 0 and 1, got {test}")
    try:
        rows = pd.read_parquet(path) if Path(path).suffix in (".parquet", ".pq") else pd.read_csv(path)
    except Exception as exc:  # pandas raises many kinds
        raise ConfigError(f"data.path: {path}: cannot be read as a table ({first_line(exc)})") from exc
    targets = [target] if isinstance(target, str) else list(target)
    wanted = [*targets, *([client] if client else [])]
    if missing := [name for name in wanted if name not in rows.columns]:
        raise ConfigError(f"data.args: {path} has no column {missing[0]!r}; it has {', '.join(map(str, rows.columns))}")
    features = rows.drop(columns=wanted)
    if words := [name for name, kind in features.dtypes.items() if kind.kind not in "iufb"]:
        raise ConfigError(f"data.path: {path}: column {words[0]!r} is not numeric; encode it, or drop it")
    if not len(features.columns) or not len(rows):
        raise ConfigError(f"data.path: {path}: has no rows, or no features but {', '.join(wanted)}")
    ids = rows[client].astype(str).to_numpy() if client else np.full(len(rows), "")
    held = _last(ids, test)
    x, y = features.to_numpy(np.float32), rows[targets if len(targets) > 1 else targets[0]].to_numpy()
    made: dict[str, Any] = {"x_train": x[~held], "y_train": y[~held], "x_test": x[held], "y_test": y[held]}
    return made | ({"clients_train": ids[~held], "clients_test": ids[held]} if client else {})


def hugging_face(
    path: str | None,
    target: str = "label",
    features: str | Sequence[str] | None = None,
    client: str | None = None,
    test: str | float | None = None,
) -> dict[str, Any]:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` of Hugging Face's `datasets` wrote.

    Args:
        target: the column to predict.
        features: the column of samples (images, or arrays of one shape), or several columns of numbers; None: all but
            the target's and the client's.
        client: the column that says whose sample a row is.
        test: the split to test on, or the share of each client's rows, the last ones. None: the split `test`, or a
            fifth if there is none. The split `train` is trained on.
    Raises:
        ConfigError: the library is missing, the folder cannot be read, or lacks a split or column.
    """
    try:
        import datasets
    except ImportError as exc:
        raise ConfigError(
            "data.name=hf needs the library datasets, which is not installed: pip install 'fedlq-ray[hf]'"
        ) from exc
    if path is None:
        raise ConfigError("data.path: data.name=hf needs a folder that save_to_disk wrote")
    try:
        found = datasets.load_from_disk(path)
    except Exception as exc:  # the library raises many kinds
        raise ConfigError(f"data.path: {path}: is not a folder that save_to_disk wrote ({first_line(exc)})") from exc
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    named = test if isinstance(test, str) else "test" if test is None and "test" in splits else None
    for split in ("train", *([named] if named else [])):
        if split not in splits:
            raise ConfigError(f"data.path: {path} has no split {split!r}; it has {', '.join(splits)}")
    columns = [features] if isinstance(features, str) else None if features is None else list(features)
    read = {
        part: _columns(splits[split].with_format("numpy"), path, target, columns, client)
        for part, split in (("train", "train"), *([("test", named)] if named else []))
    }
    if "test" not in read:
        share = 0.2 if test is None else test
        if isinstance(share, str) or not 0 < share < 1:
            raise ConfigError(f"data.args: test must be the name of a split or between 0 and 1, got {share!r}")
        x, y, ids = read["train"]
        held = _last(ids, share)
        read = {"train": (x[~held], y[~held], ids[~held]), "test": (x[held], y[held], ids[held])}
    made = {f"{name}_{part}": one for part, own in read.items() for name, one in zip("xy", own[:2], strict=True)}
    return made | ({f"clients_{part}": own[2] for part, own in read.items()} if client else {})


def _columns(
    rows: Any, path: str, target: str, features: list[str] | None, client: str | None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The samples, the targets, and whose sample each is, of a split in NumPy's format."""
    names = list(rows.column_names)
    chosen = [n for n in names if n not in (target, client)] if features is None else features
    for name in (target, *chosen, *([client] if client else [])):
        if name not in names:
            raise ConfigError(f"data.args: {path} has no column {name!r}; it has {', '.join(names)}")
    if not chosen or not len(rows):
        raise ConfigError(f"data.path: {path}: has no rows, or no features but {target}")
    read = [_array(rows, name, path) for name in chosen]
    if len(read) > 1 and any(one.ndim > 1 for one in read):
        raise ConfigError(
            f"data.args: {path}: several columns are features, and one holds arrays; name one of "
            f"{', '.join(chosen)} as features"
        )
    x = read[0] if len(read) == 1 else np.stack(read, 1)
    if client and any(one is None or one != one for one in rows[client]):
        raise ConfigError(f"data.path: {path}: column {client!r} has rows without a client")
    ids = np.array([str(one) for one in rows[client]]) if client else np.full(len(rows), "")
    return (x[:, None] if x.ndim == 1 else x), _array(rows, target, path), ids


def _array(rows: Any, name: str, path: str) -> NDArray[Any]:
    """A column of numbers, arrays or images, which all have one shape."""
    values = rows[name][:]
    try:
        found = np.stack([np.asarray(one) for one in values])
    except ValueError as exc:
        raise ConfigError(f"data.path: {path}: the rows of column {name!r} are not of one shape") from exc
    if found.dtype.kind not in "iufb":
        raise ConfigError(f"data.path: {path}: column {name!r} is not numeric; encode texts first, with Dataset.map")
    return found


def _last(ids: NDArray[Any], share: float) -> NDArray[np.bool_]:
    """Which rows (n,) are among the last `share` of their client's; at least one of two or more."""
    held = np.zeros(len(ids), bool)
    for one in np.unique(ids):
        rows = np.flatnonzero(ids == one)
        held[rows[len(rows) - max(int(share * len(rows)), int(len(rows) > 1)) :]] = len(rows) > 1
    return held
