import pytest
import torch
from torch import nn

from fedlq_ray.errors import ConfigError
from fedlq_ray.models import training_flops

# The cnn's own hand arithmetic is in test_models.py.


def test_an_mlp_costs_three_passes_less_the_first_inputs_gradient():
    module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    assert training_flops(module, (5,)) == 2 * (2 * 35 + 3 * 21)


def test_counting_changes_nothing_of_the_module():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    training_flops(module, (3,))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not module.training and all(p.grad is None for p in module.parameters())


def test_a_model_that_cannot_be_trained_is_refused():
    with pytest.raises(ConfigError, match="a training step fails"):
        training_flops(nn.Linear(3, 2).requires_grad_(False), (3,))
    with pytest.raises(ConfigError, match="'tuple' object has no attribute 'sum'"):
        training_flops(nn.LSTM(3, 2), (4, 3))
