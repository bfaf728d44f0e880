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


class Outputs(nn.Module):
    """The outputs of a recurrent layer, at all steps."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_by_hand(kind, gates, directions):
    """Seven steps of two layers of six states; the second gets the first's states of each direction."""
    layer = Outputs(kind(4, 6, 2, batch_first=True, bidirectional=directions == 2))
    forward = 7 * directions * gates * 6 * ((4 + 6) + (6 * directions + 6))
    inputs, first = 7 * directions * gates * 6 * 4, 2 * directions * gates * 6 * 6
    # No gradient of the inputs, and none of the first states; oneDNN, which runs LSTMs, computes both.
    spared = 0 if kind is nn.LSTM and torch.backends.mkldnn.is_available() else inputs + first
    assert training_flops(layer, (7, 4)) == 2 * (3 * forward - spared)


def test_a_network_of_depthwise_convolutions_by_hand():
    """MobileNetV2: a side halves before the 32, 64 and 160 channels; the first convolution's inputs get no gradient."""
    first = 32 * 32 * 27 * 32
    forward, before, side = first, 32, 32
    for factor, after, blocks in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for index in range(blocks):
            wide = factor * before
            forward += side**2 * before * wide * (factor > 1)
            side //= 2 if index == 0 and after in (32, 64, 160) else 1
            forward += side**2 * (9 * wide + wide * after)
            before = after
    forward += side**2 * 320 * 1280 + 12800
    assert training_flops(build("mobilenetv2_gn", (3, 32, 32), 10, {}), (3, 32, 32)) == 2 * (3 * forward - first)


def test_alexnet_by_hand():
    first = 32**2 * 27 * 64
    convolutions = 9 * (16**2 * 64 * 192 + 8**2 * (192 * 384 + 384 * 256 + 256 * 256))
    forward = first + convolutions + 2 * 4096**2 + 40960
    assert training_flops(build("alexnet", (3, 32, 32), 10, {}), (3, 32, 32)) == 2 * (3 * forward - first)
