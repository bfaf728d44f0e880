"""Texts: windows, speakers, and the shipped plays."""

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlq_ray.data import load
from fedlq_ray.data.text import shakespeare, speeches, windows
from fedlq_ray.errors import ConfigError
from fedlq_ray.problems import Tokens

PLAY = "A:\nto be\nor not\n\nB:\nno: really\n\nA:\nyes\n"


@given(st.integers(2, 200), st.integers(1, 50))
def test_windows_predict_every_token_but_the_first_once(tokens, length):
    text = np.arange(tokens)
    x, y = windows(text, length)
    scored = y != -1
    assert x.shape == y.shape == (-(-(tokens - 1) // length), length)
    assert np.array_equal(y[scored], text[1:]) and np.array_equal(x[scored], text[:-1]) and (x[~scored] == 0).all()


def test_speeches_of_one_speaker_are_joined_and_colons_inside_are_text():
    assert speeches(PLAY) == {"A": ["to be\n", "or not\n", "yes\n"], "B": ["no: really\n"]}


def test_the_shipped_plays_are_the_text_they_say():
    found = shakespeare(None)
    names = np.unique(found["clients_train"])
    assert 290 <= len(names) <= 300 and found["x_train"].shape[1] == 80
    data = load("shakespeare", problem=Tokens())
    assert data.vocabulary == data.num_classes == 65
    letters = sorted(set(gzip.decompress(_file().read_bytes()).decode()))
    first = "".join(letters[t] for t in data.x_train[0])
    assert (
        first.startswith("Before we proceed any further, hear me speak.\n") and data.clients_train[0] == "First Citizen"
    )
    assert data.description.endswith("texts of 80 tokens, 65 different ones")


def _file():
    from fedlq_ray.data import text

    return text.Path(text.__file__).with_name("shakespeare.txt.gz")


def test_ones_own_text_and_faults(tmp_path):
    (tmp_path / "mine.txt").write_text(PLAY * 10)
    data = load("shakespeare", str(tmp_path / "mine.txt"), {"length": 5}, problem=Tokens())
    assert data.x_train.shape[1] == 5 and set(data.clients_test) == {"A", "B"}
    (tmp_path / "bad.txt").write_text("no speakers\n")
    for given_, message in (
        (["shakespeare", str(tmp_path / "bad.txt")], "has no speeches"),
        (["shakespeare", str(tmp_path / "none.txt")], "cannot be read as text"),
        (["shakespeare", None, {"length": 0}], "length must be 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(*given_, problem=Tokens())
