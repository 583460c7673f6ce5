"""Inputs for prediction: images, arrays, table rows or texts, in batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advtrain.data.arrays import LABEL_NAMES, SAMPLE_NAMES, SPLITS, class_labels, find_array, read_arrays
from advtrain.data.images import IMAGE_SUFFIXES, is_hidden, list_images
from advtrain.data.parquet import index_parquet
from advtrain.data.sources import channels_first
from advtrain.data.stream import ImageIndex, decode_batch
from advtrain.data.table_files import read_unlabelled
from advtrain.data.tables import TableSpec, encode
from advtrain.data.text_files import SUFFIXES, read_unlabelled_texts
from advtrain.data.texts import TextSpec, encode_texts, require_texts
from advtrain.errors import UserError
from advtrain.text import readable


@dataclass(frozen=True)
class Inputs:
    """Samples for a model with inputs (N, *shape): in memory, or indexed on disk."""

    names: list[str]  # path of the image, or number of the row
    shape: tuple[int, ...]
    arrays: NDArray[np.float32] | NDArray[np.uint8] | NDArray[np.int64] | None = None
    index: ImageIndex | None = None
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def tasks(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """Yield batches that `decode` can process on any machine with access to the files."""
        for first in range(0, len(self), batch_size):
            rows = np.arange(first, min(first + batch_size, len(self)))
            if self.arrays is not None:
                yield {"row": rows, "arrays": self.arrays[rows]}
            else:
                assert self.index is not None
                files = [os.fsencode(self.index.files[f]) for f in self.index.file[rows]]
                yield {
                    "row": rows,
                    "files": files,
                    "group": self.index.group[rows],
                    "offset": self.index.offset[rows],
                    "column": self.index.column,
                }


def decode(task: dict[str, Any], shape: tuple[int, ...]) -> NDArray[np.float32] | NDArray[np.int64]:
    """Return a task's samples, (n, *shape) float32 in [0, 1], or token ids (n, L) int64.

    Raises:
        UserError: an image cannot be decoded.
    """
    x = task["arrays"] if "arrays" in task else decode_batch(task, shape[0], shape[1], None, [])
    if x.dtype == np.int64:
        return np.asarray(x, np.int64)
    return np.asarray(x / np.float32(255) if x.dtype == np.uint8 else x, np.float32)


def read_inputs(
    path: Path,
    shape: tuple[int, ...],
    class_names: list[str] | None = None,
    table: TableSpec | None = None,
    text: TextSpec | None = None,
) -> Inputs:
    """Read samples from an image, a folder of images or parquet, .npz, .npy, .csv or .parquet.

    A model of texts takes .txt with a text in each line, or a column of .csv, .tsv, .jsonl or .parquet.

    Images are converted to the model's channels and resized to its input size, as in an evaluation. Arrays must have
    the model's input shape. The rows of a .csv or .parquet are scaled as `table` says. Labels that are texts are looked
    up in `class_names`, the names of the model's classes.

    Raises:
        UserError: the path has no samples, a shape does not match, or values are outside [0, 1].
    """
    if not path.exists():
        kinds = "an image, a folder, .npz, .npy, .csv or .parquet"
        if text is not None:
            kinds = ", ".join(f".{suffix}" for suffix in SUFFIXES)
        raise UserError(f"'{path}' does not exist; pass {kinds}")
    if text is not None:
        return text_inputs(read_unlabelled_texts(path, text.column), text, f"'{path}'")
    if path.suffix in (".npz", ".npy"):
        return _arrays(path, shape, class_names)
    if path.suffix == ".csv" or table is not None:
        return _table(path, shape, class_names, table)
    parquets, images, skipped = _files(path)
    if not parquets and not images:
        passed = "".join(f"; {reason}: {len(files):,}" for reason, files in skipped.items())
        raise UserError(
            f"'{path}' holds no images and no parquet; pass an image, a folder, .npz, .npy, .csv or .parquet{passed}"
        )
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UserError(
            f"the model takes samples of shape {shape}, not square images; pass an .npz with such samples"
        )
    if parquets:
        try:
            index = index_parquet(parquets, class_names=class_names, labelled=False)
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            raise UserError(f"'{path}' is not a readable parquet file: {error}") from error
        names = [str(row) for row in range(len(index.labels))]
        known = len(names) > 0 and index.labels.min() >= 0
        return Inputs(names, shape, index=index, labels=index.labels if known else None)
    n, files = len(images), [str(p) for p in images]
    index = ImageIndex(files, np.arange(n), np.full(n, -1), np.zeros(n, np.int64), np.full(n, -1))
    return Inputs([readable(file) for file in files], shape, index=index)


def text_inputs(texts: Sequence[str], text: TextSpec, where: str) -> Inputs:
    """Return the token ids of texts; `where` names their origin in errors.

    Raises:
        UserError: `texts` is no list of texts, or one has no tokens.
    """
    require_texts(texts, where)
    ids, _, _ = encode_texts(text, texts, where)
    return Inputs([readable(each) for each in texts], ids.shape[1:], arrays=ids)


def _table(
    path: Path, shape: tuple[int, ...], class_names: list[str] | None, table: TableSpec | None
) -> Inputs:
    """Return the scaled rows of a .csv or .parquet."""
    if table is None:
        raise UserError(
            f"'{path}' is a table; the model takes samples {shape}: pass an .npz with such samples"
        )
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(
            f"the model takes rows with the columns {', '.join(c.name for c in table.columns)}; pass them as .csv or "
            f".parquet, not '{path}'"
        )
    raw, labelled = read_unlabelled([path], table, class_names)
    x, _, _ = encode(table, raw)
    labels = raw.labels.astype(np.int64) if labelled else None
    return Inputs([str(row) for row in range(len(x))], shape, arrays=x, labels=labels)


def _files(path: Path) -> tuple[list[Path], list[Path], dict[str, list[Path]]]:
    """Return parquet files, images, and the files that are not read by reason; hidden files are not read."""
    if path.is_dir():
        images, skipped = list_images(path)
        return sorted(p for p in path.glob("*.parquet") if not is_hidden(p.name)), images, skipped
    suffix = path.suffix.lower()
    return [path] * (suffix == ".parquet"), [path] * (suffix in IMAGE_SUFFIXES), {}


def _arrays(path: Path, shape: tuple[int, ...], class_names: list[str] | None) -> Inputs:
    arrays = read_arrays(path)
    splits = ("", *SPLITS["test"])
    key = find_array(arrays, SAMPLE_NAMES, splits)
    if key is None:
        raise UserError(
            f"'{path}' has {', '.join(sorted(arrays)) or 'nothing'}; expected {' or '.join(SAMPLE_NAMES)}, or x_test"
        )
    x = channels_first(arrays[key], f"'{path}': {key}")
    if len(x) == 0:
        raise UserError(f"'{path}': {key} holds no samples")
    if tuple(x.shape[1:]) != shape:
        raise UserError(f"'{path}': {key} holds samples {tuple(x.shape[1:])}; the model takes {shape}")
    if x.dtype != np.uint8 and len(bad := np.flatnonzero(~((x >= 0) & (x <= 1)).reshape(len(x), -1).all(1))):
        raise UserError(
            f"'{path}': sample {bad[0]} of {key} has values outside [0, 1]; store 8-bit values as uint8"
        )
    names = [str(row) for row in range(len(x))]
    label = find_array(arrays, LABEL_NAMES, splits)
    if label is None or (class_names is None and arrays[label].dtype.kind == "f"):  # targets of a regression
        return Inputs(names, shape, arrays=x)
    labels, _ = class_labels(arrays[label], f"'{path}': {label}", class_names)
    if len(labels) != len(x):
        raise UserError(f"'{path}': {key} has {len(x)} samples but {label} has {len(labels)}")
    return Inputs(names, shape, arrays=x, labels=labels)
