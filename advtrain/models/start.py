"""Initial weights of a training.

`fit_weights` maps the weights of another model to the names of this one. `training.worker` loads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from advtrain.errors import UserError
from advtrain.models.blocks import head_tensors
from advtrain.models.lora import lora_tensors
from advtrain.models.serialized import PREFIXES
from advtrain.models.small import in_channel_order
from advtrain.text import listed

Weights = Mapping[str, Tensor]
#: Number of tensors that an error names.
_SHOWN = 3


def plain_names(names: Mapping[str, object] | list[str]) -> dict[str, str]:
    """Return {name without the prefixes of wrappers: name}; a prefix is one that all names have."""
    found = {name: name for name in names}
    while prefix := next((p for p in PREFIXES if found and all(n.startswith(p) for n in found)), None):
        found = {name.removeprefix(prefix): original for name, original in found.items()}
    return found


def weights_digest(weights: Weights) -> str:
    """Return the SHA-256 of tensors and their plain names, whichever file they were read from."""
    total = hashlib.sha256()
    for name, original in sorted(plain_names(weights).items()):
        tensor = weights[original].detach().cpu().contiguous()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@dataclass(frozen=True)
class FittedWeights:
    """Weights in the names of a model, and what became of each tensor."""

    weights: dict[str, Tensor]
    new: list[str]  # tensors of the model that keep their random values
    ignored: list[str]  # tensors of the source that are not used

    def __str__(self) -> str:
        """Return one line for the user."""
        parts = [f"{len(self.weights)} tensors loaded"]
        parts += [f"new: {listed(self.new, _SHOWN)}"] if self.new else []
        parts += [f"ignored: {listed(self.ignored, _SHOWN)}"] if self.ignored else []
        return "; ".join(parts)


def fit_weights(
    weights: Weights,
    model: nn.Module,
    load: Literal["all", "backbone"] = "all",
    *,
    source: str = "the source",
    advice: str = "set model.load: backbone, and the head starts from random weights",
) -> FittedWeights:
    """Return the tensors of `weights` that the model loads, in its own names.

    Args:
        weights: state dict of another model; prefixes of wrappers such as `module.` are ignored.
        model: model that is to load them.
        load: all, or backbone: all but the head. The factors of LoRA stay as they are where `weights` has none.
        source: names the weights in errors.
        advice: what to do if the head alone does not fit.

    Raises:
        UserError: a tensor is missing, unexpected, or has another shape or type.
    """
    own, names = model.state_dict(), plain_names(weights)
    targets, head = plain_names(own), set(head_tensors(model))
    absent = lora_tensors(model).difference(targets[plain] for plain in names if plain in targets)
    wanted = {
        plain: name
        for plain, name in targets.items()
        if name not in absent and (load == "all" or name not in head)
    }
    heads = {plain for plain, name in targets.items() if name in head}
    found = {
        plain: in_channel_order(weights[name], own[targets[plain]])
        for plain, name in names.items()
        if plain in targets
    }
    missing = [plain for plain in wanted if plain not in found]
    unused = getattr(getattr(model, "network", model), "is_unused", lambda name: False)
    unexpected = [
        name
        for plain, name in names.items()
        if plain not in targets and not unused(plain.removeprefix("network."))
    ]
    kinds = {plain: (_kind(found[plain]), _kind(own[wanted[plain]])) for plain in wanted if plain in found}
    misfits = [plain for plain, (theirs, here) in kinds.items() if theirs != here]
    if missing or unexpected or misfits:
        faults = {
            "missing": [wanted[plain] for plain in missing],
            "unexpected": unexpected,
            "shapes": [f"{wanted[plain]}: {kinds[plain][0]}, here {kinds[plain][1]}" for plain in misfits],
        }
        if load == "all" and heads.issuperset([*missing, *misfits]) and not unexpected:
            raise UserError(
                f"{source} has another head than this model ({'; '.join(faults['shapes'] + faults['missing'])}): "
                f"{advice}"
            )
        said = [f"{kind}: {listed(each, _SHOWN)}" for kind, each in faults.items() if each]
        raise UserError(f"{source} does not fit the model ({'; '.join(said)})")
    loaded = {name: found[plain].detach().cpu().clone().contiguous() for plain, name in wanted.items()}
    ignored = sorted(name for plain, name in names.items() if plain not in wanted)
    return FittedWeights(loaded, [name for name in own if name not in loaded], ignored)


def _kind(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return shape if tensor.dtype == torch.float32 else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class StartWeights:
    """State dict to start from.

    Args:
        weights: state dict of the model, without the tensors in `new`.
        new: names of the tensors that keep their random values.
    """

    weights: Weights = field(default_factory=dict)
    new: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> None:
        """Load the weights.

        Raises:
            UserError: the weights have another architecture.
        """
        if self.weights:
            try:
                found = model.load_state_dict(dict(self.weights), strict=False)
            except RuntimeError as error:
                raise UserError(f"the start weights do not fit the model: {error}") from error
            if wrong := [*found.unexpected_keys, *(set(found.missing_keys) - set(self.new))]:
                raise UserError(f"the start weights do not fit the model: {listed(sorted(wrong), _SHOWN)}")


#: Random weights.
FROM_SCRATCH = StartWeights()
