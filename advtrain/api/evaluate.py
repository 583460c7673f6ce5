"""Robust accuracy of any model on tensors or a DataLoader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advtrain.api.checks import check_samples, parse_any_threat, unwrap
from advtrain.api.edits import check_data_root, refuse_settings, texts_of_edits
from advtrain.api.samples import dataset_of, device_of, split_of
from advtrain.api.texts import Texts, are_texts, to_tensor
from advtrain.attacks import AttackConfig
from advtrain.data import ArraySplit, Dataset
from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, EvalSpec
from advtrain.evaluation import evaluate as run_evaluation
from advtrain.recipe.edits import EditThreatConfig
from advtrain.threat import ThreatModel

#: Batches of inputs and labels, such as a DataLoader yields.
Loader = Iterable[Sequence[Any]]

#: Attack for the evaluation of a regression.
_REGRESSION_ATTACK = {"num_steps": 50, "num_restarts": 5, "loss": "mae"}


def evaluate(
    model: nn.Module,
    x: Tensor | Texts | Loader,
    y: Tensor | None = None,
    threat: ThreatModel | EditThreatConfig | str | None = None,
    *,
    suite: str | None = None,
    full: bool = True,
    other: tuple[Tensor | Texts, Tensor] | None = None,
    name: str = "model",
    data: str = "data",
    class_names: list[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    data_root: str | Path | None = None,
) -> AnyReport:
    """Attack every sample and report accuracy and robust accuracy with 95 % intervals.

    A sample counts as robust only if no attack, restart or iterate fooled the model. The model is not changed.

    Args:
        model: maps x to logits (N, K), or to (N, 1) for a regression; evaluated on its own device, in evaluation mode.
            `wrap_model` adapts a model of normalized inputs or with other outputs.
        x: (N, ...) float32 within the threat model's bounds; for a text model from `load_model`, a list of texts, or
            their token ids; or a DataLoader that yields (x, y), without `y`.
        y: (N,) int64 labels, or float targets of a regression.
        threat: a ThreatModel, or text such as "linf:8/255" or "l2:0.5". For texts also edits, such as "words:2" or
            "chars:1,where=anywhere,budget=500", or `evaluation.threat` of a recipe.
        suite: quick, standard, autoattack (the default), rand, or a list such as "apgd-ce,square". A regression has no
            suite: PGD-50 maximizes the absolute error in both directions, with five restarts. Edits have no suite.
        full: also run the masking checks and compute the accuracy curve. Without them `report.trust` is
            "unchecked".
        other: held-back inputs and labels, for the check `other_images`; None: the images, moved by a pixel.
        name, data: names of the model and the data in the report.
        class_names: class names in the order of the labels; None: under edits, those of the model.
        seed: seed of all random starts and searches.
        batch_size: samples per forward pass; None: 250. The random starts depend on it. Edits have no batch size.
        data_root: folder of the data, for the table of edits of words; None: $ADVTRAIN_DATA_ROOT or ./data.

    Returns:
        A Report: `clean_accuracy`, `robust_accuracy`, `robust.low`, `robust.high`, `attacks`, `per_class`, `checks`,
        `trust`, and under edits `edits`. For a regression, a RegressionReport with `clean_mae`, `robust_mae`.

    Raises:
        UserError: no samples, inputs outside the bounds, invalid labels, outputs that are not logits, batch norm in
            training mode, an attack that does not support the threat model, or edits without texts or table.
    """
    if threat is None:
        raise UserError("evaluate needs a threat model, for example threat='linf:8/255'")
    threat, model, (x, y) = parse_any_threat(threat), unwrap(model), _collect(x, y)
    check_data_root(data_root, threat)
    how: dict[str, Any] = {"seed": seed, "full": full, "device": device_of(model, x)}
    if isinstance(threat, EditThreatConfig):
        refuse_settings({"suite": suite, "other": other, "batch_size": batch_size}, threat)
        texts = texts_of_edits(model, x, y, threat, data_root, data, class_names)
        return run_evaluation(EvalSpec(model, texts.test, texts, "", threat, name, **how)).report
    dataset, how["other"] = _checked(model, (x, y), other, threat, data, class_names)
    attacks, how["batch_size"] = _attacks_of(suite, dataset), 250 if batch_size is None else batch_size
    return run_evaluation(EvalSpec(model, dataset.test, dataset, attacks, threat, name, **how)).report


def _checked(
    model: nn.Module,
    samples: tuple[Tensor | Texts, Tensor],
    other: tuple[Tensor | Texts, Tensor] | None,
    threat: ThreatModel,
    name: str,
    class_names: list[str] | None,
) -> tuple[Dataset, ArraySplit | None]:
    """Return samples as a data set, and the held-back ones as a split, after checks of their values."""
    for inputs, labels in [samples] if other is None else [samples, other]:
        check_samples(model, to_tensor(model, inputs), labels, threat)
    dataset = dataset_of(model, *samples, name, class_names)
    return dataset, None if other is None else split_of(model, *other)


def _attacks_of(suite: str | None, dataset: Dataset) -> AttackConfig | str:
    """Return the attacks of the evaluation: a suite, or one attack for a regression."""
    if not dataset.regression:
        return suite or "autoattack"
    if suite is not None:
        raise UserError(
            f"suite '{suite}' is for classifiers, but y has floating-point targets; class labels are int64"
        )
    return AttackConfig.model_validate(_REGRESSION_ATTACK)


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
