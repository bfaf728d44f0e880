"""LEAF's folders and tables: the same shards as the ids say, and one sentence for what is wrong."""

import json

import numpy as np
import pandas as pd
import pytest

from fedlq_ray.data import load
from fedlq_ray.errors import ConfigError
from fedlq_ray.problems import Regression, Tokens

SIZES = {"ann": 12, "bob": 7, "cid": 30}


def leaf_folder(folder, sample, target):
    for part, share in (("train", 1), ("test", 2)):
        (folder / part).mkdir(parents=True)
        for number, users in enumerate((["ann", "bob"], ["cid"])):
            own = {u: range(SIZES[u] // share) for u in users}
            data = {u: {"x": [sample(u, i) for i in r], "y": [target(u, i) for i in r]} for u, r in own.items()}
            made = {"users": users, "num_samples": [len(r) for r in own.values()], "user_data": data}
            (folder / part / f"{number}.json").write_text(json.dumps(made))
    return str(folder)


def test_a_leaf_folder_of_images(tmp_path):
    path = leaf_folder(tmp_path, lambda u, i: [len(u) + i / 10] * 16, lambda u, i: i % 3)
    data = load("leaf", path, {"shape": [4, 4]})
    assert data.x_train.shape == (49, 4, 4, 1) and data.num_classes == 3
    assert {u: int((data.clients_train == u).sum()) for u in SIZES} == SIZES
    assert data.x_train[data.clients_train == "cid"][29, 0, 0, 0] == np.float32(5.9)
    with pytest.raises(ConfigError, match="samples are not of one shape .* data.args takes a shape"):
        load("leaf", path, {"shape": [3, 3]})


def test_a_leaf_folder_of_texts(tmp_path):
    path = leaf_folder(tmp_path, lambda u, i: (u * 9)[i % 3 : i % 3 + 20], lambda u, i: u[i % 3])
    data = load("leaf", path, problem=Tokens())
    assert data.x_train.shape == (49, 20) and data.y_train.shape == (49,) and data.vocabulary == len(set("annbobcid"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train/0.json").write_text("{"), "0.json: is not in LEAF's form"),
        (lambda f: (f / "train/0.json").write_text('{"users": []}'), "is not in LEAF's form .*user_data"),
        (lambda f: [file.unlink() for file in (f / "test").iterdir()], "test: no such folder, or it has no .json file"),
        (
            lambda f: (f / "train/0.json").write_text('{"user_data": {"u": {"x": [1, 2], "y": [1]}}}'),
            "user u has 2 samples in x, and 1 in y",
        ),
    ],
)
def test_a_damaged_leaf_folder_is_told_in_one_line(damage, message, tmp_path):
    path = leaf_folder(tmp_path, lambda u, i: [1.0, i], lambda u, i: i % 2)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message) as told:
        load("leaf", path)
    assert "\n" not in str(told.value)


def rows():
    rng = np.random.default_rng(0)
    return pd.DataFrame({"who": ["x", "y", "y", "z"] * 10, "a": rng.random(40), "b": range(40), "out": rng.random(40)})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_with_clients(kind, tmp_path):
    file = tmp_path / f"t.{kind}"
    rows().to_csv(file, index=False) if kind == "csv" else rows().to_parquet(file)
    data = load("table", str(file), {"target": "out", "client": "who", "test": 0.3}, problem=Regression())
    assert data.x_train.shape == (28, 2) and data.y_train.shape == (28, 1)
    assert {u: int((data.clients_test == u).sum()) for u in "xyz"} == {"x": 3, "y": 6, "z": 3}
    assert data.x_test[data.clients_test == "x"][:, 1].tolist() == [28, 32, 36]  # the last rows


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"target": "nothing"}, "has no column 'nothing'; it has who, a, b, out"),
        ({"target": "out"}, "column 'who' is not numeric"),
        ({"target": "out", "client": "who", "test": 1.5}, "test must be between 0 and 1"),
        ({"target": ["out", "a", "b"], "client": "who"}, "no features but"),
        ({}, "data.args: data.name=table needs the column to predict"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(args, message, tmp_path):
    rows().to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ConfigError, match=message):
        load("table", str(tmp_path / "t.csv"), args, problem=Regression())
