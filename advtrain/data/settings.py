"""Settings of the data in a recipe, and the loading of the samples that they name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from advtrain.data.arrays import MOST_CLASSES
from advtrain.data.augment import AugmentConfig
from advtrain.data.sources import IMAGE_FILES, SOURCES, Request, Source, holds_table
from advtrain.data.survey import ImageSettings
from advtrain.errors import UserError, find
from advtrain.schema import Config, Number
from advtrain.text import readable
from advtrain.user_paths import user_path

#: Keys that earlier versions lack, with their defaults, which are not part of the digest.
LATER_KEYS = {
    "image": None,
    "label": None,
    "channels": None,
    "on_error": "stop",
    "features": None,
    "scale": None,
    "missing": "stop",
}
#: Sources to which a field applies.
_FOR_SOURCES = {
    "image": ("npz", "parquet"),
    "label": ("npz", "csv", "parquet"),
    "features": ("csv", "parquet"),
    "scale": ("npz", "csv", "parquet"),
}


class DataConfig(Config):
    """Data set and its split."""

    source: str
    """digits, mnist, fashion_mnist, cifar10, cifar100, svhn, npz, csv, parquet or image_folder; regressions: diabetes,
    friedman1, linear"""
    task: Literal["classification", "regression"] = "classification"
    """type of the labels of npz, csv and parquet tables: class labels or regression targets"""
    path: str | None = None
    """file or folder of npz, csv, parquet or image_folder: absolute, or relative to the data root; ~
    and $VAR are expanded"""
    download: bool = False
    """allow torchvision to download the data set into the data root"""
    stream: bool = False
    """read parquet or image_folder data from disk in every epoch instead of keeping it in memory"""
    image_size: int | None = Field(default=None, ge=1)
    """side in pixels of resized parquet or image_folder images; null: the side of all images, which must be equal"""
    channels: Literal[1, 3] | None = None
    """channels of parquet or image_folder images, 1 (gray) or 3 (RGB); null: 3 if any image has color, else 1"""
    on_error: Literal["stop", "skip"] = "stop"
    """parquet or image_folder image that cannot be decoded: stop with an error that names it, or skip it, for which
    all images are decoded once more"""
    image: str | None = None
    """name of the array or column of samples in npz or parquet data; null: the first usual name, such as x or image"""
    label: str | None = None
    """name of the array or column of labels in npz, csv or parquet data; null: the first usual name, such as y or
    label; a table in csv or parquet needs it"""
    features: list[str] | None = None
    """columns of a csv or parquet table that the model sees; null: all but data.label"""
    scale: Literal["minmax", "standard"] | None = None
    """scaling of a table's columns to [0, 1] by the training samples, also of npz tables (N, F); minmax, the default of
    csv and parquet: their range is 1; standard: a standard deviation is 0.1 and the mean 0.5"""
    missing: Literal["stop", "impute"] = "stop"
    """missing values of a table: an error, or the median or most frequent value of the training samples"""
    num_classes: int | None = Field(default=None, ge=2, le=MOST_CLASSES)
    """number of classes of npz, csv or parquet data; null: largest label + 1, and every class needs training samples"""
    validation_fraction: Number = Field(default=0.1, gt=0, lt=1)
    """share of the training samples held out for validation"""
    test_fraction: Number = Field(default=0.2, gt=0, lt=1)
    """share of all samples held out for testing if the source has no test split"""
    split_seed: int = Field(default=0, ge=0)
    """seed of the validation and test splits"""
    augment: AugmentConfig = AugmentConfig()
    """random crop and flip of training images"""

    def at(self, path: str | None) -> DataConfig:
        """Return the settings with another path; None: unchanged."""
        return self if path is None else self.model_copy(update={"path": path})


def file_name(config: DataConfig, root: Path) -> str | None:
    """Return the own name of the file or folder of the data; None for a built-in data set."""
    if config.path is None:
        return None
    path = Path(os.path.abspath(root / user_path(config.path, "data.path")))
    return readable(path.name) + "/" * path.is_dir()


def is_table(config: DataConfig, root: Path) -> bool:
    """Return whether the data is a table that is scaled.

    Of parquet files, the first one is opened.

    Raises:
        UserError: the parquet file is missing or damaged.
    """
    if config.source == "parquet":
        return holds_table(_request(config, root))
    return config.source == "csv" or (config.source == "npz" and config.scale is not None)


def _request(config: DataConfig, root: Path, class_names: list[str] | None = None) -> Request:
    return Request(
        root,
        user_path(config.path, "data.path") if config.path else None,
        config.download,
        config.stream,
        ImageSettings(config.channels, config.image_size, config.on_error == "skip"),
        config.task == "regression",
        config.image,
        config.label,
        class_names,
        config.features,
        config.scale is not None,
    )


def load_source(config: DataConfig, root: Path, class_names: list[str] | None = None) -> Source:
    """Load the samples of a data set, neither split nor checked.

    Args:
        class_names: classes of a model, in which the classes of the data are looked up.

    Raises:
        UserError: the data is missing, or a setting does not apply to its source.
    """
    load = find(SOURCES, config.source, "data source")
    for name, sources in _FOR_SOURCES.items():
        if getattr(config, name) is not None and config.source not in sources:
            raise UserError(f"data.{name} does not apply to {config.source}; it is for {', '.join(sources)}")
    if config.source not in IMAGE_FILES and (config.channels, config.on_error) != (None, "stop"):
        raise UserError(
            f"data.channels and data.on_error are for parquet and image_folder, not {config.source}"
        )
    source = load(_request(config, root, class_names))
    if config.task == "regression" and source.num_classes != 0:
        raise UserError(f"data.task regression is for npz and tables; {config.source} has labels")
    return source
