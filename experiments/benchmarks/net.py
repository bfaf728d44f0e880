"""What every contender trains: the models, the shards and the plain PyTorch loop. Needs torch and numpy alone, as it
is imported in environments that do not have fedlq_ray."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Cnn(nn.Module):
    """W1: conv 5x5x16 - pool - conv 5x5x32 - pool - fc 256 - fc 10: 147,146 parameters on 28x28x1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(512, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.pool(self.conv1(x)))
        x = torch.relu(self.pool(self.conv2(x))).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, after), nn.GroupNorm(8, after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


def resnet8_gn() -> nn.Module:
    """W3: ResNet-8 with GroupNorm on 32x32x3."""
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


MODELS = {"cnn": Cnn, "resnet8_gn": resnet8_gn}


class Work:
    """What is to be done, as `workloads.export` wrote it into a folder.

    Attributes:
        settings: model, lr, batch_size, rounds, cores.
        shards: each client's indices; cohorts: the clients of each round, (rounds, cohort).
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.x = np.load(folder / "x.npy", mmap_mode="r")  # one copy for all processes
        arrays = np.load(folder / "rest.npz")
        self.y, self.mean, self.std, self.cohorts = (arrays[name] for name in ("y", "mean", "std", "cohorts"))
        self.shards = np.split(arrays["order"], arrays["ends"][:-1])

    def model(self) -> nn.Module:
        return MODELS[self.settings["model"]]().to(memory_format=torch.channels_last)

    def shard(self, client: int) -> tuple[Tensor, Tensor]:
        """A client's inputs (n, channels, height, width) float32, channels_last, and labels (n,) int64."""
        chosen = self.shards[client]
        x = torch.from_numpy((self.x[chosen].astype(np.float32) - self.mean) / self.std).permute(0, 3, 1, 2)
        return x, torch.from_numpy(self.y[chosen])


@cache
def work(folder: str) -> Work:
    """It, read once a process."""
    return Work(folder)


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float, batch_size: int) -> None:
    """One epoch of SGD, as one writes it in PyTorch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in torch.randperm(len(y)).split(batch_size):
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
