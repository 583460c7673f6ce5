"""Random crop and flip of a whole batch at once, on 8-bit tensors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from advtrain.recipe.data import AugmentConfig


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
