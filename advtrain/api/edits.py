"""Edits of texts in the Python API: checks, data with the table, and edited texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from advtrain.api.samples import dataset_of, device_of
from advtrain.api.texts import TextClassifier, Texts, to_tensor
from advtrain.attacks import check_label_type, check_labels, check_least_label
from advtrain.data import Dataset
from advtrain.data import data_root as default_data_root
from advtrain.edits import load_table
from advtrain.errors import UserError
from advtrain.evaluation.edits import EditFactory, evaluate_texts
from advtrain.recipe.edits import EditThreatConfig
from advtrain.threat import ThreatModel


def check_data_root(data_root: str | Path | None, threat: ThreatModel | EditThreatConfig) -> None:
    """Raise a UserError if a data root is given, and the threat model has no table."""
    has_table = isinstance(threat, EditThreatConfig) and threat.table is not None
    if data_root is not None and not has_table:
        raise UserError(f"data_root is for the table of edits of words, not for {threat}")


def refuse_settings(given: dict[str, Any], threat: EditThreatConfig) -> None:
    """Raise a UserError for the first setting of attacks on tensors that is not None."""
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"{name} is for attacks on tensors; the settings of edits are part of the threat model, for example "
                f"'{threat},budget=500'"
            )


def texts_of_edits(
    model: nn.Module,
    x: Tensor | Texts,
    y: Tensor,
    threat: EditThreatConfig,
    data_root: str | Path | None,
    name: str = "data",
    class_names: list[str] | None = None,
) -> Dataset:
    """Return texts and labels as a data set, with the table of the edits.

    Args:
        model: text model of `load_model`.
        x: N texts.
        y: (N,) int64 labels.
        threat: edits.
        data_root: folder of the data, for the table; None: $ADVTRAIN_DATA_ROOT or ./data.
        name, class_names: name of the data, and names of the classes; None: those of the model.

    Raises:
        UserError: the model takes no texts, x are token ids or no texts, invalid labels, outputs that are not logits,
            or a missing or unreadable table.
    """
    if isinstance(x, Tensor):
        raise UserError(
            f"edits ({threat}) change texts; pass a list of texts as x, not a tensor of token ids"
        )
    ids = to_tensor(model, x)  # refuses a model that takes no texts
    assert isinstance(model, TextClassifier)
    check_labels(y, len(ids))
    check_label_type(y)
    check_least_label(int(y.min()))
    found = dataset_of(model, x, y, name, class_names or model.class_names)
    if threat.table is None:
        return found
    root = default_data_root(None if data_root is None else str(data_root))
    return replace(found, synonyms=load_table(threat.table, root))


def edited_texts(
    model: nn.Module,
    x: Tensor | Texts,
    y: Tensor,
    threat: EditThreatConfig,
    seed: int,
    data_root: str | Path | None,
) -> list[str]:
    """Return the N texts, each with the edits that were found to fool the model.

    A text is unchanged if none was found, or if it is misclassified without an edit. The search is that of an
    evaluation with the same seed.
    """
    dataset = texts_of_edits(model, x, y, threat, data_root)
    evaluator = EditFactory.of(model, dataset.test, dataset, threat, seed, {})(device_of(model, x))
    found = evaluate_texts(evaluator.run, dataset.test, threat)
    rows = zip(found.texts, found.verdicts, strict=True)
    return [verdict["text"] if verdict["broken_at"] else text for text, verdict in rows]
