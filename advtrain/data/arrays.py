"""Arrays from .npz and .npy files, and class labels, with bounds on what a file may ask for."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advtrain.errors import UserError

#: Most classes: each is an output of the model, so a label of 10^9 by mistake would take gigabytes.
MOST_CLASSES = 100_000


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
        raise UserError(f"'{path}' is not a readable file of plain arrays: {error}") from error
    except (zlib.error, zipfile.BadZipFile, tokenize.TokenError, RuntimeError) as error:
        raise UserError(f"'{path}' is no intact .npz or .npy: {error}") from error


def class_labels(values: NDArray[Any], what: str) -> NDArray[np.int64]:
    """Return integer labels (N,) of any width as int64.

    Raises:
        UserError: a label is MOST_CLASSES or more; `what` names the labels.
    """
    flat = values.reshape(-1)
    if len(flat) and int(flat.max()) >= MOST_CLASSES:
        row = int(flat.argmax())
        raise UserError(
            f"{what}: label {flat[row]} of sample {row} is too large; labels are 0 to K - 1 for K classes, and at most "
            f"{MOST_CLASSES:,} classes"
        )
    return flat.astype(np.int64)
