import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedlq_ray.config.settings import TrainConfig
from fedlq_ray.errors import ConfigError
from fedlq_ray.models import FlatModel, Layer, build
from fedlq_ray.models.flat import ALIGNMENT
from fedlq_ray.training.sgd import LocalSGD


def _step(model: FlatModel, x: torch.Tensor) -> None:
    model.module.train()
    model.module(x).square().sum().backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["cnn", "resnet8_gn"])
def test_gradients_stay_views_of_the_flat_gradient_over_backward_passes(name, memory_format):
    model = FlatModel(build(name, (3, 32, 32), 10, {}))
    before = {key: (id(p.grad), p.grad.data_ptr()) for key, p in model.module.named_parameters()}
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=memory_format)
    _step(model, x)
    once = model.grad.clone()
    _step(model, x)  # a second pass accumulates: twice the first
    torch.testing.assert_close(model.grad, 2 * once, rtol=1e-4, atol=1e-4)
    assert {key: (id(p.grad), p.grad.data_ptr()) for key, p in model.module.named_parameters()} == before
    model.grad.zero_()
    assert all(not p.grad.any() for p in model.module.parameters())


def test_flattening_does_not_change_the_values_and_covers_the_vector_once():
    plain = build("resnet8_gn", (3, 32, 32), 10, {})
    model = FlatModel(copy.deepcopy(plain))
    for (key, old), new in zip(plain.state_dict().items(), model.module.state_dict().values(), strict=True):
        assert torch.equal(old, new), key
    assert model.layers[0].start == 0 and model.layers[-1].stop == len(model.storage)
    assert all(a.stop == b.start for a, b in zip(model.layers, model.layers[1:], strict=False))


def test_convolutions_lie_in_channels_last_order():
    model = FlatModel(nn.Conv2d(2, 1, 2, bias=False))
    with torch.no_grad():
        model.module.weight.copy_(torch.arange(8.0).view(1, 2, 2, 2))  # channel 0 holds 0..3, channel 1 holds 4..7
    assert model.layers == (Layer("(root)", 0, 8, matrix=True),)
    assert model.storage.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_frozen_parameters_are_no_part_of_the_vector():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    module[1].bias.requires_grad_(False)
    kept = module[0].weight
    model = FlatModel(module)
    _step(model, torch.ones(4, 3))
    assert model.layers == (Layer("1", 0, 2, matrix=True),) and model.num_parameters == 2 == len(model.storage)
    assert model.grad.any() and model.module[0].weight is kept and kept.grad is None
    assert model.state_dict().keys() == module.state_dict().keys()
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"nothing to train: all 4 parameters are frozen \(requires_grad=False\)"):
        FlatModel(module)
    with pytest.raises(ConfigError, match="nothing to train: it has no parameters"):
        FlatModel(nn.ReLU())


class Positions(nn.Module):
    """A constant table, a cache, and a statistic of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("table", torch.full((4,), -torch.inf))
        self.register_buffer("cache", torch.zeros(5), persistent=False)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.cache = torch.ones(7)  # rebuilt, of another size
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.fc(x - self.mean)


def test_constants_are_no_part_of_the_vector_and_come_back_for_the_next_client():
    model = FlatModel(Positions(), statistics={"mean"})
    assert [(la.name, la.size, la.buffer) for la in model.layers] == [("fc", 8, False), ("(root).buffers", 3, True)]
    first = model.read()
    _step(model, torch.ones(4, 3))
    assert model.changed_constants() == [] and model.read()[8:].tolist() == [pytest.approx(0.1)] * 3
    assert model.module.cache.shape == (7,)
    model.module.table[0] = 0
    assert model.changed_constants() == ["table"]
    model.load(first)
    assert model.module.cache.tolist() == [0] * 5 and bool((model.module.table == -torch.inf).all())
    assert model.changed_constants() == []


def test_parameters_that_share_memory_are_refused():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight.data = module[0].weight.data
    with pytest.raises(ConfigError, match=r"parameters 0\.weight and 1\.weight share memory"):
        FlatModel(module)
    module[1].weight = module[0].weight  # the same Parameter in both places is a tie
    assert FlatModel(module).num_parameters == 9 + 3 + 3


def test_statistics_must_be_float32():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[1].running_mean = module[1].running_mean.double()
    with pytest.raises(ConfigError, match=r"training changes buffer running_mean, which is torch\.float64"):
        FlatModel(module)


def test_batch_norm_counts_are_left_out_and_kept_in_the_state_dict():
    model = FlatModel(nn.BatchNorm1d(4))
    assert [(la.name, la.size, la.buffer) for la in model.layers] == [
        ("(root)", 8, False),
        ("(root).buffers", 8, True),
    ]
    model.module(torch.randn(5, 4))
    assert model.state_dict()["num_batches_tracked"].item() == 1
    assert torch.equal(model.storage[8:12], model.module.running_mean)
    before = model.storage[8:12].clone()
    model.module.running_mean = model.module.running_mean + 1  # in the buffer's place
    assert torch.equal(model.read()[8:12], before + 1) and torch.equal(model.storage[8:12], before + 1)
    model.module.num_batches_tracked = model.module.num_batches_tracked + 1
    model.load(model.read())  # as for the next client, to whom nothing comes from the one before
    assert model.state_dict()["num_batches_tracked"].item() == 0


def test_load_copies_in_and_refuses_another_length_or_type():
    model = FlatModel(nn.Linear(3, 2))
    given = torch.arange(8.0)
    model.load(given)
    assert model.module.bias.tolist() == [6, 7]
    model.storage.zero_()
    assert given.sum() == 28  # the vector that was loaded is not shared
    with pytest.raises(ValueError, match=r"\(7,\)"):
        model.load(torch.zeros(7))
    with pytest.raises(ValueError, match="float64"):
        model.load(torch.zeros(8, dtype=torch.float64))


def test_a_state_dict_goes_through_safetensors_into_a_fresh_module(tmp_path):
    model = FlatModel(build("cnn", (1, 28, 28), 10, {}))
    state = model.state_dict()
    assert all(t.is_contiguous() for t in state.values())
    save_file(state, tmp_path / "m.safetensors")
    fresh = build("cnn", (1, 28, 28), 10, {})
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(FlatModel(fresh).storage, model.storage)


def test_tied_weights_go_through_safetensors_into_a_strict_load(tmp_path):
    def tied():
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        module[1].weight = module[0].weight
        return module

    model = FlatModel(tied())
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    fresh = tied()
    fresh.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    assert torch.equal(FlatModel(fresh).storage, model.storage)


def test_models_that_cannot_be_flat_are_refused_by_parameter_name():
    with pytest.raises(ConfigError, match="no parameters"):
        FlatModel(nn.Flatten())
    with pytest.raises(ConfigError, match=r"1\.weight is torch.float16"):
        FlatModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half()))
    with pytest.raises(ConfigError, match="on meta"):
        FlatModel(nn.Linear(2, 2, device="meta"))


def test_a_layout_with_gaps_trains_as_one_without(monkeypatch):
    """As on a GPU: each tensor at a multiple of 16 elements, a frozen one and buffers among them."""
    ends = []
    for step in (1, 16):
        monkeypatch.setitem(ALIGNMENT, "cpu", step)
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(45, 3))
        module[0].bias.requires_grad_(False)
        model = FlatModel(module)
        start = model.read()
        model.load(torch.zeros_like(start))
        model.load(start)
        assert torch.equal(model.read(), start) and model.layers[-1].stop == len(start)
        settings = TrainConfig(lr=0.1, momentum=0.9, weight_decay=0.01, prox_mu=0.1, batch_size=8)
        x, y = np.random.default_rng(0).standard_normal((24, 3, 5, 5), np.float32), np.arange(24) % 3
        rng = np.random.default_rng(1)
        LocalSGD(model, settings).train(x, y, normalise=torch.from_numpy, samples=48, rng=rng)
        named = model.parameters_of(start[: model.num_parameters])
        assert all(named[name].shape == p.shape for name, p in module.named_parameters() if p.requires_grad)
        assert all(
            tensor.data_ptr() % (4 * step) == model.storage.data_ptr() % (4 * step)
            for tensor in module.parameters()
            if tensor.requires_grad
        )
        ends.append((model.read(), model.flat(model.grad), [layer.size for layer in model.layers]))
    (without, gradient, sizes), (with_gaps, same, same_sizes) = ends
    assert torch.equal(without, with_gaps) and torch.equal(gradient, same) and sizes == same_sizes
    assert not torch.equal(without, start)
