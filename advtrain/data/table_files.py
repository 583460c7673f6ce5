"""Tables in CSV and parquet files: delimiters, types of columns, and what is refused."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from advtrain.data.arrays import class_labels
from advtrain.data.batches import Labels
from advtrain.data.lists import check_lengths, is_list, refuse_list, spread_lists
from advtrain.data.parquet import open_parquet, reading_parquet, to_array
from advtrain.data.tables import RawTable, TableSpec
from advtrain.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

DELIMITERS = (",", ";", "\t", "|")
#: Formats of dates besides ISO 8601, which must not become categories.
_DATES = ("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d")
#: Names of row numbers that pandas writes.
_ROW_NUMBERS = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
_COMMA_NUMBER = re.compile(r"[+-]?\d[\d.]*,\d+|[+-]?\d+")


def read_table(
    files: Sequence[Path],
    label: str | None,
    features: Sequence[str] | None,
    *,
    regression: bool = False,
    class_names: list[str] | None = None,
    like: RawTable | None = None,
) -> tuple[RawTable, list[str] | None]:
    """Read the rows of all files; return columns with labels, and the class names.

    Args:
        files: CSV or parquet files with the same columns.
        label: name of the column of labels or targets.
        features: names of the other columns to use; None: all.
        regression: whether the labels are targets.
        class_names: class names of the training split.
        like: the training table, whose columns and types this one must have.

    Raises:
        UserError: a file is damaged, or a column is missing or holds values that are neither numbers nor categories.
    """
    rows, where = read_rows(files), name_of(files)
    names = list(rows.column_names)
    if label is None:
        raise UserError(f"data.label is not set; set it to the column to predict: {_listed(names)}")
    if label not in names:
        raise UserError(f"{where} has no column {label}{nearest(label, names)}; set data.label")
    rows, parts = spread_lists(rows, label, where)
    lists = {name: len(new) for name, new in parts.items()}
    if like is not None:
        check_lengths(lists, like.lists, where)
    if features is not None:
        features = [part for name in features for part in parts.get(name, [name])]
    used = _features(list(rows.column_names), label, list(like.columns) if like else features, where)
    columns = {name: _cells(rows[name], f"{where}: column {name}") for name in used}
    if like is not None:
        columns = {
            name: agreed(cells, like.columns[name].dtype != object, f"{where}: column {name}")
            for name, cells in columns.items()
        }
    labels, class_names = _labels(rows[label], f"{where}: column {label}", regression, class_names)
    return RawTable(where, label, columns, labels, lists), class_names


def read_unlabelled(
    files: Sequence[Path], table: TableSpec, class_names: list[str] | None = None
) -> tuple[RawTable, bool]:
    """Read the columns that a model takes; return them, and whether the rows have labels.

    Args:
        files: CSV or parquet files with the same columns.
        table: the columns of the model.
        class_names: class names of the model; None: labels are not read.

    Raises:
        UserError: a file is damaged, or lacks a column, or a cell is no number where the model takes numbers.
    """
    where = name_of(files)
    rows, parts = spread_lists(read_rows(files), table.label, where)
    check_lengths({name: len(new) for name, new in parts.items()}, table.lists, where)
    names = list(rows.column_names)
    columns = {}
    for column in table.columns:
        what = f"{where}: column {column.name}"
        if column.name not in names:
            raise UserError(f"{where} has no column {column.name}{nearest(column.name, names)}")
        columns[column.name] = agreed(_cells(rows[column.name], what), column.categories is None, what)
    labelled = class_names is not None and table.label in names
    labels: Labels = np.zeros(len(rows), np.int64)
    if labelled:
        labels, _ = _labels(rows[table.label], f"{where}: column {table.label}", False, class_names)
    return RawTable(where, table.label, columns, labels), labelled


def name_of(files: Sequence[Path]) -> str:
    """Return the name of the files for errors."""
    return f"'{files[0]}'" if len(files) == 1 else f"'{files[0].parent}', {len(files)} files"


def read_rows(files: Sequence[Path]) -> pa.Table:
    """Return the rows of CSV or parquet files.

    Raises:
        UserError: a file is damaged, has no rows or repeats a column, or the files differ in their columns.
    """
    import pyarrow as pa

    tables = [_read_parquet(file) if file.suffix == ".parquet" else read_csv(file) for file in files]
    for file, table in zip(files, tables, strict=True):
        names = table.column_names
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"'{file}' has several columns of the name {_listed(repeated)}")
        if set(names) != set(tables[0].column_names):
            raise UserError(
                f"'{file}' and '{files[0]}' differ in {_listed(sorted(set(names) ^ set(tables[0].column_names)))}"
            )
    try:
        rows = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{name_of(files)} differ in the types of their columns: {error}") from error
    if len(rows) == 0:
        raise UserError(f"{name_of(files)}: no rows found")
    return rows


def _read_parquet(path: Path) -> pa.Table:
    file = open_parquet(path)
    with reading_parquet(path):
        return file.read()


def read_csv(path: Path) -> pa.Table:
    """Read a CSV file with a header, in UTF-8.

    The delimiter is a comma, semicolon, tab or bar. Empty cells, NA, NaN and null are missing values.
    Spaces around a text are removed.
    """
    import pyarrow as pa
    from pyarrow import csv as reader

    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
            raise UserError(f"'{path}' is not UTF-8 text; save the table as a CSV file in UTF-8")
        table = reader.read_csv(
            path,
            parse_options=reader.ParseOptions(delimiter=_delimiter(start), newlines_in_values=True),
            convert_options=reader.ConvertOptions(
                strings_can_be_null=True, timestamp_parsers=[reader.ISO8601, *_DATES]
            ),
        )
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise UserError(f"'{path}' is not a readable CSV file: {error}") from error
    names = [name.strip() for name in table.column_names]
    if all(_is_number(name) for name in names):
        raise UserError(
            f"'{path}': the first line holds numbers ({_listed(names)}); it must hold the names of the columns"
        )
    return table.rename_columns(names)


def _delimiter(start: bytes) -> str:
    """Return the delimiter that splits the first lines into the most fields, the same number in each."""
    lines = start.decode("utf-8-sig", "replace").splitlines()[:10]
    whole = lines[:-1] if len(start) == 1 << 16 else lines
    fields = {}
    for delimiter in DELIMITERS:
        counts = [len(row) for row in csv.reader(whole, delimiter=delimiter) if row]
        fields[delimiter] = (len(set(counts)) == 1, counts[0] if counts else 0)
    return max(DELIMITERS, key=lambda delimiter: fields[delimiter])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _features(names: list[str], label: str, features: Sequence[str] | None, where: str) -> list[str]:
    """Return the columns to use, in the order of the table or of data.features."""
    if features is None:
        if unnamed := [name for name in names if _ROW_NUMBERS.fullmatch(name)]:
            raise UserError(
                f"{where} has a column without a name ('{unnamed[0]}'), probably row numbers; write the table without "
                "them, or list the columns to use in data.features"
            )
        features = [name for name in names if name != label]
    for name in features:
        if name not in names:
            raise UserError(f"{where} has no column {name}{nearest(name, names)}")
        if name == label:
            raise UserError(f"data.features names {name}, which is the column of labels")
    if not features:
        raise UserError(f"{where} has no column besides the labels ({_listed(names)})")
    if len(set(features)) < len(features):
        raise UserError("data.features names a column twice")
    return list(features)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _cells(column: pa.ChunkedArray, what: str) -> NDArray[Any]:
    """Return a column as float64 with NaN, or as text with None, for missing values."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = column.cast(pa.float64(), safe=False).to_numpy()
        return np.asarray(numbers, np.float64)
    if pa.types.is_boolean(kind):
        return np.array([None if v is None else str(v).lower() for v in column.to_pylist()], object)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _texts(column.to_pylist(), what)
    if pa.types.is_temporal(kind):
        raise UserError(
            f"{what} holds dates or times; turn them into numbers, such as days since a date, or leave the column out "
            "of data.features"
        )
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise UserError(f"{what} is not UTF-8 text; save the table in UTF-8 (for images set data.image)")
    if is_list(kind):
        refuse_list(column, what)
    raise UserError(f"{what} holds {kind}; expected numbers, booleans, text or lists of numbers")


def _texts(values: list[str | None], what: str) -> NDArray[Any]:
    """Return stripped texts; refuse numbers that were not read as such."""
    cells = np.array(
        [None if value is None or not value.strip() else value.strip() for value in values], object
    )
    distinct = {cell for cell in cells if cell is not None}
    commas = [cell for cell in distinct if "," in cell]
    if commas and all(_COMMA_NUMBER.fullmatch(cell) for cell in distinct):
        raise UserError(
            f"{what} holds numbers with a comma, such as '{min(commas)}'; write a decimal point and no thousands "
            "separator"
        )
    other = [cell for cell in distinct if not _is_number(cell)]
    if other and 2 * len(other) < len(distinct):
        row = next(row for row, cell in enumerate(cells) if cell in other)
        raise UserError(
            f"{what} holds numbers, but '{cells[row]}' in row {row}; leave a cell empty where the value is missing"
        )
    return cells


def as_trained(raw: RawTable, table: TableSpec) -> RawTable:
    """Return a table with the columns of a model, of the types that its training samples have.

    Raises:
        UserError: a column is missing, or a cell is no number where the model takes numbers.
    """
    check_lengths(raw.lists, table.lists, raw.where)
    columns = {}
    for column in table.columns:
        name = column.name
        if name not in raw.columns:
            raise UserError(f"{raw.where} has no column {name}{nearest(name, list(raw.columns))}")
        columns[name] = agreed(raw.columns[name], column.categories is None, f"{raw.where}: column {name}")
    return replace(raw, columns=columns)


def agreed(cells: NDArray[Any], numbers: bool, what: str) -> NDArray[Any]:
    """Return the cells with the type that the training samples have: numbers, or categories."""
    if numbers == (cells.dtype != object):
        return cells
    if numbers:
        bad = next((row for row, cell in enumerate(cells) if cell is not None and not _is_number(cell)), None)
        if bad is not None:
            raise UserError(f"{what} is '{cells[bad]}' in row {bad}, but a number in the training samples")
        return np.array([np.nan if cell is None else float(cell) for cell in cells], np.float64)
    texts = [None if np.isnan(c) else str(int(c)) if float(c).is_integer() else str(c) for c in cells]
    return np.array(texts, object)


def _labels(
    column: pa.ChunkedArray, what: str, regression: bool, class_names: list[str] | None
) -> tuple[Labels, list[str] | None]:
    values = to_array(column, what, "target" if regression else "label")
    if not regression:
        return class_labels(np.char.strip(values) if values.dtype.kind == "U" else values, what, class_names)
    if values.dtype.kind not in "iuf":
        raise UserError(f"{what} must hold numbers, not {column.type}, because data.task is regression")
    return values.astype(np.float32), None
