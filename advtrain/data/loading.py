"""Loading of the samples that the data settings of a recipe name."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from advtrain.data.adapt import fit_images, keep_classes
from advtrain.data.request import Request, Source
from advtrain.data.sources import BUILT_IN_IMAGES, IMAGE_FILES, SOURCES, holds_table
from advtrain.data.survey import ImageSettings
from advtrain.errors import UserError, find
from advtrain.recipe.data import TABLE_FILES, TEXT_SOURCES, DataConfig
from advtrain.text import readable
from advtrain.user_paths import user_path

#: Sources to which a field applies.
_FOR_SOURCES = {
    "image": ("npz", "parquet"),
    "label": ("npz", "csv", "parquet", "text"),
    "text": ("text",),
    "encoding": TEXT_SOURCES,
    "tokenizer": TEXT_SOURCES,
    "vocabulary": TEXT_SOURCES,
    "max_length": TEXT_SOURCES,
    "group_by_length": TEXT_SOURCES,
    "features": ("csv", "parquet"),
    "scale": TABLE_FILES,
    "center_crop": BUILT_IN_IMAGES,
    "image_size": (*BUILT_IN_IMAGES, *IMAGE_FILES),
    "channels": (*BUILT_IN_IMAGES, *IMAGE_FILES),
}


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


def _request(
    config: DataConfig,
    root: Path,
    class_names: list[str] | None = None,
    known: tuple[str | None, str | None] = (None, None),
) -> Request:
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
        config.text,
        config.encoding,
        known=known,
    )


def load_source(
    config: DataConfig,
    root: Path,
    class_names: list[str] | None = None,
    known: tuple[str | None, str | None] = (None, None),
) -> Source:
    """Load the samples of a data set, neither split nor checked.

    Args:
        config: settings of the data.
        root: data root.
        class_names: classes of a model, in which the classes of the data are looked up.
        known: columns of a model's texts and labels, which come before the usual names.

    Raises:
        UserError: the data is missing, or a setting does not apply to its source.
    """
    load = find(SOURCES, config.source, "data source")
    for name, sources in _FOR_SOURCES.items():
        if getattr(config, name) not in (None, False) and config.source not in sources:
            raise UserError(f"data.{name} does not apply to {config.source}; it is for {', '.join(sources)}")
    if config.source not in IMAGE_FILES and config.on_error != "stop":
        raise UserError(f"data.on_error is for parquet and image_folder, not {config.source}")
    request = _request(config, root, class_names if config.classes is None else None, known)
    source = load(request)
    if config.task == "regression" and source.num_classes != 0:
        raise UserError(f"data.task regression is for npz and tables; {config.source} has labels")
    if config.source in BUILT_IN_IMAGES:
        fit = partial(fit_images, settings=request.images, crop=config.center_crop)
        source = replace(
            source, train=fit(source.train), test=None if source.test is None else fit(source.test)
        )
    if config.classes is None:
        return source
    source = keep_classes(source, config.classes)
    if class_names is not None and source.class_names != class_names:
        raise UserError(
            f"data.classes keeps {source.class_names}, but the classes of the model are {class_names}"
        )
    return source
