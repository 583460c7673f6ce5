"""Columns of texts and labels in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from advtrain.data.parquet import LABEL_COLUMNS
from advtrain.data.request import Request
from advtrain.errors import UserError, nearest

#: Usual names of a column of texts.
TEXT_COLUMNS = ("text", "sentence", "content")


def text_columns(names: Sequence[str], request: Request, file: Path) -> tuple[str, str | None]:
    """Return the names of the columns of texts and of labels; None for labels that are not read.

    Each is the one that the settings name, the one that the model was trained on, or the first usual one.

    Args:
        names: all columns of the file.
        request: settings of the data.
        file: the file, for errors.

    Raises:
        UserError: the file has no such column.
    """
    known_text, known_label = request.known
    if not request.labelled:
        advice = (
            f"call the column of texts {request.text or TEXT_COLUMNS[0]}, in the first line of a .csv or .tsv"
        )
        return _column(names, request.text, TEXT_COLUMNS, file, advice), None
    text, label = "set data.text", "set data.label"
    if request.class_names is not None:  # an evaluation of a finished model, which has no settings
        text = f"call the column of texts {known_text or TEXT_COLUMNS[0]}"
        label = f"call the column of labels {known_label or LABEL_COLUMNS[0]}"
    return (
        _column(names, request.text, _first(known_text, TEXT_COLUMNS), file, text),
        _column(names, request.label, _first(known_label, LABEL_COLUMNS), file, label),
    )


def _first(known: str | None, usual: Sequence[str]) -> Sequence[str]:
    """Return the names in the order in which they are looked up."""
    return usual if known is None else (known, *usual)


def _column(names: Sequence[str], given: str | None, usual: Sequence[str], file: Path, advice: str) -> str:
    """Return the name of a column: the given one, or the first usual one."""
    name = given or next((each for each in usual if each in names), None)
    if name is None:
        raise UserError(
            f"'{file}' has none of the usual columns ({', '.join(usual)}); its columns are {', '.join(names[:20])}; "
            f"{advice}"
        )
    if name not in names:
        raise UserError(f"'{file}' has no column {name}{nearest(name, names)}; {advice}")
    if list(names).count(name) > 1:
        raise UserError(f"'{file}' has several columns {name}; rename all but one")
    return name
