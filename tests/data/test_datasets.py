import gzip
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlq_ray.data import as_dataset, datasets, inputs, load
from fedlq_ray.errors import ConfigError
from fedlq_ray.problems import Regression


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
    # A fifth of each class, to rounding: the classes have 174 to 183 samples.
    both = np.bincount(data.y_train) + np.bincount(data.y_test)
    assert abs(np.bincount(data.y_test) - both / 5).max() < 1


def test_digits_are_those_of_scikit_learn_split_by_it():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source, data = load_digits(), load("digits")
    x = source.images.astype(np.uint8)
    split = train_test_split(x, source.target, test_size=0.2, stratify=source.target, random_state=0)
    for name, expected in zip(("x_train", "x_test", "y_train", "y_test"), split, strict=True):
        assert np.array_equal(getattr(data, name).reshape(expected.shape), expected), name


def test_diabetes_is_that_of_scikit_learn():
    from sklearn.datasets import load_diabetes

    source, data = load_diabetes(scaled=False), load("diabetes", problem=Regression())
    order = np.random.default_rng(0).permutation(442)
    for part, rows in (("train", np.sort(order[88:])), ("test", np.sort(order[:88]))):
        assert np.array_equal(getattr(data, f"x_{part}"), source.data[rows].astype(np.float32))
        assert np.array_equal(getattr(data, f"y_{part}")[:, 0], source.target[rows].astype(np.float32))


def test_inputs_are_normalised_and_channels_last():
    data = as_dataset(arrays(x_train=np.full((40, 5, 6, 2), 7, np.uint8), x_test=np.zeros((8, 5, 6, 2), np.uint8)))
    x = inputs(data.x_test, data.mean, data.std)
    assert data.input_shape == (2, 5, 6) == x.shape[1:]
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert (x == -7).all()  # a constant channel has mean 7 and is divided by 1
    flat = as_dataset(arrays())
    z = inputs(flat.x_train, flat.mean, flat.std)
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0, unbiased=False) - 1).abs().max() < 1e-5


def test_moments_are_those_of_numpy_in_float64():
    x = np.random.default_rng(0).integers(0, 256, (5000, 3, 4, 2), np.uint8)  # more than one chunk
    data = as_dataset((x, np.arange(5000) % 2, x[:9], np.arange(9) % 2))
    np.testing.assert_allclose(data.mean, x.mean((0, 1, 2), np.float64), rtol=1e-6)
    np.testing.assert_allclose(data.std, x.std((0, 1, 2), np.float64), rtol=1e-6)


def test_features_in_small_units_are_normalised_too():
    data = as_dataset(arrays(x_train=np.random.default_rng(0).random((40, 3)) * 1e-7))
    z = inputs(data.x_train, data.mean, data.std)
    assert (z.std(0, unbiased=False) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float64])
def test_images_without_a_channel_get_one_and_bytes_stay_bytes(dtype):
    given = arrays(x_train=np.ones((40, 5, 6), dtype), x_test=np.ones((8, 5, 6), dtype))
    data = as_dataset(given, layout="images")
    assert data.x_train.shape == (40, 5, 6, 1) and data.input_shape == (1, 5, 6)
    assert data.x_train.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    assert data.y_train.dtype == np.int64


def test_a_dataset_four_arrays_and_a_mapping_are_alike():
    made = as_dataset(arrays())
    assert as_dataset(made) is made
    assert np.array_equal(as_dataset(tuple(arrays().values())).x_test, made.x_test)
    with pytest.raises(ConfigError, match="returned no x_test"):
        as_dataset({k: v for k, v in arrays().items() if k != "x_test"})
    with pytest.raises(ConfigError, match="returned a int, not the four arrays"):
        as_dataset(3)


def with_value(value):
    x = np.ones((8, 3))
    x[5, 1] = value
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": with_value(np.nan)}, r"x_test\[5\] holds a NaN"),
        ({"x_test": with_value(-np.inf)}, r"x_test\[5\] holds .*infinity"),
        ({"x_test": with_value(1e300)}, r"x_test\[5\] holds .*beyond float32's range"),
        ({"y_test": np.full(8, 9)}, r"y_test\[0\] is 9.*largest label of y_train is 3"),
        ({"y_train": np.full(40, -1)}, r"y_train\[0\] is -1.*out of range"),
        ({"y_train": np.full(40, 0.5)}, "y_train must be one whole number"),
        ({"y_train": np.full(40, np.nan)}, "y_train must be one whole number"),
        ({"y_train": np.full(40, 1e30)}, "y_train must be one whole number"),
        ({"y_train": np.zeros(39, int)}, "40 samples in x_train, 39 in y_train"),
        ({"y_train": np.full(40, 3)}, "y_train has only one class, 3"),
        ({"x_train": np.ones((0, 3)), "y_train": np.ones(0, int)}, r"x_train has shape \(0, 3\)"),
        (
            {"x_train": np.ones((40, 3, 9, 9))},
            r"x_train has shape \(40, 3, 9, 9\): images of 3x9 with 9 channels.*channels_first",
        ),
        ({"x_test": np.ones((8, 4))}, r"\(3,\), of x_test \(4,\)"),
        ({"x_train": np.array([["a"] * 3] * 40)}, "not numbers"),
    ],
)
def test_wrong_arrays_are_named(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        as_dataset(arrays(**changes))
    np.savez(tmp_path / "d.npz", **arrays(**changes))
    with pytest.raises(ConfigError, match=rf"data\.path: .*d\.npz: .*{message}"):
        load("npz", str(tmp_path / "d.npz"))


SHAPES = {
    (3,): ("auto", (3,), "3 features"),
    (8, 8): ("auto", (1, 8, 8), "grey images of 8x8"),
    (8, 6, 3): ("auto", (3, 8, 6), "images of 8x6, 3 channels"),
    (128, 1, 9): ("auto", (9, 128, 1), "images of 128x1, 9 channels"),
    (28, 20, 1): ("auto", (1, 28, 20), "grey images of 28x20"),
    (128, 9): ("series", (9, 128), "series of 128 steps, 9 channels"),
    (9, 128): ("channels_first", (9, 128), "series of 128 steps, 9 channels"),
    (28, 20): ("images", (1, 28, 20), "grey images of 28x20"),
    (4, 8, 8): ("channels_first", (4, 8, 8), "images of 8x8, 4 channels"),
    (3, 8, 6): ("channels_first", (3, 8, 6), "images of 8x6, 3 channels"),
    (8, 8, 4): ("images", (4, 8, 8), "images of 8x8, 4 channels"),
    (2, 3, 4): ("features", (24,), "24 features"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_arrays_are_read_as_the_layout_has_them_and_say_so(shape):
    layout, input_shape, told = SHAPES[shape]
    x = np.random.default_rng(0).random((12, *shape)).astype(np.float32)
    data = as_dataset((x, np.arange(12) % 3, x[:6], np.arange(6) % 3), layout=layout)
    assert data.input_shape == input_shape
    assert data.description == f"data: 12 training and 6 test samples of 3 classes; {told}"
    made = inputs(data.x_train, data.mean, data.std)
    assert made.shape[1:] == input_shape
    # Normalised per channel or feature: the axis after the batch.
    axes = (0, *range(2, made.ndim))
    assert made.mean(axes).abs().max() < 1e-5 and (made.std(axes, unbiased=False) - 1).abs().max() < 1e-4
    first = x if layout == "channels_first" else x.reshape(12, -1) if layout == "features" else np.moveaxis(x, -1, 1)
    first = x.reshape(12, *input_shape) if "grey" in told else first
    again = (first - data.mean.reshape(-1, *[1] * (made.ndim - 2))) / data.std.reshape(-1, *[1] * (made.ndim - 2))
    np.testing.assert_allclose(made.numpy(), again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [(128, 9), (9, 128), (28, 20), (4, 8, 8), (3, 8, 6), (1, 28, 28), (64, 8, 8), (9, 1, 128), (3, 8, 3), (6, 6, 6)],
)
def test_shapes_with_two_readings_are_refused(shape):
    x = np.ones((12, *shape))
    with pytest.raises(ConfigError, match=r"x_train has shape .*Set data\.layout"):
        as_dataset((x, np.arange(12) % 3, x, np.arange(12) % 3))


def test_a_layout_must_fit_the_shape():
    x, y = np.ones((12, 8, 8)), np.arange(12) % 3
    with pytest.raises(ConfigError, match=r"\(12, 4\), but data\.layout=series needs \(n, length, channels\)"):
        as_dataset((x[:, 0, :4], y, x[:, 0, :4], y), layout="series")
    with pytest.raises(ConfigError, match=r"data\.layout: images is for arrays"):
        as_dataset(as_dataset((x, y, x, y)), layout="images")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.uint64])
def test_labels_may_be_whole_floats_and_booleans(dtype):
    data = as_dataset(arrays(y_train=(np.arange(40) % 4).astype(dtype), y_test=(np.arange(8) % 4).astype(dtype)))
    assert data.y_train.dtype == np.int64 and data.y_train.tolist() == (np.arange(40) % 4).tolist()
    two = as_dataset(arrays(y_train=np.arange(40) % 2 == 1, y_test=np.arange(8) % 2 == 1))
    assert two.num_classes == 2 and two.y_test.tolist() == [0, 1] * 4


def test_lists_of_unequal_lengths_are_refused():
    with pytest.raises(ConfigError, match="x_train cannot be converted to a NumPy array"):
        as_dataset(arrays(x_train=[[1, 2], [3]]))


def test_npz_faults_name_the_file_and_what_is_missing(tmp_path):
    file = tmp_path / "d.npz"
    with pytest.raises(ConfigError, match=r"data\.path: data\.name=npz needs"):
        load("npz")
    with pytest.raises(ConfigError, match=r"data\.path: .*no such file"):
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
    np.savez_compressed(file, **arrays())
    data = bytearray(file.read_bytes())
    data[60:75] = b"\xff" * 15  # inside the first array's compressed bytes
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"data\.path: .*d\.npz: cannot be read"):
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
    with pytest.raises(ConfigError, match=r"data\.path: .*holds no mnist"):
        load("mnist", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b\x08 no gzip", gzip.compress(bytes(range(200)))[:-20], gzip.compress(b"GIF89a"), gzip.compress(b"")],
    ids=["no gzip", "cut", "no idx", "empty"],  # gzip's bytes have the time in them
)
def test_a_damaged_idx_file_is_named(content, tmp_path):
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.path: .*t10k-images-idx3-ubyte\.gz: "):
        datasets.read_idx(file)


def test_an_idx_file_may_be_plain(tmp_path):
    (tmp_path / "a-ubyte").write_bytes(b"\x00\x00\x08\x02\x00\x00\x00\x02\x00\x00\x00\x03" + bytes(range(6)))
    assert datasets.read_idx(tmp_path / "a-ubyte").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_without_files_and_network_one_error_says_the_places_and_the_remedy(name, tmp_path, monkeypatch):
    timeouts = []

    def no_network(*_args, **_settings):
        timeouts.append(socket.getdefaulttimeout())
        raise OSError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "_torchvision_arrays", no_network)
    before = socket.getdefaulttimeout()
    with pytest.raises(ConfigError, match=rf"{name} was not found in .*cache.*no route to host.*data\.path"):
        load(name)
    assert timeouts == [20] and socket.getdefaulttimeout() == before


def test_a_damaged_folder_of_cifar10_is_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ConfigError, match=r"data\.path: .*cifar-10-batches-py: incomplete or damaged"):
        load("cifar10", str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.path: .*neither an \.npz nor a folder"):
        load("cifar10", str(tmp_path / "nowhere"))


def test_cifar10_may_be_an_npz(tmp_path):
    np.savez(tmp_path / "c.npz", **arrays(x_train=np.ones((40, 5, 5, 3)), x_test=np.ones((8, 5, 5, 3))))
    assert load("cifar10", str(tmp_path / "c.npz")).input_shape == (3, 5, 5)


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_debian_s_fashion_mnist_is_found():
    data = load("fashion-mnist")
    assert data.x_train.shape == (60_000, 28, 28, 1) and data.x_train.dtype == np.uint8
    assert np.bincount(data.y_test).tolist() == [1000] * 10


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
