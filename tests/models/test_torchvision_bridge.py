import pickle
import subprocess
import sys

import cloudpickle
import pytest
import torch
from torch import nn

from fedlq_ray.errors import ConfigError
from fedlq_ray.models import FlatModel, build
from fedlq_ray.models.torchvision_bridge import traced

SMALL = "torchvision:mobilenet_v3_small"


@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_a_traced_model_unpickles_without_torchvision(tmp_path, pickler):
    model = build(SMALL, (3, 32, 32), 10, {})
    assert isinstance(model, torch.fx.GraphModule)
    (tmp_path / "m").write_bytes(pickler.dumps(model))
    code = (
        "import pickle, sys, torch\n"
        f"m = pickle.load(open({str(tmp_path / 'm')!r}, 'rb'))\n"
        "assert m(torch.zeros(2, 3, 32, 32)).shape == (2, 10)\n"
        "print([name for name in sys.modules if name.startswith('torchvision')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_torchvision_imports_beside_a_torch_without_its_operators():
    code = "from fedlq_ray.models.torchvision_bridge import import_torchvision as i; print(i() is i(), i().__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True torchvision", done.stderr


def test_batch_norm_statistics_of_a_traced_model_move_inside_the_vector():
    model = FlatModel(build(SMALL, (3, 32, 32), 10, {}))
    statistics = next(layer for layer in model.layers if layer.buffer)
    before = model.storage.clone()
    model.module.train()
    nn.functional.cross_entropy(model.module(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
    where = slice(statistics.start, statistics.stop)
    assert not torch.equal(model.storage[where], before[where])
    assert torch.equal(model.storage[: model.num_parameters], before[: model.num_parameters])
    assert model.grad.any()


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) * 2 if self.training else self.fc(x)  # a trace freezes one of the two


def test_a_model_that_cannot_be_traced_exactly_stays_plain_and_ready_to_train():
    model = _Branches()
    assert traced(model, (4,)) is None
    assert model.training and model.fc.training


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("alexnet", {}, r"\(3, 32, 32\).*too small"),
        ("vit_b_32", {}, r"\(3, 32, 32\).*Wrong image height"),
        ("resnet18", {"nope": 1}, "nope"),
        ("fcn_resnet50", {}, "did you mean 'resnet50'"),
    ],
)
def test_classifiers_that_do_not_fit_are_refused(name, args, message):
    with pytest.raises(ConfigError, match=f"model.name.*{message}"):
        build(f"torchvision:{name}", (3, 32, 32), 10, args)
