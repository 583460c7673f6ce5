"""Shared helpers of the Python API: parsing of threat models and settings, input checks."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from advtrain.errors import UserError, nearest
from advtrain.models.network import embeds
from advtrain.schema import Config
from advtrain.threat import ThreatModel

C = TypeVar("C", bound=Config)


def parse_threat(threat: ThreatModel | str) -> ThreatModel:
    """Return the threat model of text such as "linf:8/255"."""
    return threat if isinstance(threat, ThreatModel) else ThreatModel.parse(threat)


def validate(kind: type[C], values: dict[str, Any]) -> C:
    """Return the configuration, or raise a UserError that names the setting."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"unknown setting '{path}'{nearest(path, kind.model_fields)}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {message}" if path else message) from error


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, so an attack starts no all-reduce."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_samples(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> None:
    """Raise a UserError for inputs outside the bounds, or for labels of the wrong shape.

    The inputs of an EmbeddingModel are not checked, because the bounds apply to embed(x).
    """
    if y.shape != x.shape[:1]:
        raise UserError(f"y must have shape ({len(x)},), one label for each input, not {tuple(y.shape)}")
    if embeds(model):
        return
    if not x.is_floating_point():
        raise UserError(
            f"x must be floating point in [{threat.low:g}, {threat.high:g}], not {x.dtype}; divide by 255"
        )
    inside = (x >= threat.low) & (x <= threat.high)  # NaN compares false
    if not bool(inside.all()):
        value = float(x[~inside][0])
        raise UserError(
            f"x holds {value:g}, outside the bounds [{threat.low:g}, {threat.high:g}] of the threat model; move the "
            "normalization into the model's first layer, or give a ThreatModel with other bounds"
        )
