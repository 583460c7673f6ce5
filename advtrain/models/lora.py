"""LoRA: trained changes of low rank to the fixed weights of an encoder.

Hu et al. 2022, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from advtrain.errors import UserError

#: Setting of `model.args` for the rank; 0 or unset trains all weights.
LORA = "lora"


class LowRankLinear(nn.Linear):
    """Linear layer with fixed weights and a trained change of low rank.

    It maps x to x W^T + b + x A^T B^T, equation 3 of LoRA with the factor alpha / rank = 1, as in its settings for
    RoBERTa. B starts at 0, so a new layer equals the fixed one.

    Args:
        fixed: layer whose weights it has.
        rank: rank of the change, from 1 to the smaller side of the weight.
    """

    def __init__(self, fixed: nn.Linear, rank: int) -> None:
        super().__init__(fixed.in_features, fixed.out_features, fixed.bias is not None, device="meta")
        self.weight, self.bias = fixed.weight, fixed.bias
        self.lora_a = nn.Parameter(fixed.weight.new_empty(rank, fixed.in_features))
        self.lora_b = nn.Parameter(fixed.weight.new_zeros(fixed.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def pop_lora(settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return the rank of LoRA in the settings of a network, or 0, and the other settings.

    Raises:
        UserError: the rank is no whole number from 0.
    """
    others = dict(settings)
    rank = others.pop(LORA, 0)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise UserError(
            f"model.args.{LORA} must be a rank such as 8, or 0 to train all weights, not {rank!r}"
        )
    return rank, others


def add_lora(encoder: nn.Module, rank: int) -> None:
    """Freeze an encoder, and add a trained change of low rank to each of its linear layers.

    Raises:
        UserError: the encoder has no linear layer, or the rank is larger than a side of a weight.
    """
    encoder.requires_grad_(False)
    layers = {name: layer for name, layer in encoder.named_modules() if type(layer) is nn.Linear}
    if not layers:
        raise UserError(f"model.args.{LORA}: the encoder has no linear layer; leave it out")
    most = min(min(layer.weight.shape) for layer in layers.values())
    if rank > most:
        raise UserError(
            f"model.args.{LORA}: the rank {rank} is larger than a weight; it can be {most} at most"
        )
    for name, layer in layers.items():
        encoder.set_submodule(name, LowRankLinear(layer, rank))


def lora_tensors(model: nn.Module) -> set[str]:
    """Return the names of the low-rank factors in `model.state_dict()`."""
    layers = (name for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    return {f"{name}.{factor}" for name in layers for factor in ("lora_a", "lora_b")}
