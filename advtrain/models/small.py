"""Small networks: `mlp`, `cnn2` and `cnn4`.

`cnn2` is the MNIST network of Wong et al. 2020, `cnn4` is SmallCNN of TRADES (Zhang et al. 2019).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from advtrain.errors import UserError

Shape = tuple[int, ...]  # shape of one sample, (C, H, W)


def mlp(shape: Shape, num_classes: int, *, width: int = 256, depth: int = 2) -> nn.Module:
    """Build a fully connected ReLU network with `depth` hidden layers of `width` units."""
    layers: list[nn.Module] = [nn.Flatten()]
    units = prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(units, width), nn.ReLU(inplace=True)]
        units = width
    return nn.Sequential(*layers, nn.Linear(units, num_classes))


def cnn2(shape: Shape, num_classes: int, *, width: int = 16) -> nn.Module:
    """Build two strided 4x4 convolutions of `width` and 2 `width` channels, then 100 units.

    Wong et al. 2020, arXiv 2001.03994.
    """
    features = nn.Sequential(
        nn.Conv2d(shape[0], width, 4, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
    )
    hidden = _hidden_layer("cnn2", features, shape, 100)
    return nn.Sequential(features, hidden, nn.ReLU(inplace=True), nn.Linear(100, num_classes))


def cnn4(shape: Shape, num_classes: int, *, dropout: float = 0.5) -> nn.Module:
    """Build convolutions 32-32-pool-64-64-pool (3x3, no padding) and hidden layers 200-200.

    SmallCNN of arXiv 1901.08573. As published: dropout after the first hidden layer, Kaiming initialization of the
    convolutions, and a last layer initialized to zero.
    """
    features = nn.Sequential(
        nn.Conv2d(shape[0], 32, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    first = _hidden_layer("cnn4", features, shape, 200)
    last = nn.Linear(200, num_classes)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    hidden = nn.Sequential(first, nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(200, 200), nn.ReLU())
    return nn.Sequential(features, hidden, last)


def _hidden_layer(name: str, features: nn.Module, shape: Shape, units: int) -> nn.Linear:
    """Return the linear layer after `features`, which also loads weights of earlier versions."""
    try:
        with torch.no_grad():
            num_features = features(torch.zeros(1, *shape)).shape[1]
    except RuntimeError as error:
        raise UserError(
            f"model '{name}' needs larger images than {shape[1]}x{shape[2]}: "
            "use 'cnn2' or 'mlp' for small ones"
        ) from error
    layer = nn.Linear(num_features, units)
    layer.register_load_state_dict_pre_hook(_load_in_channel_order)  # type: ignore[no-untyped-call]
    return layer


def _load_in_channel_order(layer: nn.Linear, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if (weight := state_dict.get(prefix + "weight")) is not None:
        state_dict[prefix + "weight"] = in_channel_order(weight, layer.weight)


def in_channel_order(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a weight (units, H W, channels) of earlier versions as (units, channels H W).

    Any other tensor is returned unchanged.
    """
    if tensor.dim() == 3 and like.dim() == 2 and tensor.flatten(1).shape == like.shape:
        return tensor.transpose(1, 2).flatten(1)
    return tensor
