"""Convolutions with fast gradients of the input, which attacks need, and of those gradients, which regularisers need.

They are plain `nn.Conv2d` and `nn.Linear`: same outputs and gradients, and the same parameters but for the shape of
`FlatLinear`'s. What differs is how long torch takes.

- The gradient of the image (`FirstConv2d`): on a CPU, oneDNN pads the 1 to 3 channels of an image to 8 lanes, and
  for the small nets spends a third of an attack step there. A matrix product whose rows are added where they meet
  takes a fifth to a half of the time.
- Narrow, strided layers, as `cnn2` has. Passes without gradients take up to a tenth less in NCHW order, in which oneDNN
  has a kernel for images of one channel; gradients do not. For the gradient of the input see `_by_blocks`.
- The gradient of a gradient: torch writes a convolution's second derivative as a convolution of transposed tensors
  with kernels as large as the image, far from what its kernels are tuned for. Written as one more forward and one
  more weight gradient, a step of double back-propagation takes a third less (`make bench`).
- The layer behind them (`FlatLinear`): flattened, activations in NHWC (channels_last) order are copied into NCHW order,
  and their gradient comes back in it, which every operator below mixes with the other, slowly, a ReLU four times so.
  Here weights and activations lie in the same order, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]

#: Numbers in an input from which on rearranged weights pay.
MANY = 2**15

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


def plain_pass(device: str) -> bool:
    """Whether a pass is eager and not in mixed precision, which has kernels of its own."""
    return _eager() and not torch.is_autocast_enabled(device)


def plain_gradients() -> bool:
    """Whether gradients are neither to be differentiated again nor left out in part."""
    return not (_twice or _only_input)


class Conv2d(nn.Conv2d):
    """nn.Conv2d with zero padding in pixels, one group and no dilation, as the networks here use it.

    Raises ValueError for anything else.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        zeros = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not zeros or self.groups != 1 or self.dilation != (1, 1):
            raise ValueError("only zero padding in pixels, one group and no dilation; else take nn.Conv2d")

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H', W')."""
        narrow = x.is_cpu and _narrow(x, self.kernel_size, self.stride)
        if narrow and not torch.is_grad_enabled() and x.is_contiguous() and plain_pass(x.device.type):
            return self._in_nchw(x)
        by_blocks = narrow and x.requires_grad and self._frozen() and _many(x)
        if (_twice or by_blocks) and plain_pass(x.device.type):
            return self._convolve(x, image=False)
        return super().forward(x)

    def _in_nchw(self, x: Tensor) -> Tensor:
        # with one channel, the strides of either order say the same, but not to torch
        x = x.flatten().view(x.shape)
        weight = self.weight.clone(memory_format=torch.contiguous_format)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    def _frozen(self) -> bool:
        weight = self._parameters.get("weight")  # a parametrised one would be made once more
        return weight is not None and not weight.requires_grad

    def _convolve(self, x: Tensor, image: bool) -> Tensor:
        out: Tensor = _Conv.apply(x, self.weight, self.bias, self.stride, self.padding, image)
        return out


class FirstConv2d(Conv2d):
    """The same, for layers that see the image."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K, H', W')."""
        if x.is_cpu and x.dim() == 4 and x.requires_grad and plain_pass(x.device.type):
            return self._convolve(x, image=True)
        return super().forward(x)


class FlatLinear(nn.Linear):
    """nn.Linear of all values of a sample, with weights (K, H W, C) in place of (K, C H W).

    Those of an nn.Linear are taken when loaded. (K, C, H, W) in NHWC order would do as well, but the fused optimizers
    copy gradients in that order.
    """

    def __init__(self, shape: tuple[int, ...], units: int) -> None:
        """Make the layer for samples of this shape (C, H, W)."""
        super().__init__(prod(shape), units)
        self.channels = shape[0]
        self.weight = nn.Parameter(self._by_pixels(self.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K)."""
        if _eager() and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            return F.linear(x.permute(0, 2, 3, 1).flatten(1), self.weight.flatten(1), self.bias)
        return F.linear(x.flatten(1), self.plain_weight(), self.bias)

    def plain_weight(self) -> Tensor:
        """Return the weights (K, C H W) as an nn.Linear has them."""
        return self.weight.transpose(1, 2).flatten(1)

    def _by_pixels(self, weight: Tensor) -> Tensor:
        return weight.view(len(weight), self.channels, -1).transpose(1, 2).contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        flat = state_dict.get(prefix + "weight")
        if flat is not None and flat.shape == (self.out_features, self.in_features):
            state_dict[prefix + "weight"] = self._by_pixels(flat)
        super()._load_from_state_dict(state_dict, prefix, *args)


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
    """Return the gradients of input, weight and bias that are `wanted`."""
    for_x = _input_gradient(g, x, weight, stride, padding, image) if wanted[0] else None
    wanted = [wanted[0] and for_x is None, *wanted[1:]]
    if not any(wanted):
        return for_x, None, None
    sizes = [len(weight)] if bias else None
    by_torch, for_weight, for_bias = torch.ops.aten.convolution_backward(
        g, x, weight, sizes, stride, padding, (1, 1), False, (0, 0), 1, wanted
    )
    return by_torch if for_x is None else for_x, for_weight, for_bias


def _input_gradient(
    g: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, image: bool
) -> Tensor | None:
    """Return the gradient of x by blocks, or of an image by taps or as fold(W^T g); None where torch's is faster."""
    kernel, arguments = weight.shape[2:], (g, weight, x.shape[2:], stride, padding)
    in_nhwc = g.is_cpu and g.is_contiguous(memory_format=torch.channels_last)
    if in_nhwc and _narrow(x, kernel, stride) and _many(x):
        found = _by_blocks(*arguments)
        return found.contiguous() if image else found
    if not image:
        return None
    few_taps = prod(kernel) <= prod(stride) * prod(g.shape[2:])
    if in_nhwc and _divides(stride, kernel) and few_taps and x.numel() >= MANY:
        return _by_taps(*arguments)
    columns = weight.flatten(1).t() @ g.flatten(2)  # (N, C k k, H' W')
    return F.fold(columns, x.shape[2:], kernel, padding=padding, stride=stride)


def _divides(stride: Sequence[int], kernel: Sequence[int]) -> bool:
    return not any(k % s for k, s in zip(kernel, stride, strict=True))


def _narrow(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether x (N, C, H, W) has few channels and goes through strides that divide the kernel."""
    return max(stride) > 1 and _divides(stride, kernel) and x.dim() == 4 and x.shape[1] <= 16


def _many(x: Tensor) -> bool:
    """Whether blocks pay: one channel is too few for oneDNN's 16 lanes, and each pass rearranges the weights."""
    return x.shape[1] > 1 and x.numel() >= MANY


def _taps(weight: Tensor, stride: Pair) -> Tensor:
    """Return the weights (K, C, k, k') as (K, C, T, T', s, s'): row s t + r of the kernel is tap t of row r."""
    return weight.unfold(2, stride[0], stride[0]).unfold(3, stride[1], stride[1])


def _by_blocks(g: Tensor, weight: Tensor, size: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """Return the gradient (N, C, H, W) of an input of this size, from g (N, K, H', W'), that of the output.

    Along a side, with a stride s that divides the kernel, pixel s u + r of the padded input (r < s) has its part in
    output u - t through row r + s t of the kernel. So a block of s x s' pixels sees the same outputs, each pixel
    through taps of its own: a convolution without strides, with a channel for each pixel of a block. With oneDNN it
    takes 10 to 20 % less than the gradient of the strided one, for up to 16 channels and from some ten images on.
    """
    (n, filters), channels, kernel = g.shape[:2], weight.shape[1], weight.shape[2:]
    taps = _taps(weight, stride).flip(2, 3).permute(4, 5, 1, 0, 2, 3)
    taps = taps.reshape(stride[0] * stride[1] * channels, filters, *taps.shape[4:])
    sides = tuple(zip(size, g.shape[2:], kernel, stride, padding, strict=True))
    # as far as the first block needs it, or the last; the input begins `begin` pixels within the blocks
    pad = [max(k // s - 1, -(-(p + length) // s) - outputs) for length, outputs, k, s, p in sides]
    begin = [p + s * (extra + 1) - k for extra, (_, _, k, s, p) in zip(pad, sides, strict=True)]
    found = F.conv2d(g, taps, None, 1, pad).permute(0, 2, 3, 1)
    rows, columns = found.shape[1:3]
    pixels = found.reshape(n, rows, columns, stride[0], stride[1] * channels).transpose(2, 3)
    pixels = pixels.reshape(n, rows * stride[0], columns * stride[1], channels).permute(0, 3, 1, 2)
    return pixels[:, :, begin[0] : begin[0] + size[0], begin[1] : begin[1] + size[1]]


def _by_taps(g: Tensor, weight: Tensor, size: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """Return the gradient (N, C, H, W) of an image of this size, from g (N, K, H', W'), that of the output.

    What fold does, for strides that divide the kernel. One matrix product gives for each tap of the kernel what it
    adds, as a plane (N, H', W'), and the planes are added where they meet. fold goes from sample to sample and adds
    on one core: for 3x3 kernels and 4x4 in strides of 2 it takes as long to 1.5 times as long on one core, and up to
    1.9 times on two.
    """
    (n, filters, height, width), channels = g.shape, weight.shape[1]
    taps = _taps(weight, stride).permute(2, 3, 1, 4, 5, 0)  # (T, T', C, s, s', K)
    deep, wide = taps.shape[:2]
    planes = taps.reshape(-1, filters) @ g.permute(0, 2, 3, 1).reshape(-1, filters).t()
    planes = planes.view(deep, wide, channels * prod(stride), n, height, width)
    rows, columns = height + deep - 1, width + wide - 1
    found = g.new_zeros(planes.shape[2], n, rows, columns)
    for t in range(deep):
        for u in range(wide):
            found[:, :, t : t + height, u : u + width].add_(planes[t, u])  # += would copy the sum onto itself
    found = found.view(channels, *stride, n, rows, columns).permute(3, 0, 4, 1, 5, 2)
    pixels = found.reshape(n, channels, rows * stride[0], columns * stride[1])
    # without the padding; pixels behind the last window get 0
    ends = [p + length - have for p, length, have in zip(padding, size, pixels.shape[2:], strict=True)]
    return F.pad(pixels, (-padding[1], ends[1], -padding[0], ends[0])).contiguous()


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
