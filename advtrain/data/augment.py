"""Random crop and flip of a whole batch at once, on 8-bit tensors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from advtrain.schema import Config, Number


class AugmentConfig(Config):
    """What happens to a training image before it is attacked."""

    crop: int = Field(default=0, ge=0)
    """pixels of zero padding from which a window of the image's size is cropped (CIFAR: 4); 0: no crop"""
    flip: bool = False
    """mirror half of the images left to right"""
    resized_crop: Number | None = Field(default=None, gt=0, le=1)
    """streamed data: smallest share of an image's area in its random resized crop (ImageNet: 0.08); null: off"""


def augment(
    x: Tensor,  # (n, C, H, W), any dtype: rows offset .. offset + n of a global batch
    config: AugmentConfig,
    seed: list[int],
    offset: int,
    total: int,
) -> Tensor:  # (n, C, H, W)
    """Crop and mirror each image by its own draw.

    The draws are those of the global batch of `total` rows, so a sample is cropped and mirrored in the same
    way whichever worker holds it.
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
