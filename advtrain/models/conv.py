"""Convolutions with fast gradients of the input, which attacks need, and of those gradients, which regularisers need.

They are plain `nn.Conv2d` and `nn.Linear`: same parameters, outputs and gradients. What differs is how long torch
takes.

- The gradient of the image (`FirstConv2d`): on a CPU, oneDNN pads the 1 to 3 channels of an image to 8 lanes, and
  for the small nets spends a third of an attack step there. A matrix product followed by a fold (col2im) takes a
  fifth of the time.
- The gradient of a gradient: torch writes a convolution's second derivative as a convolution of transposed tensors
  with kernels as large as the image, far from what its kernels are tuned for. Written as one more forward and one
  more weight gradient, a step of double back-propagation takes a third less (`make bench`).
- The layer behind them (`FlatLinear`): flattened, activations in NHWC (channels_last) order are copied into NCHW order,
  and their gradient comes back in it, which every operator below mixes with the other, slowly, a ReLU four times so.
  Here the weights are put in NHWC order instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_twice = False
_only_input = False


@contextmanager
def twice_differentiable(wanted: bool = True) -> Iterator[None]:
    """Inside, forward passes are made so that gradients of their gradients are fast."""
    global _twice
    before, _twice = _twice, wanted
    try:
        yield
    finally:
        _twice = before


@contextmanager
def only_input_gradients() -> Iterator[None]:
    """Inside, backward passes with a graph leave out the weights' gradients, a third of the pass.

    `torch.autograd.grad` tells its own operators which gradients are asked for, but not a function in Python.
    """
    global _only_input
    before, _only_input = _only_input, True
    try:
        yield
    finally:
        _only_input = before


def _eager() -> bool:
    """Whether a pass is neither compiled nor under torch.func, which takes no function that is not written for it."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def _plain(x: Tensor) -> bool:
    """Whether a pass is eager and not in mixed precision, which has kernels of its own."""
    return _eager() and not torch.is_autocast_enabled(x.device.type)


class Conv2d(nn.Conv2d):
    """nn.Conv2d with zero padding, one group and no dilation, as the networks here use it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H', W')."""
        return self._convolve(x, fold=False) if _twice and _plain(x) else super().forward(x)

    def _convolve(self, x: Tensor, fold: bool) -> Tensor:
        out: Tensor = _Conv.apply(x, self.weight, self.bias, self.stride, self.padding, fold)
        return out


class FirstConv2d(Conv2d):
    """The same, for layers that see the image."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H', W')."""
        if x.is_cpu and x.requires_grad and _plain(x):
            return self._convolve(x, fold=True)
        return super().forward(x)


class FlatLinear(nn.Linear):
    """nn.Linear of all values of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) or (N, F) to (N, K)."""
        nhwc = _eager() and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        if not nhwc:
            return super().forward(x.flatten(1))
        weight = self.weight.view(-1, *x.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), weight, self.bias)


def _gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: bool,
    stride: Any,
    padding: Any,
    wanted: list[bool],
    fold: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias that are `wanted`; with `fold` the input's as fold(W^T g)."""
    for_x = None
    if fold and wanted[0]:
        columns = weight.flatten(1).t() @ g.flatten(2)  # (N, C k k, H' W')
        for_x = F.fold(columns, x.shape[2:], weight.shape[2:], padding=padding, stride=stride)
        wanted = [False, *wanted[1:]]
    if not any(wanted):
        return for_x, None, None
    sizes = [len(weight)] if bias else None
    by_torch, for_weight, for_bias = torch.ops.aten.convolution_backward(
        g, x, weight, sizes, stride, padding, (1, 1), False, (0, 0), 1, wanted
    )
    return by_torch if for_x is None else for_x, for_weight, for_bias


class _Conv(torch.autograd.Function):
    """Convolution whose backward pass is `_ConvBackward`, which can be differentiated."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        fold: bool,
    ) -> Tensor:
        context.save_for_backward(x, weight)
        context.settings = (bias is not None, stride, padding)
        context.fold = fold
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = context.saved_tensors
        wanted = list(context.needs_input_grad[:3])
        if _only_input:
            wanted[1:] = [False, False]
        arguments = (gradients[0], x, weight, *context.settings, wanted, context.fold)
        found = _ConvBackward.apply(*arguments) if torch.is_grad_enabled() else _gradients(*arguments)
        return (*found, None, None, None)


class _ConvBackward(torch.autograd.Function):
    """(g, x, w) -> (gx, gw, gb): gx = g * w transposed, gw = x correlated with g, gb = the sum of g.

    Its own gradients, with hx, hw and hb what comes back for gx, gw and gb:
    for g: conv(hx, w) + conv(x, hw) + hb;  for w: hx correlated with g;  for x: g * hw transposed.
    """

    @staticmethod
    def forward(
        context: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: bool,
        stride: Any,
        padding: Any,
        wanted: list[bool],
        fold: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        context.save_for_backward(g, x, weight)
        context.settings, context.fold = (stride, padding), fold
        context.set_materialize_grads(False)
        return _gradients(g, x, weight, bias, stride, padding, wanted, fold)

    @staticmethod
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight = context.saved_tensors
        stride, padding = context.settings
        hx, hw, hb = gradients
        for_g = for_x = for_weight = None
        if context.needs_input_grad[0]:
            parts = [F.conv2d(hx, weight, None, stride, padding)] if hx is not None else []
            parts += [F.conv2d(x, hw, None, stride, padding)] if hw is not None else []
            parts += [hb.view(1, -1, 1, 1).expand_as(g)] if hb is not None else []
            for_g = sum(parts[1:], parts[0]) if parts else None
        if context.needs_input_grad[1] and hw is not None:
            wanted = [True, False, False]
            for_x, _, _ = _gradients(g, x, hw, False, stride, padding, wanted, context.fold)
        if context.needs_input_grad[2] and hx is not None:
            wanted = [False, True, False]
            _, for_weight, _ = _gradients(g, hx, weight, False, stride, padding, wanted, context.fold)
        return for_g, for_x, for_weight, None, None, None, None, None
