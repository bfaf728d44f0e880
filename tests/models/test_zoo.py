import pytest
import torch
from torch import nn

from fedlq_ray.errors import ConfigError
from fedlq_ray.models import MODELS, build, check_output, resolve_name

TEXTS = ("lstm", "transformer")


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mlp", (1, 28, 28), 784 * 200 + 200 + 2010),
        ("lenet5", (1, 28, 28), 156 + 2416 + 256 * 120 + 120 + 10164 + 850),
        # conv1, three blocks (two convolutions each, shortcuts 16x32 and 32x64), norms (2 a channel), fc
        ("resnet8_gn", (3, 32, 32), 432 + 4608 + 13824 + 55296 + 512 + 2048 + 2 * (16 + 32 + 64 + 128) + 650),
        ("cnn_large", (1, 28, 28), 832 + 51264 + 3136 * 512 + 512 + 5130),
        ("vgg9", (3, 32, 32), 896 + 18496 + 73856 + 147584 + 295168 + 590080 + 4096 * 512 + 512 + 262656 + 5130),
        ("resnet20_gn", (3, 32, 32), 272_282),
        ("resnet18_gn", (3, 32, 32), 11_173_962),
        ("mobilenetv2_gn", (3, 32, 32), 2_236_682),
        ("alexnet", (3, 32, 32), 35_855_178),
    ],
)
def test_models_have_the_parameters_of_hand_arithmetic(name, shape, parameters):
    assert sum(p.numel() for p in build(name, shape, 10, {}).parameters()) == parameters


def test_the_parameters_of_the_larger_models_are_those_of_hand_arithmetic():
    # A block of two convolutions and two norms; then a stage of n blocks, whose first has a shortcut if it widens.
    def stage(before, after, blocks, shortcut_norm):
        first = 9 * before * after + 9 * after**2 + 4 * after
        widens = before * after + 2 * after * shortcut_norm if before != after else 0
        return first + widens + (blocks - 1) * (18 * after**2 + 4 * after)

    stages = [(16, 16), (16, 32), (32, 64)]
    assert 432 + 32 + sum(stage(*each, 3, 0) for each in stages) + 650 == 272_282
    stages = [(64, 64), (64, 128), (128, 256), (256, 512)]
    assert 27 * 64 + 128 + sum(stage(*each, 2, 1) for each in stages) + 5130 == 11_173_962
    # An inverted residual: wider by a factor, a convolution per channel, narrower; each with a norm.
    total, before = 27 * 32 + 64, 32
    for factor, after, blocks in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(blocks):
            wide = factor * before
            total += (before + 2) * wide * (factor > 1) + 11 * wide + (wide + 2) * after
            before = after
    assert total + 322 * 1280 + 1281 * 10 == 2_236_682
    convolutions = sum((9 * a + 1) * b for a, b in ((3, 64), (64, 192), (192, 384), (384, 256), (256, 256)))
    connected = 2 * 4097 * 4096 + 4097 * 10
    assert convolutions + connected == 35_855_178 and round(connected / 35_855_178, 2) == 0.94


@pytest.mark.parametrize("name", ["resnet18_gn", "mobilenetv2_gn"])
def test_torchvisions_models_have_group_norm_alone_and_need_no_torchvision(name):
    built = build(name, (1, 28, 28), 10, {})
    assert isinstance(built, torch.fx.GraphModule)
    kinds = {type(part) for part in built.modules()}
    assert nn.GroupNorm in kinds and not kinds & {nn.BatchNorm2d, nn.Dropout} and not list(built.buffers())


def test_models_of_texts_have_the_parameters_of_hand_arithmetic():
    # embedding, two layers of four gates (weights of input and state, two biases), fc
    lstm = 80 * 8 + 4 * 256 * (8 + 256 + 2) + 4 * 256 * (256 + 256 + 2) + 256 * 80 + 80
    built = build("lstm", (80,), 80, {}, vocabulary=80, output_shape=(80, 80))
    assert sum(p.numel() for p in built.parameters()) == lstm
    # A block: attention (in and out), two linear layers, two norms; then embedding, positions, a last norm, fc.
    block = 3 * 128 * 129 + 128 * 129 + 129 * 512 + 513 * 128 + 4 * 128
    built = build("transformer", (80,), 65, {}, vocabulary=65, output_shape=(80, 65))
    assert sum(p.numel() for p in built.parameters()) == 4 * block + 65 * 128 + 80 * 128 + 256 + 128 * 65 + 65


@pytest.mark.parametrize("name", TEXTS)
def test_a_model_of_texts_sees_no_later_token_and_can_end_with_the_last(name):
    built = build(name, (20,), 9, {}, vocabulary=9, output_shape=(20, 9)).eval()
    x = torch.randint(0, 9, (2, 20))
    later = x.clone()
    later[:, 12:] = (later[:, 12:] + 1) % 9
    assert torch.equal(built(x)[:, :12], built(later)[:, :12]) and not torch.equal(
        built(x)[:, 12:], built(later)[:, 12:]
    )
    last = build(name, (20,), 9, {}, vocabulary=9)
    last.load_state_dict(built.state_dict())
    assert torch.allclose(last.eval()(x), built(x)[:, -1], atol=1e-6)
    with pytest.raises(ConfigError, match=f"{name} takes tokens"):
        build(name, (20,), 9, {})


def test_the_cnn_pools_before_relu_which_is_the_same_function():
    torch.manual_seed(0)
    model, x = build("cnn", (3, 17, 20), 7, {}), torch.randn(2, 3, 17, 20)
    assert [name for name, _ in model.named_children() if name != "pool"] == ["conv1", "conv2", "fc1", "fc2"]
    y = nn.functional.max_pool2d(model.conv1(x).relu(), 2)
    y = nn.functional.max_pool2d(model.conv2(y).relu(), 2).flatten(1)
    assert torch.equal(model(x), model.fc2(model.fc1(y).relu()))


@pytest.mark.parametrize("name", MODELS)
def test_the_same_global_seed_builds_the_same_model(name):
    def weights(seed):
        torch.manual_seed(seed)
        if name in TEXTS:
            made = build(name, (20,), 65, {}, vocabulary=65, output_shape=(20, 65))
        else:
            made = build(name, (3, 32, 32), 10, {})
        return nn.utils.parameters_to_vector(made.parameters())

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_auto_picks_by_shape_and_other_names_are_themselves():
    chosen = [resolve_name("auto", shape) for shape in ((1, 28, 28), (3, 32, 32), (64,), (1, 32, 32))]
    assert chosen == ["cnn", "resnet8_gn", "mlp", "mlp"]
    assert resolve_name("vgg9", (1, 28, 28)) == "vgg9"


def test_a_users_factory_need_not_take_the_shape():
    assert isinstance(build(lambda: nn.Linear(4, 3), (4,), 3, {}), nn.Linear)


@pytest.mark.parametrize(
    ("name", "shape", "args", "message"),
    [
        ("cnn", (1, 8, 8), {}, "16x16 or more"),
        ("vgg9", (3, 4, 4), {}, "8x8 or more"),
        ("mlp", (4,), {"hiden": [3]}, "takes no 'hiden'"),
    ],
)
def test_what_does_not_fit_is_refused_by_configuration_key(name, shape, args, message):
    with pytest.raises(ConfigError, match=f"model.name.*{message}"):
        build(name, shape, 10, args)


def test_a_failing_forward_pass_names_the_shape_and_leaves_the_mode():
    model = nn.Linear(4, 3).train()
    with pytest.raises(ConfigError, match=r"inputs of shape \(5,\)"):
        check_output(model, (5,), 3)
    assert model.training
