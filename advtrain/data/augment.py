"""Random crop and flip of a whole batch at once, on 8-bit tensors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from advtrain.schema import Config, Number


class AugmentConfig(Config):
    """Augmentation of training images before the attack."""

    crop: int = Field(default=0, ge=0)
    """zero padding in pixels before a random crop to the original size (CIFAR: 4); 0: no crop"""
    flip: bool = False
    """flip each image horizontally with probability 1/2"""
    resized_crop: Number | None = Field(default=None, gt=0, le=1)
    """smallest area share of the random resized crop of streamed images (ImageNet: 0.08); null: off"""


def augment(
    x: Tensor,  # (n, C, H, W), any dtype: rows offset .. offset + n of a global batch
    config: AugmentConfig,
    seed: list[int],
    offset: int,
    total: int,
) -> Tensor:  # (n, C, H, W)
    """Randomly crop and flip each image of a batch.

    The random numbers are drawn for the global batch of `total` rows, so a sample is augmented in the same way on any
    worker.
    """
    if not config.crop and not config.flip:
        return x
    rng = np.random.default_rng(seed)
    n, channels, height, width = x.shape
    shift = rng.integers(0, 2 * config.crop + 1, size=(total, 2))[offset : offset + n]
    mirrored = rng.random(total)[offset : offset + n] < (0.5 if config.flip else 0.0)
    rows = shift[:, :1] + np.arange(height)
    columns = np.arange(width)
    columns = shift[:, 1:] + np.where(mirrored[:, None], columns[::-1], columns)
    padded = F.pad(x, [config.crop] * 4)
    row_index = torch.from_numpy(rows).to(x.device)
    column_index = torch.from_numpy(columns).to(x.device)
    return padded[
        torch.arange(n, device=x.device).view(n, 1, 1, 1),
        torch.arange(channels, device=x.device).view(1, channels, 1, 1),
        row_index.view(n, 1, height, 1),
        column_index.view(n, 1, 1, width),
    ]
