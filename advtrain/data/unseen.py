"""Data that a finished model is evaluated on without having been trained with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from advtrain.data import DataConfig, Dataset, check_split, digest_of
from advtrain.data.batches import ArraySplit, Split
from advtrain.data.loading import file_name, load_source
from advtrain.data.sources import IMAGE_FILES
from advtrain.data.table_files import as_trained
from advtrain.data.tables import RawTable, TableSpec, encode, remarks
from advtrain.data.texts import RawText, TextSpec, TextSplit, to_splits
from advtrain.errors import UserError
from advtrain.recipe.data import TextShape


@dataclass(frozen=True)
class Accepts:
    """Data that a model accepts: shape of a sample, number of classes, and their names."""

    shape: tuple[int, ...]
    num_classes: int  # 0 for a regression
    class_names: list[str] | None = None  # None: the classes are called 0, 1, ...
    table: TableSpec | None = None  # columns of a table; None: images, or a table that is not scaled
    text: TextSpec | None = None  # tokenizer of texts


def load_unseen(config: DataConfig, root: Path, accepts: Accepts | None = None) -> Dataset:
    """Load data for an evaluation: its test split, or every sample if it has no split.

    Images from files get the size and channels of the model. Classes are matched by name; without names, they are
    called 0, 1, ... All three splits of the result are the same samples.

    Args:
        config: settings of the data.
        root: data root.
        accepts: the model's inputs and classes; None: those of the data.

    Raises:
        UserError: the data is missing, has other inputs, or has a class that the model lacks.
    """
    names = None
    if accepts is not None:
        config = fitted(config, accepts)
        names = accepts.class_names or [str(label) for label in range(accepts.num_classes)] or None
    text = None if accepts is None else accepts.text
    known = (None, None) if text is None else (text.column, text.label)
    source = load_source(config, root, names, known)
    found, raw = source.found, source.train if source.test is None else source.test
    if isinstance(raw, RawTable):
        split, notes = _scaled(raw, accepts)
        found = replace(found, notes=[*found.notes, *notes])
    elif isinstance(raw, RawText):
        if accepts is None or accepts.text is None:
            raise UserError(f"{raw.where} holds texts, but the model has no tokenizer for them")
        (split,), notes = to_splits(accepts.text, [raw])
        found = replace(found, notes=[*found.notes, *notes])
    else:
        split = raw
    classes = accepts.num_classes if accepts is not None else source.num_classes
    if classes is None:
        classes = config.num_classes or int(split.labels.max(initial=0)) + 1
    check_split(f"{config.source}, test samples", split, classes, config)
    if accepts is not None and split.shape != accepts.shape:
        raise UserError(
            f"the model has inputs {accepts.shape}; the samples of '{config.path or config.source}' are {split.shape}"
        )
    called = source.class_names if accepts is None else accepts.class_names
    return Dataset(
        config.source,
        split,
        split,
        split,
        classes,
        split.shape if accepts is None else accepts.shape,
        digest_of([split]),
        called,
        found,
        accepts.table if accepts is not None else None,
        file_name(config, root),
        accepts.text if accepts is not None else None,
        config.center_crop,
    )


def retokenized(dataset: Dataset, text: TextSpec | None) -> Dataset:
    """Return a data set whose test texts are encoded with the tokenizer of another model.

    The digest stays that of the data, because the texts and labels are the same. The training and validation split are
    not encoded again.

    Args:
        dataset: data set with the tokenizer of one model.
        text: tokenizer of the model to evaluate; None: it takes no texts.

    Raises:
        UserError: the data has texts and the model takes none, or the reverse, or a text has no token.
    """
    if dataset.text == text:
        return dataset
    if text is None or not isinstance(dataset.test, TextSplit):
        takes, has = ("no texts" if text is None else "texts"), ("no " if dataset.text is None else "")
        raise UserError(f"the model takes {takes}, but the test split of {dataset.title} has {has}texts")
    raw = RawText(dataset.title, dataset.test.texts, dataset.test.labels)
    (test,), _ = to_splits(text, [raw])
    return replace(dataset, test=test, text=text, shape=TextShape(text.max_length, text.vocabulary))


def _scaled(raw: RawTable, accepts: Accepts | None) -> tuple[Split, list[str]]:
    """Return the inputs of the model for the rows of a table, and notes on unusual values."""
    if accepts is None or accepts.table is None:
        raise UserError(
            f"{raw.where} is a table, but the model does not say how its columns are scaled; pass an .npz of inputs in "
            "[0, 1]"
        )
    raw = as_trained(raw, accepts.table)
    x, clipped, unknown = encode(accepts.table, raw)
    return ArraySplit(x, raw.labels, raw), remarks(clipped, unknown)


def as_texts(config: DataConfig) -> DataConfig:
    """Return settings that read csv and parquet files as texts."""
    is_table = config.source in ("csv", "parquet")
    return config.model_copy(update={"source": "text"}) if is_table else config


def fitted(config: DataConfig, accepts: Accepts) -> DataConfig:
    """Return the settings with the image size, the columns and the task of the model.

    Raises:
        UserError: the data is images, but the model takes none.
    """
    if accepts.text is not None:
        return as_texts(config)
    changes: dict[str, object] = {"task": "classification" if accepts.num_classes else "regression"}
    if accepts.table is not None:
        changes |= {"label": accepts.table.label}
        if config.source == "npz":
            changes |= {"scale": "minmax"}
        else:
            changes |= {"features": [column.name for column in accepts.table.columns]}
    elif config.source in IMAGE_FILES:
        if len(accepts.shape) != 3 or accepts.shape[1] != accepts.shape[2]:
            raise UserError(
                f"the model has inputs {accepts.shape}, not square images; pass an .npz with such samples"
            )
        changes |= {"channels": accepts.shape[0], "image_size": accepts.shape[1]}
    return config.model_copy(update=changes)
