import pytest
import torch
from torch import nn

from fedlq_ray.errors import ConfigError
from fedlq_ray.models import FlatModel, build, training_flops


def test_the_cnn_has_147146_parameters_in_four_layers():
    model = FlatModel(build("auto", (1, 28, 28), 10, {}))
    assert [(layer.name, layer.size) for layer in model.layers] == [
        ("conv1", 416),
        ("conv2", 12832),
        ("fc1", 131328),
        ("fc2", 2570),
    ]
    assert model.num_parameters == 147146 == len(model.storage)


def test_flops_are_those_of_hand_arithmetic():
    macs = {"conv1": 24 * 24 * 16 * 25, "conv2": 8 * 8 * 32 * 16 * 25, "fc1": 512 * 256, "fc2": 2560}
    # Forward once, backward twice (weights and inputs), but no gradient of the first layer's input.
    assert training_flops(build("cnn", (1, 28, 28), 10, {}), (1, 28, 28)) == 2 * (
        3 * sum(macs.values()) - macs["conv1"]
    )


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "lenet5", "resnet20_gn", "mobilenetv2_gn", "vgg9", "torchvision:resnet18"]
)
def test_a_flat_step_equals_torch_on_the_plain_module(name):
    torch.manual_seed(0)
    plain = build(name, (3, 32, 32), 5, {})
    torch.manual_seed(0)
    flat = FlatModel(build(name, (3, 32, 32), 5, {}))
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    nn.functional.cross_entropy(plain(x), y).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    nn.functional.cross_entropy(flat.module(x), y).backward()
    flat.storage[: flat.num_parameters] -= 0.1 * flat.grad
    for key, value in flat.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-3, atol=2e-4)
    assert flat.layers[-1].stop == len(flat.storage)


def test_batch_norm_statistics_are_segments_after_all_parameters():
    model = FlatModel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    assert [(la.name, la.size, la.buffer) for la in model.layers] == [
        ("0", 16, False),
        ("1", 8, False),
        ("2", 10, False),
        ("1.buffers", 8, True),
    ]
    before = model.storage[34:].clone()
    model.module(torch.randn(5, 3))
    assert not torch.equal(before, model.storage[34:])


def test_shared_parameters_appear_once_and_root_ones_are_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x)) * self.scale

    model = FlatModel(Tied())
    assert [(la.name, la.size) for la in model.layers] == [("(root)", 1), ("a", 20), ("b", 4)]
    assert model.module.a.weight.data_ptr() == model.module.b.weight.data_ptr()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cn", (1, 28, 28), "did you mean 'cnn'"),
        ("cnn", (64,), "takes images"),
        ("torchvision:resnet19", (3, 32, 32), "did you mean 'resnet1"),
        ("torchvision:resnet18", (1, 28, 28), "3 channels"),
        ("builtins:dict", (4,), "not a torch.nn.Module"),
        ("no_such_module_at_all:x", (4,), "cannot import"),
    ],
)
def test_wrong_models_are_refused(name, shape, message):
    with pytest.raises(ConfigError, match=message):
        build(name, shape, 10, {})


def test_a_model_whose_output_does_not_fit_the_classes_is_refused():
    with pytest.raises(ConfigError, match=r"\(2, 7\) for 2 samples.*10 classes"):
        build(lambda: nn.Linear(4, 7), (4,), 10, {})
    with pytest.raises(ConfigError, match="float64"):
        FlatModel(nn.Linear(2, 2).double())
