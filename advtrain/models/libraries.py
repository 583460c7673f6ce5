"""Networks of torchvision and timm by name, with random weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from advtrain.errors import UserError, nearest
from advtrain.models.small import Shape


def _torchvision_names() -> list[str]:
    import torchvision  # slow: imports the compiler of torch

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _timm_names() -> list[str]:
    try:
        import timm  # optional
    except ImportError as error:
        raise UserError("timm:NAME needs the package timm: pip install 'advtrain[vision]'") from error
    return timm.list_models()


def _build_torchvision(name: str, args: dict[str, Any], shape: Shape, num_classes: int) -> nn.Module:
    import torchvision

    if shape[0] != 3:
        raise UserError(f"torchvision:{name} takes 3 channels, but the data has {shape[0]}; timm takes any")
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **args)
    return network


def _build_timm(name: str, args: dict[str, Any], shape: Shape, num_classes: int) -> nn.Module:
    import timm

    for key in args:
        if key == "checkpoint_path" or key.startswith("pretrained"):
            raise UserError(f"model.args.{key}: the network of a recipe starts from random weights")
    usual = timm.models.get_pretrained_cfg(name)
    if usual is not None and usual.fixed_input_size and usual.input_size[1:] != shape[1:]:
        args = {"img_size": shape[1:], **args}  # position embeddings have the size of the images
    return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=shape[0], **args)


#: Libraries of networks that not every installation has.
OPTIONAL = {"timm", "transformers"}
#: Names and builder of each library.
_LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[..., nn.Module]]] = {
    "torchvision": (_torchvision_names, _build_torchvision),
    "timm": (_timm_names, _build_timm),
}


def library_names(library: str) -> list[str]:
    """Return the names of a library's networks; raise a UserError if it is not installed."""
    names, _ = _LIBRARIES[library]
    return names()


def build_from_library(
    library: str, name: str, args: dict[str, Any], shape: Shape, num_classes: int
) -> nn.Module:
    """Build the network `name` of torchvision or timm with random weights.

    Networks of timm take the channels of the data, and those for a fixed image size the size of the data.

    Raises:
        UserError: the library or the network is missing, or does not take the arguments or the data.
    """
    names, build = _LIBRARIES[library]
    if name not in (known := names()):
        raise UserError(f"unknown {library} model '{name}'{nearest(name, known)}")
    if len(shape) != 3:
        raise UserError(f"model '{library}:{name}' takes images, but the samples are tables; use mlp")
    try:
        return build(name, args, shape, num_classes)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"model.args of {library}:{name}: {error}") from error


def libraries_used(network: nn.Module) -> list[str]:
    """Return which of timm and transformers define a layer of a network."""
    return sorted({type(layer).__module__.partition(".")[0] for layer in network.modules()} & OPTIONAL)


def nearest_in_libraries(name: str, ours: Iterable[str]) -> str | None:
    """Return the network of a library, as `timm:NAME`, that is nearest to a name.

    None if one of `ours` is nearer, or nothing is near.
    """
    known: dict[str, str | None] = dict.fromkeys(ours)
    for library, (names, _) in _LIBRARIES.items():
        with suppress(UserError):  # the library is not installed
            for other in names():
                known.setdefault(other, f"{library}:{other}")
    close = difflib.get_close_matches(name, known, n=1)
    return known[close[0]] if close else None
