"""Residual networks for 32x32 images: pre-activation ResNet-18 and WideResNet.

He et al. 2016 (arXiv 1603.05027) and Zagoruyko & Komodakis 2016 (arXiv 1605.07146), as the robustness
literature uses them: a 3x3 stem without pooling, global average pooling at the end.
"""

from __future__ import annotations

from torch import Tensor, nn

from advtrain.errors import find
from advtrain.models.small import Shape

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class PreActBlock(nn.Module):
    """Block `x + conv(act(bn(conv(act(bn(x))))))`.

    Where shapes change, the shortcut is a 1x1 convolution.
    """

    def __init__(self, num_in: int, num_out: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_in)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.act = activation()
        changes = stride != 1 or num_in != num_out
        self.shortcut = nn.Conv2d(num_in, num_out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, num_in, H, W) to (N, num_out, H / stride, W / stride)."""
        out = self.act(self.norm1(x))
        skip: Tensor = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.act(self.norm2(self.conv1(out))))
        result: Tensor = skip + out
        return result


def _residual(
    shape: Shape, num_classes: int, widths: list[int], blocks: int, stem: int, activation: str
) -> nn.Module:
    """Build stages of `blocks` pre-activation blocks; all but the first halve the resolution."""
    act = find(ACTIVATIONS, activation, "activation")
    layers: list[nn.Module] = [nn.Conv2d(shape[0], stem, 3, 1, 1, bias=False)]
    channels = stem
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(PreActBlock(channels, width, 2 if stage > 0 and block == 0 else 1, act))
            channels = width
    head = [nn.BatchNorm2d(channels), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = nn.Sequential(*layers, *head, nn.Linear(channels, num_classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def preact_resnet18(shape: Shape, num_classes: int, *, activation: str = "relu") -> nn.Module:
    """Build ResNet-18 with pre-activation blocks: four stages of two blocks, 64 to 512 channels."""
    return _residual(shape, num_classes, [64, 128, 256, 512], 2, 64, activation)


def wide_resnet(
    shape: Shape, num_classes: int, *, depth: int = 34, width: int = 10, activation: str = "relu"
) -> nn.Module:
    """Build WRN-depth-width.

    It has three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 with n >= 1 (10, 16, 28, 34, 70, ...), not {depth}")
    return _residual(
        shape, num_classes, [16 * width, 32 * width, 64 * width], (depth - 4) // 6, 16, activation
    )
