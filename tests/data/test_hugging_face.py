"""Folders that Hugging Face's `datasets` wrote: the clients that the column says, and one sentence for mistakes."""

import numpy as np
import pytest

from fedlq_ray.config.load import load as config
from fedlq_ray.data import load
from fedlq_ray.errors import ConfigError
from fedlq_ray.federation.task import prepare
from fedlq_ray.problems import Regression, Tokens

datasets = pytest.importorskip("datasets")
RNG = np.random.default_rng(0)
USERS = ["ann"] * 30 + ["bob"] * 20 + ["cid"] * 3


def rows(count=53, **columns):
    return datasets.Dataset.from_dict({"label": [i % 3 for i in range(count)], "user": USERS[:count], **columns})


def saved(made, folder):
    made.save_to_disk(str(folder))
    return str(folder)


def test_images_of_clients_with_a_test_split(tmp_path):
    from PIL import Image

    def images(count):
        return [Image.fromarray(RNG.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(count)]

    kinds = datasets.Features(
        {"label": datasets.Value("int64"), "user": datasets.Value("string"), "image": datasets.Image()}
    )
    both = datasets.DatasetDict(train=rows(image=images(53)).cast(kinds), test=rows(9, image=images(9)).cast(kinds))
    path = saved(both, tmp_path / "made")
    data = load("hf", path, {"client": "user"})
    assert data.x_train.shape == (53, 8, 8, 1) and data.x_test.shape == (9, 8, 8, 1) and data.num_classes == 3
    settings = ["data.name=hf", f"data.path={path}", "data.args={client: user}", "data.partition=natural"]
    task = prepare(config(None, [*settings, "data.min_samples=8", "clients.cohort=2", "data.holdout=0"]))
    assert task.names == ("ann", "bob") and [len(shard) for shard in task.shards] == [30, 20]
    assert any("1 client" in note or "fewer" in note for note in task.notes)  # cid has too few


def test_columns_of_numbers_arrays_and_tokens(tmp_path):
    numbers = rows(a=RNG.random(53).tolist(), b=list(range(53)))
    path = saved(numbers, tmp_path / "numbers")
    data = load("hf", path, {"client": "user", "features": ["a", "b"], "target": "label"})
    assert data.x_train.shape[1:] == (2,) and len(data.x_test) == 6 + 4 + 1  # a fifth of each client's rows, the last
    one = load("hf", path, {"features": "a", "target": "b", "test": 0.5}, problem=Regression())
    assert one.x_train.shape[1:] == (1,)
    tokens = rows(x=RNG.integers(0, 9, (53, 7)).tolist(), y=RNG.integers(0, 9, (53, 7)).tolist())
    path = saved(tokens, tmp_path / "tokens")
    text = load("hf", path, {"features": "x", "target": "y"}, problem=Tokens())
    assert text.x_train.shape[1:] == (7,) and text.vocabulary == 9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"target": "labl"}, r"^data\.args: .* has no column 'labl'; it has label, user, x, word$"),
        ({"features": "word"}, r"^data\.path: .*: column 'word' is not numeric; encode texts first"),
        ({"features": ["label", "x"], "target": "user"}, r"^data\.args: .*several columns are features.*label, x"),
        ({"features": "x", "test": "validation"}, r"^data\.path: .* has no split 'validation'; it has train$"),
        ({"features": "x", "test": 2}, r"^data\.args: test must be the name of a split or between 0 and 1, got 2$"),
    ],
)
def test_what_is_wrong_gets_one_sentence(args, message, tmp_path):
    made = rows(x=RNG.random((53, 4)).tolist(), word=["a"] * 53)
    with pytest.raises(ConfigError, match=message):
        load("hf", saved(made, tmp_path / "made"), args)


def test_a_folder_of_another_kind_or_rows_of_unequal_length(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.path: .* is not a folder that save_to_disk wrote"):
        load("hf", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^data\.path: data\.name=hf needs a folder"):
        load("hf")
    nobody = datasets.Dataset.from_dict({"label": [0, 1, 2], "user": ["ann", None, "bob"], "x": [1.0, 2.0, 3.0]})
    with pytest.raises(ConfigError, match=r"column 'user' has rows without a client"):
        load("hf", saved(nobody, tmp_path / "nobody"), {"client": "user"})
    uneven = rows(x=[[1.0] * (1 + i % 2) for i in range(53)])
    with pytest.raises(ConfigError, match=r"the rows of column 'x' are not of one shape"):
        load("hf", saved(uneven, tmp_path / "uneven"), {"features": "x"})
