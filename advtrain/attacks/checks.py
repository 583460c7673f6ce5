"""Checks of an attack's inputs and labels, and of the model's outputs."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor, nn

from advtrain.errors import UserError
from advtrain.models.outputs import check_outputs
from advtrain.threat import ThreatModel


def check_labels(y: Tensor, number: int) -> None:
    """Raise a UserError unless y is a tensor with a label or target for each input."""
    if not isinstance(y, Tensor):
        raise UserError(f"y must be a tensor, one label for each input, not {type(y).__name__}")
    if y.shape != (number,):
        raise UserError(f"y must have shape ({number},), one label for each input, not {tuple(y.shape)}")


def check_label_type(y: Tensor, *, regression: bool = False) -> None:
    """Raise a UserError unless y holds int64 labels; for a regression, float targets."""
    if not (y.is_floating_point() if regression else y.dtype == torch.int64):
        kind, how = ("float targets", "y.float()") if regression else ("int64 class labels", "y.long()")
        raise UserError(f"y must hold {kind}, not {y.dtype}; convert it with {how}")


def check_least_label(label: float) -> None:
    """Raise a UserError if the smallest label is below 0."""
    if label < 0:
        raise UserError(f"y holds the label {label:g}; labels are 0 to K - 1 for a model with K logits")


def check_inputs(x: Tensor, y: Tensor, threat: ThreatModel, *, regression: bool = False) -> int:
    """Check that x lies in the box and that y fits; return the number of classes in y.

    The values are read in one pass, and the device is waited for once.

    Args:
        x: (N, ...) float, finite, in [threat.low, threat.high].
        y: (N,) int64 labels, at least 0; for a regression (N,) finite float targets.
        threat: threat model; infinite bounds only require finite values.
        regression: y are targets.

    Returns:
        The largest label plus 1; 0 for a regression, and without samples.

    Raises:
        UserError: other values, shapes or types.
    """
    box = f"[{threat.low:g}, {threat.high:g}]"
    if not x.is_floating_point():
        raise UserError(f"x must be floating point in {box}, not {x.dtype}; divide by 255")
    check_labels(y, len(x))
    check_label_type(y, regression=regression)
    if x.numel() == 0:
        return 0
    ends = [end.float().to(x.device) for end in (*x.detach().aminmax(), *y.detach().aminmax())]
    least, greatest, first, last = torch.stack(ends).tolist()
    # A bound such as 0.1 is rounded to the type of x, like the values that are clipped to it.
    low, high = (torch.tensor(bound, dtype=x.dtype).float().item() for bound in (threat.low, threat.high))
    if not (isfinite(least) and isfinite(greatest) and low <= least and greatest <= high):
        value = greatest if isfinite(least) and low <= least else least
        raise UserError(
            f"x holds {value:.9g}, outside the bounds {box} of the threat model; for a model of normalized inputs use "
            "advtrain.wrap_model(model, mean=..., std=...) and inputs that are not normalized, or give a ThreatModel "
            "with other bounds"
        )
    if not regression:
        check_least_label(first)
    if not (isfinite(first) and isfinite(last)):
        raise UserError(f"y holds {last if isfinite(first) else first:g}; targets must be finite")
    return 0 if regression else int(last) + 1


class _CheckedModel(nn.Module):
    """View of a model that checks the type and shape of all its outputs."""

    def __init__(self, model: nn.Module, num_labels: int, regression: bool) -> None:
        super().__init__()
        self.model, self.num_labels, self.regression = model, num_labels, regression

    def forward(self, z: Tensor) -> Tensor:
        return check_outputs(self.model(z), len(z), num_labels=self.num_labels, regression=self.regression)


def checked(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, regression: bool = False
) -> nn.Module:
    """Check the inputs of an attack; return a view of the model that checks its outputs.

    So labels outside the classes are found at the first logits, without a pass of their own.

    Raises:
        UserError: see `check_inputs`. The view raises one for outputs that are not (N, K), and for labels above K - 1.
    """
    return _CheckedModel(model, check_inputs(x, y, threat, regression=regression), regression)
