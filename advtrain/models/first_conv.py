"""A first convolution with a fast gradient of its input, which an attack needs at every step.

On a CPU, oneDNN pads the 1 to 3 channels of an image to 8 lanes, and for the small nets spends a third of an
attack step there. The input gradient of a convolution is a matrix product followed by a fold (col2im);
written so, it takes a fifth of the time (`make bench` prints both).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FirstConv2d(nn.Conv2d):
    """nn.Conv2d, for layers that see the image: same parameters, same outputs, same gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H', W')."""
        if (
            x.is_cpu
            and x.requires_grad
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        ):
            out: Tensor = _FoldedGradient.apply(x, self.weight, self.bias, self.stride, self.padding)
            return out
        return super().forward(x)


class _FoldedGradient(torch.autograd.Function):
    """Convolution whose input gradient is fold(W^T g). Every operation is differentiable again."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        context.save_for_backward(x, weight)
        context.has_bias, context.stride, context.padding = bias is not None, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients  # (N, K, H', W')
        x, weight = context.saved_tensors
        for_x = for_weight = for_bias = None
        if context.needs_input_grad[0]:
            columns = weight.flatten(1).t() @ g.flatten(2)  # (N, C k k, H' W')
            for_x = F.fold(
                columns, x.shape[2:], weight.shape[2:], padding=context.padding, stride=context.stride
            )
        if any(context.needs_input_grad[1:3]):
            _, for_weight, for_bias = torch.ops.aten.convolution_backward(
                g,
                x,
                weight,
                [len(weight)] if context.has_bias else None,
                context.stride,
                context.padding,
                (1, 1),
                False,
                (0, 0),
                1,
                [False, context.needs_input_grad[1], context.needs_input_grad[2]],
            )
        return for_x, for_weight, for_bias, None, None
