"""Fixed models that terms compare with: the teacher, and the start weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from advtrain.attacks import attack_mode
from advtrain.errors import UserError
from advtrain.models.blocks import head_tensors


class Teacher:
    """Model that teaches, in evaluation mode and without gradients; it never changes.

    It is no module, so that it belongs to no optimizer, checkpoint or distributed wrapper. The outputs for the last
    batch and its parts are kept, so one pass serves the attack and every term.

    Args:
        network: x (N, ...) -> logits (N, K).
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._batch: tuple[Tensor, int] | None = None  # a part of the last batch, and its version
        self._outputs: dict[tuple[Any, ...], tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits at the inputs of a batch, (N, K) float32."""
        return self._run(x)[0]

    def features(self, x: Tensor) -> Tensor:
        """Return the inputs of the last linear layer at the inputs of a batch, (N, D) float32."""
        return the_features(self._run(x)[1], "the teacher")

    def logits_at(self, z: Tensor) -> Tensor:
        """Return the logits at any points (N, ...), by a pass of its own."""
        with attack_mode(self.network), torch.no_grad():
            logits: Tensor = self.network(z).float()
        return logits

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits and the features of a batch, by one pass."""
        if self._batch is None or not (_same_memory(self._batch[0], x) and self._batch[1] == x._version):
            self._batch, self._outputs = (x, x._version), {}
        part = (x.storage_offset(), x.shape, x.stride(), x.dtype)
        if part not in self._outputs:
            with head_inputs(self.network) as features:
                self._outputs[part] = self.logits_at(x), features
        return self._outputs[part]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are views of one storage, such as slices of a batch."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Anchor:
    """Start weights of the layers below the head.

    Args:
        model: model in training.
        weights: state dict of the model that training started from. Tensors that it lacks have no anchor.

    Raises:
        UserError: it has none of the model's weights.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        head = set(head_tensors(model))
        self.pairs = [
            (parameter, weights[name].detach().to(parameter, copy=True))
            for name, parameter in model.named_parameters()
            if name in weights and name not in head
        ]
        if not self.pairs:
            raise UserError("objective.l2_sp needs start weights: set model.from")

    def half_squared_distance(self) -> Tensor:
        """Return ||w - w_0||_2^2 / 2, 0-dim."""
        return torch.stack([(now - start).square().sum() for now, start in self.pairs]).sum() / 2


@contextmanager
def head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs (N, D) float32 of the last linear layer in this block's passes."""
    seen: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        yield seen
        return
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).float()))
    try:
        yield seen
    finally:
        handle.remove()


def the_features(seen: list[Tensor], whose: str) -> Tensor:
    """Return what `head_inputs` collected in one pass.

    Raises:
        UserError: the model has no linear layer, or runs its last one not exactly once.
    """
    if len(seen) != 1:
        raise UserError(
            f"objective.feature_match needs the input of the last linear layer, which {whose} runs {len(seen)} times "
            "in a pass; use distill_adv"
        )
    return seen[0]


def require_same_width(features: Tensor, target: Tensor) -> None:
    """Raise a UserError if model and teacher have features (N, D) of another width D."""
    if features.shape[1] != target.shape[1]:
        raise UserError(
            f"objective.feature_match compares inputs of the last layer: {features.shape[1]} features of the model, "
            f"but {target.shape[1]} of the teacher; use distill_adv"
        )
