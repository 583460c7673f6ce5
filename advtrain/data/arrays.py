"""Arrays from .npz and .npy files, and class labels, with bounds on what a file may ask for."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advtrain.errors import UserError
from advtrain.recipe.data import MOST_CLASSES

#: Names of sample and label arrays in an .npz; alone, or with a split, as in x_train or train_images.
SAMPLE_NAMES, LABEL_NAMES = (
    ("x", "X", "images", "image", "inputs", "data"),
    ("y", "labels", "label", "targets", "target"),
)
#: Names of the splits.
SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz by name; the one of an .npy is called x.

    Raises:
        UserError: the file is damaged, holds Python objects, or needs more memory than the machine has.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                needed = sum(member.file_size for member in archive.infolist())
            if needed > memory:
                raise UserError(f"'{path}' needs {needed:,} bytes of memory; this machine has {memory:,}")
        found = np.load(path, allow_pickle=False)
        return {"x": found} if isinstance(found, np.ndarray) else {key: found[key] for key in found.files}
    # NumPy parses the header as Python and allocates what it asks for, so a damaged one raises many kinds.
    except (
        ValueError,
        OSError,
        EOFError,
        MemoryError,
        SyntaxError,
        TypeError,
        KeyError,
        OverflowError,
    ) as error:
        reason = str(error)
        if "Object arrays cannot be loaded" in reason:
            reason = (
                "an array has dtype object, which is a pickle and is never loaded; store numbers, booleans or text, "
                "for example y.astype(str), and images of one size"
            )
        raise UserError(f"'{path}' is not a readable file of plain arrays: {reason}") from error
    except (zlib.error, zipfile.BadZipFile, tokenize.TokenError, RuntimeError) as error:
        raise UserError(f"'{path}' is no intact .npz or .npy: {error}") from error


def find_array(
    arrays: Mapping[str, object], names: Sequence[str], splits: Sequence[str] = ("",)
) -> str | None:
    """Return the first key that is one of the names, alone (split ""), or with a split."""
    for name in names:
        for split in splits:
            for key in (f"{name}_{split}", f"{split}_{name}") if split else (name,):
                if key in arrays:
                    return key
    return None


def class_labels(
    values: NDArray[Any], what: str, names: list[str] | None = None
) -> tuple[NDArray[np.int64], list[str] | None]:
    """Return labels (N,) as int64, and the class names if the labels have any.

    Args:
        values: (N,) or (N, 1) integers, whole floats, booleans or text; or (N, K) one-hot rows. The distinct texts,
            sorted, are the classes.
        what: name of the labels in errors.
        names: class names of the training split or of the model, in which texts are looked up.

    Raises:
        UserError: a value is no label, or a text is not in `names`.
    """
    if values.ndim == 2 and values.shape[1] > 1:
        return _one_hot(values, what, names)
    if values.ndim != 1 and values.shape[1:] != (1,):
        raise UserError(
            f"{what} has shape {values.shape}; labels are (N,), (N, 1), or one-hot rows (N, classes)"
        )
    flat = values.reshape(-1)
    if flat.dtype.kind == "b":
        names = names or ["False", "True"]
        flat = np.where(flat, "True", "False") if "True" in names else flat.astype(np.int64)
    if flat.dtype.kind in "US":
        return _named(flat, what, names)
    if flat.dtype.kind not in "iuf":
        raise UserError(f"{what} must hold integers, whole floats, booleans or text, not {flat.dtype}")
    if flat.dtype.kind == "f" and len(bad := np.flatnonzero(~(np.isfinite(flat) & (flat == np.floor(flat))))):
        raise UserError(
            f"{what}: label {flat[bad[0]]} of sample {bad[0]} is not a whole number; labels are integers from 0 "
            "(for regression targets set data.task: regression)"
        )
    if len(flat) and int(flat.max()) >= MOST_CLASSES:
        row = int(flat.argmax())
        raise UserError(
            f"{what}: label {flat[row]} of sample {row} is too large; labels are 0 to K - 1 for K classes, and at most "
            f"{MOST_CLASSES:,} classes"
        )
    return flat.astype(np.int64), names


def _one_hot(values: NDArray[Any], what: str, names: list[str] | None) -> tuple[NDArray[np.int64], list[str]]:
    """Return the labels of one-hot rows (N, K), numbers or booleans, and K names."""
    names = names or [str(number) for number in range(values.shape[1])]
    if len(names) != values.shape[1]:
        raise UserError(f"{what} has rows of {values.shape[1]} values, but there are {len(names)} classes")
    if values.dtype.kind not in "biuf":
        raise UserError(f"{what}: one-hot rows must hold numbers or booleans, not {values.dtype}")
    is_one = values == 1
    bad = np.flatnonzero((is_one.sum(1) != 1) | ~(is_one | (values == 0)).all(1))
    if len(bad):
        raise UserError(
            f"{what}: row {bad[0]} is {values[bad[0]].tolist()[:10]}; a row of labels must be one-hot, with a single 1 "
            "and zeros elsewhere (labels of several classes and soft labels are not supported)"
        )
    return values.argmax(1).astype(np.int64), names


def _named(
    flat: NDArray[Any], what: str, names: list[str] | None
) -> tuple[NDArray[np.int64], list[str] | None]:
    """Return the labels of texts (N,) and the class names."""
    if flat.dtype.kind == "S":
        flat = np.char.decode(flat, "utf-8", "replace")
    distinct, inverse = np.unique(flat, return_inverse=True)
    texts = [str(text) for text in distinct]
    if "" in texts:
        row = int(np.argmax(flat == ""))
        raise UserError(f"{what}: the label of sample {row} is empty; every sample needs one")
    if len(texts) > MOST_CLASSES:
        raise UserError(f"{what} has {len(texts):,} distinct texts; at most {MOST_CLASSES:,} classes")
    if names is None:
        numbers = all(text.isdecimal() for text in texts)  # 2 comes before 10
        names = sorted(texts, key=lambda text: (int(text), text)) if numbers else texts
    place = {name: number for number, name in enumerate(names)}
    if unknown := [text for text in texts if text not in place]:
        row = int(np.argmax(flat == unknown[0]))
        raise UserError(
            f"{what}: label '{unknown[0]}' of sample {row} is no class of the training samples; "
            f"the classes are {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        )
    return np.array([place[text] for text in texts], np.int64)[inverse.reshape(-1)], names
