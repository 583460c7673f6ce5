"""Parquet files of images: columns of images and labels, class names, and an index of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from advtrain.data.arrays import SPLITS, class_labels
from advtrain.data.batches import Rows
from advtrain.data.images import is_hidden
from advtrain.data.lists import is_list
from advtrain.data.stream import ImageIndex
from advtrain.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

#: Usual names of the columns, as in data sets of Hugging Face; the first one that a file has is used.
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")
#: Most rows of a parquet file: their numbers are held in memory.
MOST_ROWS = 10**9


def split_files(
    path: Path, suffix: str, splits: Mapping[str, tuple[str, ...]] = SPLITS
) -> dict[str, list[Path]]:
    """Return the files of each split in a folder: train*, data/train* or train/*, and so on.

    Args:
        path: the folder.
        suffix: the files' suffix, without the dot.
        splits: starts of the names of the files of each split.

    Raises:
        UserError: there is no training file, or a file of a numbered series is missing.
    """
    found = {
        part: sorted({file for name in spellings for file in _files(path, name, suffix)})
        for part, spellings in splits.items()
    }
    if not found["train"]:
        refuse_arrow(path)
        raise UserError(f"no train*.{suffix} in '{path}', '{path}/data' or '{path}/train'")
    for files in found.values():
        _require_series(files)
    return {part: files for part, files in found.items() if files}


def refuse_arrow(path: Path) -> None:
    """Raise UserError if a folder holds the arrow files that `save_to_disk` of datasets writes."""
    if any(next(path.glob(pattern), None) for pattern in ("*.arrow", "*/*.arrow")):
        raise UserError(
            f"'{path}' holds arrow files, as `save_to_disk` of the package datasets writes them; save each split of "
            "datasets.load_from_disk as parquet, for example with data['train'].to_parquet('train.parquet')"
        )


def _files(path: Path, name: str, suffix: str) -> list[Path]:
    patterns = (f"{name}*.{suffix}", f"data/{name}*.{suffix}", f"{name}/*.{suffix}")
    return [file for pattern in patterns for file in path.glob(pattern) if not is_hidden(file.name)]


def _require_series(files: Sequence[Path]) -> None:
    """Raise UserError unless files NAME-00000-of-00002 and so on are complete."""
    series: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if match := re.search(r"^(.*)-(\d+)-of-(\d+)\b", file.name):
            key = (file.parent, match[1], int(match[3]))
            series.setdefault(key, set()).add(int(match[2]))
    for (folder, name, count), present in series.items():
        if missing := sorted(set(range(min(count, 100_000))) - present):
            raise UserError(
                f"'{folder}' has {len(present)} of {count} files of '{name}'; file {missing[0]} is missing"
            )


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Convert what pyarrow raises on a damaged file into a UserError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise UserError(f"'{path}' is not a readable parquet file: {error}") from error


def open_parquet(path: Path) -> Any:
    """Open a parquet file; raise UserError if it is damaged or too long."""
    import pyarrow.parquet as pq

    with reading_parquet(path):
        file = pq.ParquetFile(path)
    if file.metadata.num_rows > MOST_ROWS:
        raise UserError(f"'{path}' claims {file.metadata.num_rows:,} rows; at most {MOST_ROWS:,} are read")
    return file


def read_column(path: Path, name: str) -> pa.ChunkedArray:
    """Return a column of a parquet file.

    Raises:
        UserError: the file is damaged.
    """
    file = open_parquet(path)
    with reading_parquet(path):
        return file.read(columns=[name])[name]


def values(path: Path, name: str) -> Iterator[Any]:
    """Yield the values of a column, of which one row group at a time is in memory.

    Raises:
        UserError: the file is damaged.
    """
    file = open_parquet(path)
    for group in range(file.num_row_groups):
        with reading_parquet(path):
            column = file.read_row_group(group, columns=[name])[name].to_pylist()
        yield from column


def image_column(schema: pa.Schema, image: str | None) -> str | None:
    """Return the name of the image column: `image`, or the first usual one that holds bytes."""
    names = [image] if image else IMAGE_COLUMNS
    return next((n for n in names if n in schema.names and _holds_images(schema.field(n).type)), None)


def _holds_images(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def index_parquet(
    paths: list[Path],
    *,
    image: str | None = None,
    label: str | None = None,
    class_names: list[str] | None = None,
    labelled: bool = True,
) -> ImageIndex:
    """Index parquet files with a column of images and one of labels.

    Images are encoded: struct{bytes, path} or binary. Class names are those of the schema (Hugging Face's ClassLabel),
    or the sorted texts of the column.

    Args:
        paths: the files, in order.
        image, label: names of the columns; None: the first usual names.
        class_names: class names of the training split or of the model.
        labelled: whether labels are required; without, missing labels are -1.

    Raises:
        UserError: a file is damaged, lacks a column, numbers the classes in another order, or has a value that is no
            label.
    """
    file: list[Rows] = []
    group: list[Rows] = []
    offset: list[Rows] = []
    labels: list[NDArray[Any]] = []
    column = None
    for number, path in enumerate(paths):
        table = open_parquet(path)
        here = _image_name(table.schema_arrow, image, path)
        if column not in (None, here):
            raise UserError(f"'{path}' has its images in the column {here}, '{paths[0]}' in {column}")
        column = here
        name = label_column(table.schema_arrow, label, path, required=labelled)
        declared = declared_names(table.schema_arrow, name)
        _require_order(declared, class_names, path)
        class_names = class_names or declared
        values = None if name is None else _label_values(table, name, path, required=labelled)
        labels.append(np.full(table.metadata.num_rows, -1) if values is None else values)
        for g in range(table.metadata.num_row_groups):
            n = table.metadata.row_group(g).num_rows
            file.append(np.full(n, number))
            group.append(np.full(n, g))
            offset.append(np.arange(n))
    numbers, class_names = _together(labels, paths, class_names)
    return ImageIndex(
        files=[str(p) for p in paths],
        file=np.concatenate([np.zeros(0, np.int64), *file]),
        group=np.concatenate([np.zeros(0, np.int64), *group]),
        offset=np.concatenate([np.zeros(0, np.int64), *offset]),
        labels=numbers,
        class_names=class_names,
        column=column or "image",
    )


def _image_name(schema: pa.Schema, image: str | None, path: Path) -> str:
    name = image_column(schema, image)
    if name is not None:
        return name
    image = image or next(
        (n for n in IMAGE_COLUMNS if n in schema.names and is_list(schema.field(n).type)), None
    )
    if image is None:
        raise UserError(
            f"'{path}' lacks a column of images ({', '.join(IMAGE_COLUMNS)}); its columns are {_columns(schema)}; "
            "set data.image, or data.source=text for texts"
        )
    if image in schema.names:
        table = "; for a table with lists of numbers set data.label, not data.image"
        raise UserError(
            f"'{path}': the column {image} holds {schema.field(image).type}; images are encoded files, in binary or "
            f"struct{{bytes, path}}{table if is_list(schema.field(image).type) else ''}"
        )
    raise UserError(f"'{path}' has no column {image}{nearest(image, schema.names)}; set data.image")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(schema.names[:20]) + (", ..." if len(schema.names) > 20 else "")


def label_column(schema: pa.Schema, label: str | None, path: Path, *, required: bool) -> str | None:
    """Return the name of the label column: `label`, or the first usual one.

    Raises:
        UserError: the column is required and missing.
    """
    names = [label] if label else LABEL_COLUMNS
    found = next((name for name in names if name in schema.names), None)
    if found is None and required:
        what = f"the column {label}" if label else f"a column of labels ({', '.join(LABEL_COLUMNS)})"
        raise UserError(f"'{path}' lacks {what}; its columns are {_columns(schema)}; set data.label")
    return found


def declared_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    """Return the class names that Hugging Face's datasets library wrote into the schema."""
    try:
        written = json.loads((schema.metadata or {})[b"huggingface"])
        names = written["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if isinstance(names, list) and names and len(set(map(str, names))) == len(names):
        return [str(name) for name in names]
    return None


def _require_order(declared: list[str] | None, names: list[str] | None, path: Path) -> None:
    """Raise UserError if a file gives a class another number than `names`; a name that is not in `names` is allowed."""
    place = {name: number for number, name in enumerate(names or ())}
    for number, name in enumerate(declared or ()):
        known = place.get(name, number)
        if known != number:
            raise UserError(
                f"'{path}': class {number} is {name}, but in the earlier files or in the model {name} is class "
                f"{known}; store the labels as texts"
            )


def _label_values(table: Any, name: str, path: Path, *, required: bool) -> NDArray[Any] | None:
    """Return the labels of a file; None if they are not required and a label is null."""
    with reading_parquet(path):
        column = table.read(columns=[name])[name]
        if column.null_count and not required:
            return None
        return to_array(column, f"'{path}': the column {name}", "label")


def to_array(column: pa.ChunkedArray, what: str, value: str) -> NDArray[Any]:
    """Return a column without nulls as numbers, booleans or text.

    Raises:
        UserError: the column has a null or another type; `what` names the column and `value` one of its values.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.null_count:
        row = int(np.argmax(pc.is_null(column).to_numpy()))
        raise UserError(f"{what}: the {value} of row {row} is null; every sample needs one")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return np.array(column.to_pylist(), dtype=str)
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise UserError(f"{what} holds {kind}; expected integers, booleans or text")
    return np.asarray(column.to_numpy())


def _together(
    labels: list[NDArray[Any]], paths: list[Path], class_names: list[str] | None
) -> tuple[Rows, list[str] | None]:
    """Return the labels of all files as class numbers, and the class names."""
    filled = [(values, path) for values, path in zip(labels, paths, strict=True) if len(values)]
    if len(kinds := {values.dtype.kind.replace("u", "i") for values, _ in filled}) > 1:
        first = filled[0][0].dtype
        other = next((v.dtype, p) for v, p in filled if v.dtype.kind != first.kind)
        if not kinds <= {"i", "f"}:
            raise UserError(
                f"'{other[1]}' has labels of another type than '{filled[0][1]}': {other[0]}, {first}"
            )
    if not filled:
        return np.zeros(0, np.int64), class_names
    where = f"'{paths[0]}'" if len(paths) == 1 else f"'{paths[0].parent}', {len(paths)} files"
    return class_labels(np.concatenate([values for values, _ in filled]), where, class_names)
