"""Checks of models' outputs, and a wrapper for normalized models and other outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advtrain.errors import UserError
from advtrain.models.network import embeds, pick_logits


def check_outputs(
    outputs: object,
    num_samples: int,
    *,
    num_labels: int = 0,
    num_classes: int | None = None,
    regression: bool = False,
) -> Tensor:
    """Return the outputs if they are logits (N, K), or predictions (N, 1) of a regression.

    No value is read, so the check does not wait for the device.

    Args:
        outputs: what the model returned for `num_samples` = N inputs.
        num_labels: the largest label plus 1. K must not be smaller.
        num_classes: number of classes of the data. K must be equal to it; None: any K from 2 on.
        regression: the model predicts one number.

    Raises:
        UserError: another type, shape or number of outputs.
    """
    if not isinstance(outputs, Tensor):
        raise UserError(
            f"the model returns {type(outputs).__name__}, not a tensor; advtrain.wrap_model(model) takes the .logits "
            "of an object, the 'logits' of a dict, or the first element of a tuple"
        )
    shape = tuple(outputs.shape)
    if not outputs.is_floating_point():
        raise UserError(f"the model returns {outputs.dtype} {shape}, not floating-point logits")
    if regression:
        if shape != (num_samples, 1):
            raise UserError(
                f"the model returns {shape}, but a regression returns ({num_samples}, 1); y has float targets, and "
                "class labels are int64"
            )
        return outputs
    if shape in ((num_samples,), (num_samples, 1)):
        raise UserError(
            f"the model returns one value for each sample, {shape}, not logits ({num_samples}, K) with K >= 2; "
            "advtrain.wrap_model(model) turns the one logit of a binary classifier into two"
        )
    if len(shape) != 2 or shape[0] != num_samples:
        raise UserError(f"the model returns {shape}, not logits ({num_samples}, K)")
    if num_classes is not None and shape[1] != num_classes:
        raise UserError(f"the model returns {shape[1]} logits, but the data have {num_classes} classes")
    if num_labels > shape[1]:
        raise UserError(
            f"y holds the label {num_labels - 1}; the model returns {shape[1]} logits, for labels 0 to {shape[1] - 1}"
        )
    return outputs


def are_probabilities(outputs: Tensor) -> bool:
    """Return True if every row of outputs (N, K) is in [0, 1] and sums to 1.

    The sum may differ by 0.001, in half precision by 0.01.
    """
    tolerance = 1e-3 if torch.finfo(outputs.dtype).bits >= 32 else 1e-2
    rows = outputs.detach().float()
    inside = (rows >= 0) & (rows <= 1)
    return bool((inside.all(1) & ((rows.sum(1) - 1).abs() <= tolerance)).all())


def reject_probabilities(outputs: Tensor) -> None:
    """Raise a UserError if outputs (N, K) are probabilities.

    A single sample does not show it, and neither do values that are all 0 or 1.
    """
    if len(outputs) > 1 and are_probabilities(outputs) and bool(((outputs > 0) & (outputs < 1)).any()):
        raise UserError(
            "the model returns probabilities (rows in [0, 1] that sum to 1), not logits; remove its softmax, or use "
            "advtrain.wrap_model(model, from_probabilities=True)"
        )


class WrappedModel(nn.Module):
    """Model whose inputs are normalized, and whose outputs are turned into logits (N, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor, from_probabilities: bool) -> None:
        super().__init__()
        self.model, self.from_probabilities, self.is_checked = model, from_probabilities, False
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (N, C, ...) or (N, F), before normalization, to logits (N, K)."""
        outputs = _find_logits(self.model(self._normalize(x)))
        if outputs.dim() == 1:
            outputs = outputs.unsqueeze(1)
        if outputs.shape[1] == 1:  # binary: softmax of (0, z) is sigmoid(z)
            first = 1 - outputs if self.from_probabilities else torch.zeros_like(outputs)
            outputs = torch.cat([first, outputs], 1)
            self._check(outputs, one_logit=True)
        else:
            self._check(outputs)
        if not self.from_probabilities:
            return outputs
        p = outputs.float()
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()

    def _normalize(self, x: Tensor) -> Tensor:
        for statistic in (self.mean, self.std):
            if len(statistic) not in (1, x.shape[1]):
                raise UserError(
                    f"mean and std have {len(statistic)} values, but x {tuple(x.shape)} has {x.shape[1]} channels"
                )
        mean, std = (v.to(x.dtype).view(-1, *[1] * (x.dim() - 2)) for v in (self.mean, self.std))
        return (x - mean) / std

    def _check(self, outputs: Tensor, *, one_logit: bool = False) -> None:
        """Check `from_probabilities` against the first batch, because the check waits for the device."""
        if torch.compiler.is_compiling() or self.is_checked or len(outputs) < 2:
            return
        if not self.from_probabilities and not one_logit:
            reject_probabilities(outputs)
        if self.from_probabilities and not are_probabilities(outputs):
            raise UserError(
                "from_probabilities=True, but the model's outputs are not in [0, 1] or do not sum to 1; leave it out "
                "for a model that returns logits"
            )
        self.is_checked = True


def wrap_model(
    model: nn.Module,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    from_probabilities: bool = False,
) -> nn.Module:
    """Return a model that maps inputs before normalization to logits, as attacks need it.

    The wrapper shares the weights, the device and the mode of the model. From the model's outputs it takes a tensor,
    the `.logits` of an object, the "logits" of a dict, or the first element of a tuple or list. One logit z of a binary
    classifier, (N, 1) or (N,), becomes the two logits (0, z): sigmoid(z) is the probability of class 1.

    Args:
        model: maps normalized inputs (N, C, ...) or (N, F) to one of these outputs.
        mean, std: mean and standard deviation of each channel C or feature F, or one value for all, in the units of the
            inputs. The model gets (x - mean) / std. None: 0 and 1.
        from_probabilities: the model returns probabilities, (N, K), or those of class 1, (N, 1) or (N,). The logits are
            their logarithms. A probability of 0 counts as 1.2e-38 and has no gradient, so attacks are more reliable on
            the model without its softmax.

    Returns:
        A module that maps x (N, C, ...) or (N, F) float to logits (N, K) float, K >= 2. With mean and std of the
        training data, x is in [0, 1].

    Raises:
        UserError: std is not above 0, or the model embeds its inputs. When the model runs: another number of channels,
            outputs of another kind, or a first batch (of at least two samples) with rows of probabilities without
            `from_probabilities`, or with other values with it. A single output counts as a logit.
    """
    if embeds(model):
        raise UserError("wrap_model is for models whose inputs are perturbed; an EmbeddingModel needs none")
    tensor = next(iter([*model.parameters(), *model.buffers()]), torch.zeros(()))
    shift, scale = (
        torch.as_tensor(default if v is None else v, dtype=torch.float32, device=tensor.device).flatten()
        for v, default in ((mean, 0.0), (std, 1.0))
    )
    if not (shift.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise UserError(f"mean must be finite and std above 0, not mean={mean} and std={std}")
    return WrappedModel(model, shift, scale, from_probabilities)


def _find_logits(outputs: object) -> Tensor:
    """Return the tensor of logits in a model's outputs."""
    found = pick_logits(outputs)
    if not isinstance(found, Tensor) or found.dim() not in (1, 2) or not found.is_floating_point():
        shape = f" {found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise UserError(
            f"the model returns {type(outputs).__name__}{shape}; wrap_model needs floating-point outputs (N, K), "
            "(N, 1) or (N,) as a tensor, in .logits, under the key 'logits', or first in a tuple"
        )
    return found
