"""Data settings for a path, or for the name of a built-in data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from advtrain.data import DataConfig
from advtrain.data.images import IMAGE_SUFFIXES, is_hidden
from advtrain.data.parquet import refuse_arrow
from advtrain.data.sources import SOURCES
from advtrain.errors import UserError, nearest
from advtrain.user_paths import as_written, user_path

#: Suffix of a data file -> its source.
SUFFIXES = {
    ".npz": "npz",
    ".csv": "csv",
    ".parquet": "parquet",
    ".tsv": "text",
    ".jsonl": "text",
    ".txt": "text",
}

#: Suffixes by which a folder is recognized, in this order.
_KINDS = ("parquet", "csv", "tsv", "jsonl", "txt")


def data_config(text: str, root: Path, **settings: Any) -> DataConfig:
    """Return the data settings of a built-in data set or a path.

    A folder with parquet files, also in data/ or train/, or with csv files is read as such. A folder with tsv, jsonl
    or txt files and no images below it is read as texts, and any other folder as images. Set `source="text"` for texts
    in parquet or csv.

    Args:
        text: name of a source, or a path, absolute, relative to the working folder, or relative to `root`.
        root: data root.
        settings: further fields of DataConfig.

    Raises:
        UserError: there is no such data set, file or folder, or it is of no known kind.
    """
    given = user_path(text, "the data")
    path = next((place.resolve() for place in (given, root / given) if place.exists()), None)
    if path is None or (text in SOURCES and not given.exists()):
        built_in = [name for name in SOURCES if name not in (*SUFFIXES.values(), "image_folder")]
        if text not in built_in:
            raise UserError(
                f"no data '{text}': there is no such file or folder, and no built-in data set of that name"
                f"{nearest(text, built_in)}"
            )
        return DataConfig(source=text, **settings)
    if path.is_dir():
        source = next((SUFFIXES[f".{kind}"] for kind in _KINDS if _holds(path, kind)), "image_folder")
        if source == "image_folder":
            refuse_arrow(path)
        if source == "text" and any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
            source = "image_folder"  # the file of text describes the images
    elif (suffix := path.suffix.lower()) in SUFFIXES:
        source = SUFFIXES[suffix]
    else:
        raise UserError(
            f"'{text}' is no data set that can be read; pass a folder of images, tables or texts, or a file: "
            f"{', '.join(SUFFIXES)}"
        )
    return DataConfig(**{"source": source, "path": as_written(path), **settings})


def _holds(path: Path, kind: str) -> bool:
    """Return whether a folder has files of a kind; parquet also in the folders of data sets of Hugging Face."""
    patterns = [f"*.{kind}", *(f"{folder}/*.{kind}" for folder in ("data", "train") if kind == "parquet")]
    return any(not is_hidden(file.name) for pattern in patterns for file in path.glob(pattern))
