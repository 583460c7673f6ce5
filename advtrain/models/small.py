"""Small networks: `mlp`, `cnn2` (Wong et al. 2020, MNIST) and `cnn4` (SmallCNN of TRADES, Zhang et al. 2019)."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from advtrain.lookup import UserError
from advtrain.models.conv import Conv2d, FirstConv2d, FlatLinear

Shape = tuple[int, ...]  # of one sample, (C, H, W)


def mlp(shape: Shape, num_classes: int, *, width: int = 256, depth: int = 2) -> nn.Module:
    """Fully connected ReLU network with `depth` hidden layers of `width` units."""
    layers: list[nn.Module] = [nn.Flatten()]
    units = prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(units, width), nn.ReLU(inplace=True)]
        units = width
    return nn.Sequential(*layers, nn.Linear(units, num_classes))


def cnn2(shape: Shape, num_classes: int, *, width: int = 16) -> nn.Module:
    """Two strided 4x4 convolutions of `width` and 2 `width` channels, then 100 units (arXiv 2001.03994)."""
    features = nn.Sequential(
        FirstConv2d(shape[0], width, 4, stride=2, padding=1),
        nn.ReLU(inplace=True),
        Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(inplace=True),
    )
    maps = _map_shape("cnn2", features, shape)
    return nn.Sequential(features, FlatLinear(maps, 100), nn.ReLU(inplace=True), nn.Linear(100, num_classes))


def cnn4(shape: Shape, num_classes: int, *, dropout: float = 0.5) -> nn.Module:
    """Convolutions 32-32-pool-64-64-pool (3x3, no padding), units 200-200 (arXiv 1901.08573, SmallCNN).

    As published: dropout behind the first hidden layer, Kaiming initialisation of the convolutions, and a
    last layer that starts at zero.
    """
    features = nn.Sequential(
        FirstConv2d(shape[0], 32, 3),
        nn.ReLU(inplace=True),
        Conv2d(32, 32, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        Conv2d(32, 64, 3),
        nn.ReLU(inplace=True),
        Conv2d(64, 64, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
    maps = _map_shape("cnn4", features, shape)
    last = nn.Linear(200, num_classes)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    hidden = nn.Sequential(
        FlatLinear(maps, 200), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(200, 200), nn.ReLU()
    )
    return nn.Sequential(features, hidden, last)


def _map_shape(name: str, features: nn.Module, shape: Shape) -> Shape:
    try:
        with torch.no_grad():
            return tuple(features(torch.zeros(1, *shape)).shape[1:])
    except RuntimeError as error:
        raise UserError(
            f"model '{name}' needs larger images than {shape[1]}x{shape[2]}: "
            "use 'cnn2' or 'mlp' for small ones"
        ) from error
