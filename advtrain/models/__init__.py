"""Networks by name: ModelConfig -> module from (N, C, H, W) in [0, 1] to logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from advtrain.errors import UserError, find, nearest
from advtrain.hub import is_pretrained
from advtrain.models.hf import build_hf
from advtrain.models.libraries import build_from_library, nearest_in_libraries
from advtrain.models.network import Normalized, embeds, example_inputs
from advtrain.models.resnet import preact_resnet18, wide_resnet
from advtrain.models.small import Shape, cnn2, cnn4, mlp
from advtrain.models.text import char_cnn, text_cnn, transformer
from advtrain.recipe.data import TextShape
from advtrain.recipe.model import MODEL_LIBRARIES, ModelConfig
from advtrain.schema import load_attribute, with_numbers

Factory = Callable[..., nn.Module]


MODELS: dict[str, Factory] = {
    "mlp": mlp,
    "cnn2": cnn2,
    "cnn4": cnn4,
    "preact_resnet18": preact_resnet18,
    "wide_resnet": wide_resnet,
}
#: Networks that take texts.
TEXT_MODELS: dict[str, Factory] = {"text_cnn": text_cnn, "char_cnn": char_cnn, "transformer": transformer}


def build_model(
    config: ModelConfig,
    shape: Shape,
    num_classes: int,
    target_scale: tuple[float, float] | None = None,
) -> Normalized:
    """Build the network for samples of `shape`, (C, H, W) or (F,), in training mode.

    A custom factory gets the shape, too. For a regression (`num_classes` 0) the network has one output, in the units of
    `target_scale` (mean, standard deviation).
    """
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(shape) != 3:
            raise UserError(
                f"model.{name} is per image channel; these samples are tables, which are already scaled"
            )
        if values is not None and len(values) not in (1, shape[0]):
            raise UserError(f"model.{name} has {len(values)} values, but the images have {shape[0]} channels")
    if config.std is not None and min(config.std) <= 0:
        raise UserError(f"model.std must be above 0, not {config.std}")
    if config.name in MODELS | TEXT_MODELS and isinstance(shape, TextShape) != (config.name in TEXT_MODELS):
        takes, given = ("images or tables", "texts") if config.name in MODELS else ("texts", "not")
        known = ", ".join(TEXT_MODELS if config.name in MODELS else MODELS)
        raise UserError(f"model '{config.name}' takes {takes}, but the samples are {given}; use {known}")
    if len(shape) != 3 and config.name in MODELS and config.name != "mlp":
        raise UserError(f"model '{config.name}' takes images, but the samples are tables; use mlp")
    network = _build_network(config, shape, num_classes or 1)
    if isinstance(shape, TextShape) and not embeds(network):
        raise UserError(
            f"model '{config.name}' must be an advtrain.models.network.EmbeddingModel: attacks cannot change token ids"
        )
    model = Normalized(network, config.mean, config.std, target_scale)
    if any(is_lazy(tensor) for tensor in [*network.parameters(), *network.buffers()]):
        _set_lazy_shapes(model, config.name, shape)
    return model.train()  # a factory may return its network in evaluation mode, as from_pretrained does


def _set_lazy_shapes(model: nn.Module, name: str, shape: Shape) -> None:
    """Run the model once, because lazy modules such as nn.LazyLinear get their shapes from the first input."""
    try:
        with torch.no_grad():
            model.eval()(example_inputs(shape, 2))
    except Exception as error:  # a custom network may raise any exception
        raise UserError(
            f"model '{name}' fails on inputs {(2, *shape)}: {type(error).__name__}: {error}"
        ) from error


def _build_network(config: ModelConfig, shape: Shape, num_classes: int) -> nn.Module:
    source, _, rest = config.name.partition(":")
    known: dict[str, Factory] = MODELS | TEXT_MODELS
    if is_pretrained(config.name):
        return build_hf(rest, with_numbers(config.args), shape, num_classes)
    if source in MODEL_LIBRARIES:
        return build_from_library(source, rest, with_numbers(config.args), shape, num_classes)
    if not rest and source not in known and (close := nearest_in_libraries(source, known)):
        raise UserError(f"unknown model '{source}'; did you mean '{close}'?")
    factory: Factory = load_attribute(config.name, "model") if rest else find(known, source, "model")
    if not callable(factory) or isinstance(factory, nn.Module):
        raise UserError(
            f"model '{config.name}' is a {type(factory).__name__}, not a function (shape, num_classes, ...)"
        )
    taken = inspect.signature(factory).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        for name in config.args:
            if name not in taken:
                raise UserError(
                    f"model.args.{name}: '{config.name}' takes no '{name}'"
                    f"{nearest(name, set(taken) - {'shape', 'num_classes'})}"
                )
    try:
        network = factory(shape, num_classes, **with_numbers(config.args))
    except UserError:
        raise
    except Exception as error:  # a custom factory may raise any exception
        raise UserError(
            f"model '{config.name}' with args {config.args}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model '{config.name}' returned {type(network).__name__}, not a torch.nn.Module")
    return network
