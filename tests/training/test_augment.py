"""Augmentation: what is flipped and shifted, that it repeats, and what it refuses."""

import numpy as np
import pytest
import torch

from fedlq_ray import ConfigError, simulate
from fedlq_ray.config.load import load
from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.training.augment import PAD, augmented
from fedlq_ray.training.sgd import Batches

IMAGES = torch.arange(1, 40 * 3 * 8 * 6 + 1, dtype=torch.float32).reshape(40, 3, 8, 6)
RUN = [
    "rounds=3",
    "clients.hosting=serial",
    "clients.count=6",
    "clients.cohort=3",
    "tracking.uri=null",
    "data.name=npz",
]


def test_about_half_is_flipped_and_nothing_else_happens():
    found = augmented(IMAGES, "flip", np.random.default_rng(0))
    same = [bool((a == b).all()) for a, b in zip(found, IMAGES, strict=True)]
    turned = [bool((a == b.flip(2)).all()) for a, b in zip(found, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(same, turned, strict=True)) and 10 <= sum(turned) <= 30


def test_images_are_shifted_and_zeros_come_in():
    found = augmented(IMAGES, "crop", np.random.default_rng(1))
    shifts = set()
    for image, moved in zip(IMAGES, found, strict=True):
        wide = torch.nn.functional.pad(image, (PAD,) * 4)
        places = [(y, x) for y in range(9) for x in range(9) if bool((wide[:, y : y + 8, x : x + 6] == moved).all())]
        assert len(places) == 1
        shifts |= set(places)
    assert len(shifts) > 20 and min(min(s) for s in shifts) == 0 and max(max(s) for s in shifts) == 2 * PAD


def test_batches_repeat_and_the_order_of_samples_is_that_without():
    x, y = IMAGES.numpy(), np.arange(40)

    def batches(how):
        settings = TrainConfig(augment=how, batch_size=16)
        return Batches(x, y, torch.from_numpy, 80, np.random.default_rng(3), settings)

    made = batches("flip_crop")
    first, again = ([batch for batch, _ in made] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    plain = [targets for _, targets in batches("none")]
    assert all(torch.equal(a, b) for a, (_, b) in zip(plain, made, strict=True))
    assert not torch.equal(torch.cat(first[:3]).sort(0).values, torch.cat(first[3:]).sort(0).values)  # passes differ


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 240)
    x = (rng.random((240, 8, 8)) * 80 + 40 * y[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "made.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:])
    return [*RUN, f"data.path={tmp_path / 'made.npz'}", "data.layout=images", "model.name=mlp"]


def test_a_run_repeats_and_differs_from_one_without(images, tmp_path):
    runs = {
        name: simulate(load(None, [*images, f"train.augment={how}", f"out={tmp_path / name}"])).summary[
            "weights_sha256"
        ]
        for name, how in (("a", "flip_crop"), ("b", "flip_crop"), ("c", "none"))
    }
    assert runs["a"] == runs["b"] != runs["c"]


@pytest.mark.parametrize("data", [["data.name=shakespeare"], ["data.name=diabetes"]])
def test_what_is_not_an_image_is_refused(data, tmp_path):
    settings = ["clients.hosting=serial", "tracking.uri=null", *data, "train.augment=flip", f"out={tmp_path / 'run'}"]
    with pytest.raises(
        ConfigError, match=r"^train\.augment=flip is for images of more than 4 x 4 pixels; a sample here"
    ):
        simulate(load(None, settings))
    assert not (tmp_path / "run").exists()
