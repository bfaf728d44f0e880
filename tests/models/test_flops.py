import pytest
import torch
from torch import nn

from fedlq_ray.errors import ConfigError
from fedlq_ray.models import build, training_flops

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


def transformer(length, width, layers, outputs):
    """Multiplications of a forward pass by hand: four square matrices, two four times as wide, attention."""
    return length * layers * (4 + 8) * width**2 + layers * 2 * length**2 * width + length * width * outputs


@pytest.mark.parametrize(
    ("name", "multiplications"),
    [
        # embedding 8 and 256 states: four gates of (8 + 256) and of (256 + 256), then 65 outputs, at 80 positions
        ("lstm", 80 * (4 * 256 * (8 + 256) + 4 * 256 * 512 + 256 * 65)),
        ("transformer", transformer(80, 128, 4, 65)),
    ],
)
def test_models_of_texts_cost_three_forward_passes(name, multiplications):
    built = build(name, (80,), 65, {}, vocabulary=65, output_shape=(80, 65))
    assert training_flops(built, (80,), 65) == 3 * 2 * multiplications


@pytest.mark.parametrize(
    ("module", "shape", "forward"),
    [
        (nn.Conv2d(8, 8, 3, groups=4), (8, 5, 5), 9 * 8 * 2 * 9),
        (nn.Conv2d(8, 8, 3, groups=8), (8, 5, 5), 9 * 8 * 9),
        (nn.ConvTranspose2d(3, 5, 3), (3, 5, 5), 25 * 3 * 5 * 9),
        (nn.Conv1d(4, 6, 3), (4, 9), 7 * 6 * 4 * 3),
    ],
)
def test_a_first_convolution_costs_a_forward_pass_and_its_weights_gradient(module, shape, forward):
    assert training_flops(module, shape) == 2 * 2 * forward


def test_a_gru_by_hand():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 6, batch_first=True)

        def forward(self, x):
            return self.gru(x)[0][:, -1]

    forward = 7 * 3 * 6 * (4 + 6)  # seven steps, three gates
    inputs, first = 7 * 3 * 6 * 4, 3 * 6 * 6  # no gradient of the inputs, and none of the first state
    assert training_flops(Last(), (7, 4)) == 2 * (3 * forward - inputs - first)
