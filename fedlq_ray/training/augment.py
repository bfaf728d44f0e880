"""Random changes of training images (`train.augment`)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedlq_ray.errors import ConfigError

PAD = 4  # pixels; as is usual for CIFAR (He et al., CVPR 2016, section 4.2)


def require_images(how: str, shape: tuple[int, ...]) -> None:
    """Raises ConfigError unless samples of this shape, channels first, are images at least as large as the padding."""
    if how != "none" and (len(shape) != 3 or min(shape[1:]) <= PAD):
        raise ConfigError(
            f"train.augment={how} is for images of more than {PAD} x {PAD} pixels; a sample here has the shape {shape}"
        )


def augmented(images: Tensor, how: str, rng: np.random.Generator) -> Tensor:
    """Flips half of the images left and right, and shifts each by up to `PAD` pixels, as `how` says.

    Pixels from beyond the border are zero, which is the mean of normalised images.

    Args:
        images: (n, channels, height, width), float32.
        how: flip, crop or flip_crop.
    """
    n, channels, height, width = images.shape
    if "flip" in how:
        turned = torch.from_numpy(rng.random(n) < 0.5).to(images.device)
        images = torch.where(turned[:, None, None, None], images.flip(3), images)
    if "crop" in how:
        top, left = (torch.from_numpy(rng.integers(0, 2 * PAD + 1, n)).to(images.device) for _ in range(2))
        rows = top[:, None] + torch.arange(height, device=images.device)
        columns = left[:, None] + torch.arange(width, device=images.device)
        every = torch.arange(n, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        images = F.pad(images, (PAD,) * 4)[every, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return images.contiguous(memory_format=torch.channels_last)
