"""The models by name; each is a function of the input's shape and the number of classes."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedlq_ray.config import parts
from fedlq_ray.errors import ConfigError
from fedlq_ray.models.flops import example
from fedlq_ray.models.text import lstm, transformer
from fedlq_ray.models.torchvision_bridge import build_torchvision, import_torchvision, traced


def _image(name: str, input_shape: tuple[int, ...], least: int) -> tuple[int, int, int]:
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise ConfigError(f"model.name: {name} takes images of {least}x{least} or more; this data is {input_shape}")
    return input_shape


def mlp(input_shape: tuple[int, ...], num_classes: int, hidden: Sequence[int] = (200,)) -> nn.Module:
    """Fully connected layers with ReLU, on flattened inputs of any shape."""
    widths = [int(torch.Size(input_shape).numel()), *hidden]
    parts: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for index, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
        parts += [(f"fc{index}", nn.Linear(before, after)), (f"relu{index}", nn.ReLU())]
    parts.append((f"fc{len(widths)}", nn.Linear(widths[-1], num_classes)))
    model = nn.Sequential()
    for name, part in parts:
        model.add_module(name, part)
    return model


class _ConvNet(nn.Module):
    """Two unpadded 5x5 convolutions, each followed by pooling, then fully connected layers."""

    def __init__(self, shape: tuple[int, int, int], channels: tuple[int, int], widths: Sequence[int]) -> None:
        super().__init__()
        colours, height, width = shape
        self.conv1 = nn.Conv2d(colours, channels[0], 5)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5)
        self.pool = nn.MaxPool2d(2)
        side = [((s - 4) // 2 - 4) // 2 for s in (height, width)]
        sizes = [channels[1] * side[0] * side[1], *widths]
        self.depth = len(widths)
        for index, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
            setattr(self, f"fc{index}", nn.Linear(before, after))

    def forward(self, x: Tensor) -> Tensor:
        # Pooling before ReLU computes the same function with a quarter of the ReLU's work.
        x = torch.relu(self.pool(self.conv1(x)))
        x = torch.relu(self.pool(self.conv2(x))).flatten(1)
        for index in range(1, self.depth):
            x = torch.relu(getattr(self, f"fc{index}")(x))
        logits: Tensor = getattr(self, f"fc{self.depth}")(x)
        return logits


def cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The small CNN of federated-learning papers: 147,146 parameters on 28x28x1 with 10 classes."""
    return _ConvNet(_image("cnn", input_shape, 16), (16, 32), (256, num_classes))


def lenet5(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al., Proc. IEEE 1998), with ReLU and max pooling, unpadded: NIID-Bench's simple CNN (Li et al.,
    ICDE 2022)."""
    return _ConvNet(_image("lenet5", input_shape, 16), (6, 16), (120, 84, num_classes))


class _ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


def resnet8_gn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """ResNet of 8 layers (He et al., CVPR 2016, CIFAR's family with n = 1), GroupNorm in place of batch-norm."""
    return _small_resnet("resnet8_gn", input_shape, num_classes, 1)


def resnet20_gn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """ResNet of 20 layers (He et al., CVPR 2016, CIFAR's family with n = 3), GroupNorm in place of batch-norm."""
    return _small_resnet("resnet20_gn", input_shape, num_classes, 3)


def _small_resnet(name: str, input_shape: tuple[int, ...], num_classes: int, each: int) -> nn.Module:
    """CIFAR's ResNet of 6 x `each` + 2 layers: three stages of `each` blocks, of 16, 32 and 64 channels."""
    channels, _, _ = _image(name, input_shape, 8)
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(channels, 16, 3, 1, 1, bias=False))
    model.add_module("norm1", nn.GroupNorm(8, 16))
    model.add_module("relu1", nn.ReLU())
    before, index = 16, 0
    for after in (16, 32, 64):
        for _ in range(each):
            index += 1
            model.add_module(f"block{index}", _ResidualBlock(before, after, 1 if before == after else 2))
            before = after
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(64, num_classes))
    return model


def resnet18_gn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 (He et al., CVPR 2016) with GroupNorm, for images of 32x32: the first convolution is 3x3
    with stride 1, and no pooling follows it. 11,173,962 parameters on 3x32x32 with 10 classes."""
    channels, _, _ = _image("resnet18_gn", input_shape, 8)
    model = import_torchvision().models.resnet18(num_classes=num_classes, norm_layer=partial(nn.GroupNorm, 8))
    model.conv1 = _first_convolution(channels, 64)
    model.maxpool = nn.Identity()
    return traced(model, input_shape) or model


def mobilenetv2_gn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """torchvision's MobileNetV2 (Sandler et al., CVPR 2018) with GroupNorm and without dropout, for images of 32x32:
    the first convolution and the blocks of 24 channels have stride 1. 2,236,682 parameters on 3x32x32 with 10
    classes."""
    channels, _, _ = _image("mobilenetv2_gn", input_shape, 8)
    # Expansion, channels, blocks, stride of the first block.
    blocks = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    model = import_torchvision().models.mobilenet_v2(
        num_classes=num_classes, inverted_residual_setting=blocks, norm_layer=partial(nn.GroupNorm, 8)
    )
    model.features[0][0] = _first_convolution(channels, 32)
    model.classifier[0] = nn.Identity()
    return traced(model, input_shape) or model


def _first_convolution(channels: int, after: int) -> nn.Conv2d:
    """A 3x3 convolution with stride 1, initialised as torchvision's models initialise theirs."""
    layer = nn.Conv2d(channels, after, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def vgg9(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """VGG with six convolutions and three fully connected layers, without batch-norm, after Simonyan and Zisserman
    (ICLR 2015), at the size that federated-learning papers use (Wang et al., FedMA, ICLR 2020).

    Its weights are initialised as in He et al., ICCV 2015: with PyTorch's default initialisation, signals fade over
    nine layers without normalisation, and the model does not learn."""
    channels, height, width = _image("vgg9", input_shape, 8)
    model = nn.Sequential()
    for index, after in enumerate((32, 64, 128, 128, 256, 256), 1):
        model.add_module(f"conv{index}", nn.Conv2d(channels, after, 3, padding=1))
        model.add_module(f"relu{index}", nn.ReLU())
        if index % 2 == 0:
            model.add_module(f"pool{index}", nn.MaxPool2d(2))
        channels = after
    model.add_module("flatten", nn.Flatten())
    widths = (channels * (height // 8) * (width // 8), 512, 512)
    for index, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
        model.add_module(f"fc{index}", nn.Linear(before, after))
        model.add_module(f"relu_fc{index}", nn.ReLU())
    model.add_module("fc3", nn.Linear(512, num_classes))
    return _initialised(model)


def alexnet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """AlexNet (Krizhevsky et al., NIPS 2012) for images of 32x32, without dropout: 3x3 convolutions with stride 1, the
    size that FedLQ's group uses (35.9 M parameters). Fully connected layers have 94 % of the 35,855,178 parameters on
    3x32x32 with 10 classes. Its weights are initialised as vgg9's."""
    channels, height, width = _image("alexnet", input_shape, 8)
    model = nn.Sequential()
    for index, after in enumerate((64, 192, 384, 256, 256), 1):
        model.add_module(f"conv{index}", nn.Conv2d(channels, after, 3, padding=1))
        model.add_module(f"relu{index}", nn.ReLU())
        if index in (1, 2, 5):
            model.add_module(f"pool{index}", nn.MaxPool2d(2))
        channels = after
    model.add_module("flatten", nn.Flatten())
    for index, before in enumerate((channels * (height // 8) * (width // 8), 4096), 1):
        model.add_module(f"fc{index}", nn.Linear(before, 4096))
        model.add_module(f"relu_fc{index}", nn.ReLU())
    model.add_module("fc3", nn.Linear(4096, num_classes))
    return _initialised(model)


def _initialised(model: nn.Sequential) -> nn.Module:
    """Draws the weights of convolutions and fully connected layers as in He et al., ICCV 2015."""
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return model


def cnn_large(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The CNN of McMahan et al. (AISTATS 2017) for 28x28x1: padded 5x5 convolutions and a fully connected layer of 512,
    which has 97 % of the 1,663,370 parameters for 10 classes."""
    channels, height, width = _image("cnn_large", input_shape, 8)
    model = nn.Sequential()
    for index, after in enumerate((32, 64), 1):
        model.add_module(f"conv{index}", nn.Conv2d(channels, after, 5, padding=2))
        model.add_module(f"pool{index}", nn.MaxPool2d(2))
        model.add_module(f"relu{index}", nn.ReLU())
        channels = after
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc1", nn.Linear(64 * (height // 4) * (width // 4), 512))
    model.add_module("relu3", nn.ReLU())
    model.add_module("fc2", nn.Linear(512, num_classes))
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn_large": cnn_large,
    "lstm": lstm,
    "transformer": transformer,
    "mlp": mlp,
    "cnn": cnn,
    "lenet5": lenet5,
    "resnet8_gn": resnet8_gn,
    "resnet18_gn": resnet18_gn,
    "resnet20_gn": resnet20_gn,
    "mobilenetv2_gn": mobilenetv2_gn,
    "vgg9": vgg9,
    "alexnet": alexnet,
}
_AUTO: dict[tuple[int, ...], str] = {(1, 28, 28): "cnn", (3, 32, 32): "resnet8_gn"}


def resolve_name(name: str, input_shape: tuple[int, ...], vocabulary: int = 0) -> str:
    """Resolves `auto` for this shape, or for tokens; returns any other name unchanged."""
    if name != "auto":
        return name
    return "lstm" if vocabulary else _AUTO.get(input_shape, "mlp")


def copied(module: nn.Module) -> nn.Module:
    """Returns a deep copy of a model; every client trains one.

    Raises:
        ConfigError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as exc:  # a user's model may hold anything
        raise ConfigError(
            f"model.name: the model cannot be copied, but every client trains a copy ({type(exc).__name__}: {exc}); "
            "keep locks, open files, connections and results of computations out of its attributes"
        ) from exc


GivenModel = nn.Module | Callable[..., nn.Module] | str


def build(
    name: GivenModel,
    input_shape: tuple[int, ...],
    num_classes: int,
    args: dict[str, Any],
    *,
    vocabulary: int = 0,
    output_shape: tuple[int, ...] | None = None,
) -> nn.Module:
    """Builds a model by name, import path or factory, or copies a module; `auto` chooses by shape.

    The caller seeds PyTorch.

    Args:
        num_classes: the size of the outputs' last dimension.
        vocabulary: the number of tokens; 0 if inputs are not tokens. Factories may take it.
        output_shape: of one sample's outputs; None: (num_classes,).
    Raises:
        ConfigError: the model does not exist, or does not fit the data.
    """
    if isinstance(name, str):
        name = resolve_name(name, input_shape, vocabulary)
    output_shape = output_shape or (num_classes,)
    if isinstance(name, str) and name.startswith("torchvision:"):
        module: Any = build_torchvision(name.removeprefix("torchvision:"), input_shape, num_classes, args)
    else:
        factory = parts.find("model.name", name, MODELS) if isinstance(name, str) else name
        if isinstance(factory, nn.Module):
            if args:
                raise ConfigError("model.args: a module takes none; name the function that builds it, or remove them")
            module = copied(factory)
        else:
            offered = {"input_shape": input_shape, "num_classes": num_classes, "vocabulary": vocabulary}
            module = parts.call("model.name", factory, offered | {"positions": len(output_shape) > 1}, args)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model.name: returned a {type(module).__name__}, not a torch.nn.Module")
    check_output(module, input_shape, output_shape, vocabulary)
    return module


def check_output(
    module: nn.Module, input_shape: tuple[int, ...], output_shape: tuple[int, ...], vocabulary: int = 0
) -> None:
    """Raises ConfigError unless the model returns outputs of the right shape."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            output: Any = module(example(input_shape, vocabulary))
    except Exception as exc:  # a user's model may raise anything
        raise ConfigError(f"model.name: fails on inputs of shape {input_shape}: {type(exc).__name__}: {exc}") from exc
    finally:
        module.train(was_training)
    require_logits(output)
    if output.shape != (2, *output_shape):
        raise ConfigError(
            f"model.name: returns {tuple(output.shape)} for 2 samples, but the data's {output_shape[-1]} "
            f"{'tokens' if vocabulary else 'classes'} need {(2, *output_shape)}"
        )


def require_logits(output: Any) -> None:
    """Raises ConfigError unless a model's output is one floating-point tensor."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return
    what = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ConfigError(
        f"model.name: the model's forward pass returns {what}; it must return one float tensor of shape (samples, "
        "classes): wrap the model in a module that returns its logits"
    )
