"""List columns of parquet tables: lists of numbers become a column for each value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from advtrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

#: Largest number of values of a list that become features.
MOST_VALUES = 4_096


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column holds lists, of any length."""
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def spread_lists(rows: pa.Table, label: str, where: str) -> tuple[pa.Table, dict[str, list[str]]]:
    """Replace each column of lists of numbers by a column for each value.

    Lists of other values, of several lengths or with too many values stay as they are (`refuse_list`).

    Args:
        rows: the table.
        label: name of the column of labels, which stays as it is.
        where: name of the table for errors.

    Returns:
        The table, and the names of the new columns, such as `v[0]` and `v[1]`, by the name of the list column.

    Raises:
        UserError: the table already has a column of such a name.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns: dict[str, pa.ChunkedArray] = {}
    parts: dict[str, list[str]] = {}
    for name in rows.column_names:
        column = rows[name]
        low, high = _lengths(column) if name != label and _holds_numbers(column.type) else (0, 0)
        if low != high or not 0 < high <= MOST_VALUES:
            columns[name] = column
            continue
        parts[name] = [f"{name}[{number}]" for number in range(high)]
        if taken := set(parts[name]) & {*rows.column_names, *columns}:
            raise UserError(
                f"{where} has a column {min(taken)}, and a list column {name}; rename one of them"
            )
        columns |= {part: pc.list_element(column, number) for number, part in enumerate(parts[name])}
    return pa.table(columns) if parts else rows, parts


def check_lengths(lists: Mapping[str, int], trained: Mapping[str, int], where: str) -> None:
    """Raise UserError if the lists of a column are not as long as those of the training samples.

    Args:
        lists: length of the lists of each list column.
        trained: the same of the training samples.
        where: name of the table for errors.
    """
    for name in lists.keys() & trained.keys():
        if lists[name] != trained[name]:
            raise UserError(
                f"{where}: column {name} holds lists of {lists[name]:,} numbers, those of the training samples have "
                f"{trained[name]:,}"
            )


def refuse_list(column: pa.ChunkedArray, what: str) -> NoReturn:
    """Raise UserError for a list column that cannot become features, with what would be right."""
    kind = column.type.value_type
    if is_list(kind):
        raise UserError(
            f"{what} holds lists of lists, such as the pixels of images; store each image as an encoded file (bytes of "
            "a PNG), or save an .npz with x (N, H, W) or (N, C, H, W)"
        )
    if not _holds_numbers(column.type):
        raise UserError(f"{what} holds lists of {kind}; lists become features if they hold numbers")
    low, high = _lengths(column)
    if low != high:
        raise UserError(
            f"{what} holds lists of {low:,} to {high:,} numbers; every row needs the same number, one for each feature"
        )
    raise UserError(
        f"{what} holds lists of {high:,} numbers; 1 to {MOST_VALUES:,} become features; save an .npz with x (N, F) or "
        "images"
    )


def _holds_numbers(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if not is_list(kind):
        return False
    value = kind.value_type
    return bool(
        pa.types.is_integer(value)
        or pa.types.is_floating(value)
        or pa.types.is_decimal(value)
        or pa.types.is_boolean(value)
    )


def _lengths(column: pa.ChunkedArray) -> tuple[int, int]:
    """Return the smallest and the largest length of the lists; 0 without any."""
    import pyarrow.compute as pc

    ends = pc.min_max(pc.list_value_length(column)).as_py()
    return ends["min"] or 0, ends["max"] or 0
