"""Tables of numbers and categories, scaled to [0, 1] by the training samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from advtrain.data.batches import ArraySplit, Labels, Rows
from advtrain.documents import MOST_YAML
from advtrain.errors import UserError
from advtrain.text import listed

#: Characters of YAML for a value besides those in JSON.
_YAML_INDENT = 14
#: Most categories of a column: each is an input of the model, and a column with more is probably an identifier.
MOST_CATEGORIES = 1000
#: Standard deviations on each side of the mean that standard scaling keeps; numbers beyond are clipped.
DEVIATIONS = 5


class Column(BaseModel):
    """A column of the user's table and how it becomes inputs of the model.

    A column of numbers is one input, (value - low) / (high - low), clipped to [0, 1]. A column of categories is one
    input for each category, 1 for the value's own and 0 for the others.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    low: float | None = None
    """value that becomes 0; null for categories"""
    high: float | None = None
    """value that becomes 1; null for categories"""
    categories: list[str] | None = None
    """sorted categories of the training samples; null for numbers"""
    fill: float | str | None = None
    """value in place of a missing one: median, or most frequent category; null: a missing value is an error"""


class TableSpec(BaseModel):
    """Columns of a table in the order of the model's inputs, and the label column."""

    model_config = ConfigDict(frozen=True)
    label: str
    columns: list[Column]
    lists: dict[str, int] = {}
    """length of the lists of each list column; a list of v is the columns v[0], v[1], ..."""

    @property
    def features(self) -> list[str]:
        """Names of the model's inputs, such as `age` and `color=red`."""
        names: list[str] = []
        for column in self.columns:
            values = column.categories
            names += [column.name] if values is None else [f"{column.name}={value}" for value in values]
        return names


@dataclass(frozen=True)
class RawTable:
    """Columns of a table before scaling: float64 with NaN, or text with None."""

    where: str  # file, for errors
    label: str
    columns: dict[str, NDArray[Any]]  # (N,) float64 or object
    labels: Labels
    lists: dict[str, int] = field(default_factory=dict)  # list column -> length of its lists

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Rows) -> RawTable:
        """Return a table with only the given rows."""
        columns = {name: cells[rows] for name, cells in self.columns.items()}
        return RawTable(self.where, self.label, columns, self.labels[rows], self.lists)

    def only(self, spec: TableSpec) -> RawTable:
        """Return a table with only the columns that become inputs."""
        columns = {column.name: self.columns[column.name] for column in spec.columns}
        return RawTable(self.where, self.label, columns, self.labels, self.lists)


def of_array(x: NDArray[Any], labels: Labels, where: str, label: str) -> RawTable:
    """Return the columns x0, x1, ... of an array (N, F) of numbers."""
    if x.dtype.kind not in "biuf":
        raise UserError(f"{where} must hold numbers, not {x.dtype}")
    return RawTable(where, label, {f"x{i}": x[:, i].astype(np.float64) for i in range(x.shape[1])}, labels)


def is_missing(cells: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where a cell of a column is missing, (N,)."""
    if cells.dtype == object:
        return np.array([cell is None for cell in cells], bool)
    missing: NDArray[np.bool_] = np.isnan(cells)
    return missing


def check_cells(raw: RawTable, *, impute: bool) -> None:
    """Raise UserError for the first infinite number, or missing value unless it is imputed."""
    for name, cells in raw.columns.items():
        if not impute and len(rows := np.flatnonzero(is_missing(cells))):
            raise UserError(
                f"{raw.where}: column {name} has no value in row {rows[0]} ({len(rows):,} missing in this column); "
                "fill it, leave the column out of data.features, or set data.missing=impute"
            )
        if cells.dtype != object and len(rows := np.flatnonzero(np.isinf(cells))):
            raise UserError(f"{raw.where}: column {name} is {cells[rows[0]]} in row {rows[0]}")


def _range_of(numbers: NDArray[np.float64], standard: bool) -> tuple[float, float]:
    """Return the numbers that become 0 and 1."""
    if not standard:
        return float(numbers.min()), float(numbers.max())
    mean, deviation = float(numbers.mean()), float(numbers.std())
    return mean - DEVIATIONS * deviation, mean + DEVIATIONS * deviation


def fit(raw: RawTable, *, impute: bool, standard: bool = False) -> tuple[TableSpec, list[str]]:
    """Return the columns as the training samples `raw` define them, and notes.

    With `standard`, the mean becomes 0.5, and a standard deviation is 0.1; else the range of the column becomes [0, 1].

    A column with a single value is left out: it says nothing, and a radius has no meaning in it.

    Raises:
        UserError: no column is left, or a column has too many categories.
    """
    columns, constant = [], []
    for name, cells in raw.columns.items():
        present = cells[~is_missing(cells)]
        counts = Counter(present.tolist())
        if len(counts) < 2:
            constant.append(name)
        elif cells.dtype != object:
            low, high = _range_of(present, standard)
            if not (np.isfinite(high - low) and high > low):
                raise UserError(
                    f"{raw.where}: column {name} cannot be scaled: it holds {present.min()} to {present.max()}"
                )
            columns.append(
                Column(name=name, low=low, high=high, fill=float(np.median(present)) if impute else None)
            )
        elif len(counts) > MOST_CATEGORIES:
            raise UserError(
                f"{raw.where}: column {name} has {len(counts):,} categories, more than {MOST_CATEGORIES:,}; "
                "it is probably an identifier or free text: leave it out of data.features"
            )
        else:
            categories = sorted(counts)
            most = max(categories, key=counts.__getitem__) if impute else None
            columns.append(Column(name=name, categories=categories, fill=most))
    if not columns:
        raise UserError(f"{raw.where}: every column has a single value: {listed(constant, 20)}")
    spec = TableSpec(label=raw.label, columns=columns, lists=raw.lists)
    _check_size(spec, raw.where)
    notes = [f"Left out, because all training samples have the same value: {listed(constant, 20)}."]
    return spec, notes if constant else []


def _check_size(spec: TableSpec, where: str) -> None:
    """Raise UserError if the columns would not fit into the MLmodel file of a registered model, which is YAML."""
    values = sum(len(Column.model_fields) + len(column.categories or []) for column in spec.columns)
    if len(spec.model_dump_json().encode()) + _YAML_INDENT * values > 0.9 * MOST_YAML:
        raise UserError(
            f"{where}: {len(spec.columns):,} columns with {len(spec.features):,} inputs are too many to be stored with "
            "a model; choose fewer with data.features, or save an .npz with x (N, F) in [0, 1]"
        )


def encode(spec: TableSpec, raw: RawTable) -> tuple[NDArray[np.float32], Counter[str], Counter[str]]:
    """Return the model's inputs (N, F) in [0, 1], and counts per column of unusual values.

    The counts are those of numbers outside the training range, which are clipped, and of unknown categories, which
    become zeros.

    Raises:
        UserError: a number is infinite, or a value is missing in a column without `fill`.
    """
    check_cells(raw, impute=True)
    parts: list[NDArray[Any]] = []
    clipped: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for column in spec.columns:
        cells, missing = raw.columns[column.name], is_missing(raw.columns[column.name])
        if column.fill is None and missing.any():
            raise UserError(f"{raw.where}: column {column.name} has no value in row {int(missing.argmax())}")
        if column.fill is not None:
            cells = np.where(missing, np.array(column.fill, cells.dtype), cells)
        if column.categories is not None:
            place = {category: number for number, category in enumerate(column.categories)}
            codes = np.array([place.get(cell, -1) for cell in cells], np.int64)
            parts.append(codes[:, None] == np.arange(len(place)))
            unknown[column.name] += int((codes < 0).sum())
        else:
            assert column.low is not None
            assert column.high is not None
            scaled = (cells - column.low) / (column.high - column.low)
            parts.append(scaled.clip(0, 1)[:, None])
            clipped[column.name] += int(((scaled < 0) | (scaled > 1)).sum())
    return np.concatenate(parts, axis=1).astype(np.float32), clipped, unknown


def scale(
    splits: Sequence[RawTable], *, impute: bool, standard: bool = False, like: TableSpec | None = None
) -> tuple[TableSpec, list[ArraySplit], list[str]]:
    """Scale the splits by the first one, the training split; return columns, splits and notes.

    With `like`, the columns of a model, they are scaled as its training samples were.
    """
    spec, notes = (like, []) if like is not None else fit(splits[0], impute=impute, standard=standard)
    scaled = []
    clipped: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for raw in splits:
        x, outside, unseen = encode(spec, raw)
        clipped += outside
        unknown += unseen
        scaled.append(ArraySplit(x, raw.labels, raw.only(spec)))
    return spec, scaled, notes + remarks(clipped, unknown)


def remarks(clipped: Counter[str], unknown: Counter[str]) -> list[str]:
    """Return a sentence each on clipped numbers and on unknown categories, if there are any."""
    found = []
    for counts, text in (
        (
            clipped,
            "Numbers outside the range of their column, which the training samples set, were clipped to it",
        ),
        (unknown, "Categories that the training samples lack became zeros"),
    ):
        if shown := [f"{name} ({count:,})" for name, count in counts.most_common() if count]:
            found.append(f"{text}: {', '.join(shown[:10])}{', ...' if len(shown) > 10 else ''}.")
    return found
