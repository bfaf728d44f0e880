import gzip

import numpy as np
import pytest

from fedlq_ray.data import as_dataset, inputs, load
from fedlq_ray.errors import ConfigError


def arrays(**changes):
    rng = np.random.default_rng(0)
    base = {
        "x_train": rng.random((40, 3), np.float32),
        "y_train": np.arange(40) % 4,
        "x_test": rng.random((8, 3), np.float32),
        "y_test": np.arange(8) % 4,
    }
    return {**base, **changes}


def test_digits_keep_a_stratified_fifth_for_testing():
    data = load("digits")
    assert data.input_shape == (1, 8, 8) and len(data.y_test) == 360 and len(data.y_train) == 1437
    assert np.bincount(data.y_test).min() >= 34
    assert np.array_equal(data.x_test, load("digits").x_test)


def test_inputs_are_normalised_and_channels_last():
    data = as_dataset(arrays(x_train=np.full((40, 5, 6, 2), 7, np.uint8), x_test=np.zeros((8, 5, 6, 2), np.uint8)))
    x = inputs(data.x_test, data.mean, data.std)
    assert data.input_shape == (2, 5, 6) == x.shape[1:]
    assert x.permute(0, 2, 3, 1).is_contiguous()
    assert (x == -7).all()  # a constant channel has mean 7 and is divided by 1
    flat = as_dataset(arrays())
    z = inputs(flat.x_train, flat.mean, flat.std)
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0, unbiased=False) - 1).abs().max() < 1e-5


BAD = np.ones((8, 3), np.float32)
BAD[5, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": BAD}, r"x_test\[5\] holds a NaN"),
        ({"y_test": np.full(8, 9)}, r"y_test\[0\] is 9.*end at 3"),
        ({"y_train": np.full(40, -1)}, r"y_train\[0\] is -1.*out of range"),
        ({"y_train": np.zeros(40)}, "y_train must be one whole number"),
        ({"y_train": np.zeros(39, int)}, "40 samples in x_train, 39 in y_train"),
        ({"x_test": np.ones((8, 4))}, r"\(3,\), of x_test \(4,\)"),
        ({"x_train": np.array([["a"] * 3] * 40)}, "not numbers"),
    ],
)
def test_wrong_arrays_are_named(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        as_dataset(arrays(**changes))
    np.savez(tmp_path / "d.npz", **arrays(**changes))
    with pytest.raises(ConfigError, match=message):
        load("npz", str(tmp_path / "d.npz"))


def test_npz_faults_name_the_file_and_what_is_missing(tmp_path):
    file = tmp_path / "d.npz"
    with pytest.raises(ConfigError, match="no such file"):
        load("npz", str(file))
    np.savez(file, x_train=1, y_train=1, x_test=1)
    with pytest.raises(ConfigError, match=r"d\.npz: has no y_test; it has x_train"):
        load("npz", str(file))
    np.savez(file, **arrays(y_test=np.array([{}] * 8, object)))
    with pytest.raises(ConfigError, match="cannot be read"):
        load("npz", str(file))
    file.write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="cannot be read"):
        load("npz", str(file))


def write_idx(folder, name, array):
    head = b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))


def test_idx_files_are_read_and_a_truncated_one_is_refused(tmp_path):
    x, y = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28), np.array([0, 1, 2, 1], np.uint8)
    for stem in ("train", "t10k"):
        write_idx(tmp_path, f"{stem}-images-idx3", x)
        write_idx(tmp_path, f"{stem}-labels-idx1", y)
    data = load("mnist", str(tmp_path))
    assert np.array_equal(data.x_train[..., 0], x) and np.array_equal(data.y_test, y) and data.num_classes == 3
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    with pytest.raises(ConfigError, match=r"t10k-images.*header claims"):
        load("mnist", str(tmp_path))
    with pytest.raises(ConfigError, match="holds no mnist"):
        load("mnist", str(tmp_path / "nowhere"))


def test_an_own_function_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_data_module.py").write_text(
        "import numpy as np\ndef make(n=20):\n x = np.arange(n * 2.0).reshape(n, 2)\n y = np.arange(n) % 2\n"
        " return x, y, x, y\ndef wrong():\n return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(load("own_data_module:make", None, {"n": 30}).x_train) == 30
    with pytest.raises(ConfigError, match="not the four arrays"):
        load("own_data_module:wrong")
    with pytest.raises(ConfigError, match=r"data.name.*no 'digit'.*did you mean 'digits'"):
        load("digit")
