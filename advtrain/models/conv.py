"""Convolutions with fast gradients of the input, which attacks need, and of those gradients, which regularisers need.

They are plain `nn.Conv2d` and `nn.Linear`: same parameters, outputs and gradients. What differs is how long torch
takes.

- The gradient of the image (`FirstConv2d`): on a CPU, oneDNN pads the 1 to 3 channels of an image to 8 or 16 lanes, and
  for the small nets spends a third of an attack step there. The gradient of a block of pixels is a convolution of the
  layer's gradient too, with a channel for each pixel of the block, and fills the lanes.
- The gradient of a gradient: torch writes a convolution's second derivative as a convolution of transposed tensors
  with kernels as large as the image, far from what its kernels are tuned for. Written as one more forward and one
  more weight gradient, a step of double back-propagation takes a third less (`make bench`).
- The layer behind them (`FlatLinear`): flattened, activations in NHWC (channels_last) order are copied into NCHW order,
  and their gradient comes back in it, which every operator below mixes with the other, slowly, a ReLU four times so.
  Here the weights are put in NHWC order instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]

_twice = False
_only_input = False
_made: dict[Any, Tensor] | None = None


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


@contextmanager
def constant_weights() -> Iterator[None]:
    """Inside no weight changes: what layers make of theirs they make once."""
    global _made
    before, _made = _made, {}
    try:
        yield
    finally:
        _made = before


def _make(make: Callable[..., Tensor], weight: Tensor, *how: Any) -> Tensor:
    """Return make(weight, *how); inside `constant_weights` the same again."""
    if _made is None or weight.requires_grad:
        return make(weight, *how)
    key = (make, weight, weight._version, *how)
    if key not in _made:
        _made[key] = make(weight, *how)
    return _made[key]


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
        return self._convolve(x, image=False) if _twice and _plain(x) else super().forward(x)

    def _convolve(self, x: Tensor, image: bool) -> Tensor:
        out: Tensor = _Conv.apply(x, self.weight, self.bias, self.stride, self.padding, image)
        return out


class FirstConv2d(Conv2d):
    """The same, for layers that see the image."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H', W')."""
        if x.is_cpu and x.requires_grad and _plain(x):
            return self._convolve(x, image=True)
        return super().forward(x)


class FlatLinear(nn.Linear):
    """nn.Linear of all values of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) or (N, F) to (N, K)."""
        nhwc = _eager() and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        if not nhwc:
            return super().forward(x.flatten(1))
        weight = _make(_in_nhwc, self.weight, x.shape[1:])
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), weight, self.bias)


def _in_nhwc(weight: Tensor, shape: torch.Size) -> Tensor:
    """Return weights (K, C H W) of activations of shape (C, H, W) in NHWC order, (K, H W C)."""
    return weight.view(-1, *shape).permute(0, 2, 3, 1).flatten(1)


def _gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: bool,
    stride: Any,
    padding: Any,
    wanted: list[bool],
    image: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias that are `wanted`; the input's by blocks if it is an `image`."""
    for_x = None
    if image and wanted[0]:
        for_x = _gradient_by_blocks(g, x, weight, stride, padding)
        wanted = [False, *wanted[1:]]
    if not any(wanted):
        return for_x, None, None
    sizes = [len(weight)] if bias else None
    by_torch, for_weight, for_bias = torch.ops.aten.convolution_backward(
        g, x, weight, sizes, stride, padding, (1, 1), False, (0, 0), 1, wanted
    )
    return by_torch if for_x is None else for_x, for_weight, for_bias


def _gradient_by_blocks(g: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Return the gradient of the input x (N, C, H, W) from g (N, K, H', W'), that of the output.

    Along a side, pixel r of block u has its part in the outputs (block / stride) u + t for which r + padding - stride t
    lies in the kernel. Which t these are is the same for every block, so one convolution of g gives all of them.
    """
    lanes = 12  # few enough to waste no work, enough to fill most of oneDNN's 16
    channels, size, kernel = x.shape[1], x.shape[2:], weight.shape[2:]
    block = tuple(s * ceil(sqrt(lanes / channels) / s) for s in stride)
    blocks = [ceil(length / b) for length, b in zip(size, block, strict=True)]
    step = [b // s for b, s in zip(block, stride, strict=True)]
    before = [(k - 1 - p) // s for k, p, s in zip(kernel, padding, stride, strict=True)]
    taps = _make(_block_weight, weight, stride, padding, block)
    seen = [(n - 1) * m + t for n, m, t in zip(blocks, step, taps.shape[2:], strict=True)]
    missing = [max(0, s - length - 2 * b) for s, length, b in zip(seen, g.shape[2:], before, strict=True)]
    if any(missing):
        g = F.pad(g, (0, missing[1], 0, missing[0]))
    found = F.conv2d(g, taps, None, step, before)
    pixels = found.view(len(g), *block, channels, *found.shape[2:]).permute(0, 3, 4, 1, 5, 2)
    return pixels.flatten(4).flatten(2, 3)[..., : size[0], : size[1]]


def _block_weight(weight: Tensor, stride: Pair, padding: Pair, block: Pair) -> Tensor:
    """Arrange a kernel (K, C, k, k') for all pixels of a block: (B B' C, K, T, T'), 0 where one is not touched."""

    def places(side: int) -> Tensor:  # (B, T): which row of the kernel pixel r meets in output t; k: none
        k, s, p, b = weight.shape[2 + side], stride[side], padding[side], block[side]
        t = torch.arange(-((k - 1 - p) // s), (b - 1 + p) // s + 1, device=weight.device)
        row = torch.arange(b, device=weight.device)[:, None] + p - s * t
        return torch.where((row >= 0) & (row < k), row, k)

    met = F.pad(weight, (0, 1, 0, 1))[
        :, :, places(0)[:, None, :, None], places(1)[:, None]
    ]  # (K, C, B, B', T, T')
    return met.permute(2, 3, 1, 0, 4, 5).flatten(0, 2).contiguous(memory_format=torch.channels_last)


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
        image: bool,
    ) -> Tensor:
        context.save_for_backward(x, weight)
        context.settings = (bias is not None, stride, padding)
        context.image = image
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = context.saved_tensors
        wanted = list(context.needs_input_grad[:3])
        if _only_input:
            wanted[1:] = [False, False]
        arguments = (gradients[0], x, weight, *context.settings, wanted, context.image)
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
        image: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        context.save_for_backward(g, x, weight)
        context.settings, context.image = (stride, padding), image
        context.set_materialize_grads(False)
        return _gradients(g, x, weight, bias, stride, padding, wanted, image)

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
            for_x, _, _ = _gradients(g, x, hw, False, stride, padding, wanted, context.image)
        if context.needs_input_grad[2] and hx is not None:
            wanted = [False, True, False]
            _, for_weight, _ = _gradients(g, hx, weight, False, stride, padding, wanted, context.image)
        return for_g, for_x, for_weight, None, None, None, None, None
