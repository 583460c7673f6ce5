"""Robust accuracy of any model on tensors or a DataLoader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advtrain.api.checks import NUM_CHECKED, check_model, check_samples, parse_threat, unwrap
from advtrain.api.texts import TextClassifier, Texts, are_texts, text_split, to_tensor
from advtrain.attacks import AttackConfig
from advtrain.data import ArraySplit, Dataset
from advtrain.data.batches import Labels
from advtrain.data.texts import TextSplit
from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, EvalSpec
from advtrain.evaluation import evaluate as run_evaluation
from advtrain.models.network import embeds
from advtrain.threat import ThreatModel

#: Batches of inputs and labels, such as a DataLoader yields.
Loader = Iterable[Sequence[Any]]

#: Attack for the evaluation of a regression.
_REGRESSION_ATTACK = {"num_steps": 50, "num_restarts": 5, "loss": "mae"}


def evaluate(
    model: nn.Module,
    x: Tensor | Texts | Loader,
    y: Tensor | None = None,
    threat: ThreatModel | str | None = None,
    *,
    suite: str | None = None,
    full: bool = True,
    other: tuple[Tensor | Texts, Tensor] | None = None,
    name: str = "model",
    data: str = "data",
    class_names: list[str] | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> AnyReport:
    """Attack every sample and report accuracy and robust accuracy with 95 % intervals.

    A sample counts as robust only if no attack, restart or iterate fooled the model. The model is not changed.

    Args:
        model: maps x to logits (N, K), or to (N, 1) for a regression; evaluated on its own device, in evaluation mode.
            `wrap_model` adapts a model of normalized inputs or with other outputs.
        x: (N, ...) float32 within the threat model's bounds; for a text model from `load_model`, a list of texts, or
            their token ids; or a DataLoader that yields (x, y), without `y`.
        y: (N,) int64 labels, or float targets of a regression.
        threat: a ThreatModel, or text such as "linf:8/255" or "l2:0.5".
        suite: quick, standard, autoattack (the default), rand, or a list such as "apgd-ce,square". A regression has no
            suite: PGD-50 maximizes the absolute error in both directions, with five restarts.
        full: also run the masking checks and compute the accuracy curve. Without them `report.trust` is
            "unchecked".
        other: held-back inputs and labels, for the check `other_images`; None: the images, moved by a pixel.
        name, data: names of the model and the data in the report.
        class_names: class names in the order of the labels.
        seed: seed of all random starts.
        batch_size: samples per forward pass. The random starts depend on it.

    Returns:
        A Report: `clean_accuracy`, `robust_accuracy`, `robust.low`, `robust.high`, `attacks`, `per_class`, `checks`,
        `trust`. For a regression, a RegressionReport with `clean_mae`, `robust_mae`.

    Raises:
        UserError: no samples, inputs outside the bounds, invalid labels, outputs that are not logits, batch norm in
            training mode, or an attack that does not support the threat model.
    """
    if threat is None:
        raise UserError("evaluate needs a threat model, for example threat='linf:8/255'")
    threat, model, (x, y) = parse_threat(threat), unwrap(model), _collect(x, y)
    for inputs, labels in [(x, y)] if other is None else [(x, y), other]:
        check_samples(model, to_tensor(model, inputs), labels, threat)
    dataset = _dataset_of(model, x, y, data, class_names)
    device = _device_of(model, x)
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "full": full, "device": device}
    held_back = None if other is None else _split(model, *other)
    attacks = _attacks_of(suite, dataset)
    spec = EvalSpec(model, dataset.test, dataset, attacks, threat, name, other=held_back, **how)
    return run_evaluation(spec).report


def _attacks_of(suite: str | None, dataset: Dataset) -> AttackConfig | str:
    """Return the attacks of the evaluation: a suite, or one attack for a regression."""
    if not dataset.regression:
        return suite or "autoattack"
    if suite is not None:
        raise UserError(
            f"suite '{suite}' is for classifiers, but y has floating-point targets; class labels are int64"
        )
    return AttackConfig.model_validate(_REGRESSION_ATTACK)


def _dataset_of(
    model: nn.Module, x: Tensor | Texts, y: Tensor, name: str, class_names: list[str] | None
) -> Dataset:
    """Return a data set with the samples as test split, which is the only split in use.

    The number of classes is the number of logits.
    """
    split = _split(model, x, y)
    digest = hashlib.sha256(split.images.tobytes() + split.labels.tobytes()).hexdigest()
    first = to_tensor(model, x[:NUM_CHECKED])
    num_outputs = check_model(model, first.to(_device_of(model, first)), y)
    num_classes = 0 if y.is_floating_point() else num_outputs
    text = model.text if isinstance(model, TextClassifier) and isinstance(split, TextSplit) else None
    return Dataset(name, split, split, split, num_classes, tuple(split.shape), digest, class_names, text=text)


def _split(model: nn.Module, x: Tensor | Texts, y: Tensor) -> ArraySplit:
    """Return inputs (N, ...), or N texts, and labels or targets (N,) as a split."""
    kind = np.float32 if y.is_floating_point() else np.int64
    labels: Labels = y.cpu().numpy().astype(kind)  # type: ignore[assignment]
    if not isinstance(x, Tensor):
        assert isinstance(model, TextClassifier)
        return text_split(model, x, labels)
    is_ids = embeds(model) and x.dtype == torch.int64
    return ArraySplit((x if is_ids else x.detach().float()).cpu().numpy(), labels)


def _device_of(model: nn.Module, x: Tensor | Texts) -> torch.device:
    """Return the device of the model's parameters or buffers, else the device of the inputs."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), x)
    return tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")


def _collect(x: Tensor | Texts | Loader, y: Tensor | None) -> tuple[Tensor | Texts, Tensor]:
    """Return inputs and labels; the batches of a DataLoader are concatenated."""
    if isinstance(x, Tensor) or are_texts(x):
        if y is None:
            raise UserError("evaluate needs labels: evaluate(model, x, y, threat), or a DataLoader of both")
        return x, y
    if y is not None:
        raise UserError("a DataLoader already yields labels: call evaluate(model, loader, threat=...)")
    batches = list(x)
    if not batches:
        raise UserError("the DataLoader yields no batches")
    inputs, labels = ([batch[k] for batch in batches] for k in (0, 1))
    if isinstance(inputs[0], Tensor):
        return torch.cat(inputs), torch.cat(labels)
    return [text for batch in inputs for text in batch], torch.cat(labels)
