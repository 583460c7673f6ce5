"""Networks that call the same operators at each pass, and what tells one from another that calls others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from advtrain.models.conv import Conv2d, FirstConv2d, FlatLinear, plain_gradients, plain_pass
from advtrain.models.normalized import Normalized


def _settings(*names: str) -> Callable[[Any], Hashable]:
    return lambda module: tuple(getattr(module, name) for name in names)


_convolution = _settings("stride", "padding", "dilation", "groups", "padding_mode")
#: Modules that call the same operators for the same shapes and settings. These a function gives, or None for a module
#: of which it is not known.
KNOWN: dict[type[nn.Module], Callable[[Any], Hashable | None]] = {
    nn.Sequential: _settings(),
    nn.Flatten: _settings("start_dim", "end_dim"),
    nn.Linear: _settings(),
    nn.Conv2d: _convolution,
    nn.ReLU: _settings("inplace"),
    nn.MaxPool2d: _settings("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: _settings(
        "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    nn.Dropout: lambda module: None if module.training else (),
    Conv2d: _convolution,
    FirstConv2d: _convolution,
    FlatLinear: _settings(),
    Normalized: _settings("identity", "target_scale"),
}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class KnownNetwork:
    """A network as it is now."""

    layers: list[Hashable] = field(default_factory=list)  # those that call other operators have others
    weights: list[Tensor] = field(default_factory=list)  # parameters and buffers
    places: dict[int, int] = field(default_factory=dict)  # id of a weight -> its place among them


def look(network: nn.Module) -> KnownNetwork | None:
    """Return what passes depend on, or None if it is not known that they call the same operators each time."""
    if not (plain_pass("cpu") and plain_gradients()) or torch.is_inference_mode_enabled():
        return None
    # the latter also while a pass is recorded
    if _has_any_global_hook() or torch._C._len_torch_dispatch_stack():  # type: ignore[no-untyped-call]
        return None
    found, waiting = KnownNetwork(), [network]
    seen: dict[int, int] = {}
    while waiting:
        module = waiting.pop()
        if id(module) in seen:  # once more the same
            found.layers.append(seen[id(module)])
            continue
        seen[id(module)] = len(seen)
        held = vars(module)
        settings = _settings_of(module)
        changed = "forward" in held or "_conv_forward" in held or held.get("_compiled_call_impl") is not None
        if settings is None or changed or any(held[hooks] for hooks in _HOOKS):
            return None
        children = [child for child in held["_modules"].values() if child is not None]
        found.layers.append((type(module), settings, len(children)))
        waiting += reversed(children)
        if not _add(held["_parameters"], found) or not _add(held["_buffers"], found):
            return None
    return found


def _settings_of(module: nn.Module) -> Hashable | None:
    try:
        settings = KNOWN[type(module)](module)
        hash(settings)
    except (KeyError, TypeError):  # not known, or with a list for a tuple
        return None
    return settings


def _add(tensors: dict[str, Tensor | None], found: KnownNetwork) -> bool:
    """Take the tensors of a module in; return whether they are such as passes are recorded with."""
    for name, tensor in tensors.items():
        if tensor is None:
            found.layers.append(name)
            continue
        if not tensor.is_cpu or tensor.dtype != torch.float32:
            return False
        if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
            return False
        place = found.places.setdefault(id(tensor), len(found.places))  # one for a tensor of two modules
        found.layers.append((name, place, tensor.shape, tensor.stride(), tensor.requires_grad))
        if place == len(found.weights):
            found.weights.append(tensor)
    return True


def recordable(network: nn.Module) -> bool:
    """Whether passes through this network, as it is now, are known to call the same operators each time."""
    return look(network) is not None
