"""Shared helpers of the Python API: parsing of threat models and settings, input checks."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from advtrain.api.texts import require_embeddings
from advtrain.attacks import attack_mode, check_inputs, check_labels
from advtrain.errors import UserError, nearest
from advtrain.models.network import embeds
from advtrain.models.outputs import check_outputs, reject_probabilities
from advtrain.objective import Teacher
from advtrain.recipe.edits import EditThreatConfig
from advtrain.recipe.threats import parse_edits
from advtrain.schema import Config
from advtrain.threat import ThreatModel

C = TypeVar("C", bound=Config)

#: Number of samples that `check_model` runs the model on.
NUM_CHECKED = 32


def parse_any_threat(threat: ThreatModel | EditThreatConfig | str) -> ThreatModel | EditThreatConfig:
    """Return the ball of text such as "linf:8/255", or the edits of text such as "words:2"."""
    if not isinstance(threat, str):
        return threat
    return parse_edits(threat, "threat") or ThreatModel.parse(threat)


def parse_threat(threat: ThreatModel | str) -> ThreatModel:
    """Return the threat model of text such as "linf:8/255"; edits of texts are refused."""
    found = parse_any_threat(threat)
    if isinstance(found, EditThreatConfig):
        raise UserError(
            f"edits of texts ({found}) are a threat model of advtrain.attack and advtrain.evaluate; a training loop "
            "perturbs tensors within a ball, such as l2:1"
        )
    return found


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


def build_teacher(module: nn.Module | None) -> Teacher | None:
    """Return the teacher that a module is, or None; raise a UserError for anything else."""
    if module is not None and not isinstance(module, nn.Module):
        raise UserError(
            f"teacher must be a module, such as the result of advtrain.load_model, not {module!r}"
        )
    return None if module is None else Teacher(unwrap(module))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, so an attack starts no all-reduce."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_samples(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> None:
    """Raise a UserError for inputs outside the bounds, or for invalid labels.

    Only the shape of y is checked for an EmbeddingModel, because the bounds apply to embed(x). A registered text model
    is refused.
    """
    require_embeddings(model)
    check_labels(y, len(x))
    if not embeds(model):
        check_inputs(x, y, threat, regression=y.is_floating_point())


def check_model(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Check the mode of a model and its outputs on the first samples; return their number K.

    Args:
        model: maps x to logits (N, K), or to (N, 1) if y are floating-point targets.
        x: (N, ...) on the model's device.
        y: (N,), all labels or targets.

    Raises:
        UserError: batch norm in training mode, outputs of another type or shape, probabilities, or a label above K - 1.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise UserError(
                f"the model's batch-norm layer '{name}' is in training mode; call model.eval(), or use Adversary in a "
                "training loop"
            )
    first, regression = x[:NUM_CHECKED], y.is_floating_point()
    num_labels = 0 if regression or len(y) == 0 else int(y.max()) + 1
    with attack_mode(model), torch.no_grad():
        outputs = check_outputs(model(first), len(first), num_labels=num_labels, regression=regression)
    if not regression:
        reject_probabilities(outputs)
    return outputs.shape[1]
