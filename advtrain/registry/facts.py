"""Facts of the data that are stored with a registered model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advtrain.data import Dataset
from advtrain.data.tables import TableSpec
from advtrain.data.texts import TOKENIZER, TextSpec
from advtrain.documents import read_yaml
from advtrain.errors import UserError

#: Key of the MLmodel file's metadata with the facts of the data, such as the class names.
FACTS = "advtrain"


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """Return the facts of the data that a user of the model needs, as plain values."""
    facts: dict[str, Any] = {} if dataset.class_names is None else {"class_names": list(dataset.class_names)}
    if dataset.table is not None:
        facts |= {"table": dataset.table.model_dump(mode="json")}
    if dataset.text is not None:
        facts |= {"text": dataset.text.model_dump(mode="json", exclude={"tokenizer"})}
    return facts


def facts_of(path: Path) -> dict[str, Any]:
    """Return the facts of the data from an MLmodel file; empty for models of earlier versions."""
    values = read_yaml(path, "file of MLflow")
    metadata = values.get("metadata") if isinstance(values, dict) else None
    facts = metadata.get(FACTS) if isinstance(metadata, dict) else None
    return facts if isinstance(facts, dict) else {}


def table_of(facts: dict[str, Any]) -> TableSpec | None:
    """Return the columns of a model's table from its facts; None if it takes no table.

    Raises:
        UserError: the facts are damaged.
    """
    if facts.get("table") is None:
        return None
    try:
        return TableSpec.model_validate(facts["table"])
    except ValidationError as error:
        raise UserError(f"the columns in the MLmodel file are damaged: {error}") from error


def text_of(model: Path) -> TextSpec | None:
    """Return the tokenizer of a model from its folder; None if it takes no texts.

    Raises:
        UserError: the tokenizer is missing, or the facts are damaged.
    """
    facts = facts_of(model / "MLmodel").get("text")
    if facts is None:
        return None
    try:
        return TextSpec.model_validate(
            {**facts, "tokenizer": (model / TOKENIZER).read_text(encoding="utf-8")}
        )
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"the tokenizer of the model is missing or damaged: {error}") from error
