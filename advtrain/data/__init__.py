"""Data sets: loading, checks, and stratified, seeded training, validation and test splits."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from advtrain.data.batches import ArraySplit, Batch, BatchPlan, Place, Split, stratified, stratified_rows
from advtrain.data.found import Found
from advtrain.data.inputs import Inputs, decode, read_inputs
from advtrain.data.loading import file_name, load_source
from advtrain.data.pretrained_tokenizer import special_ids, tokenizer_of
from advtrain.data.request import Raw, Source
from advtrain.data.sources import SOURCES
from advtrain.data.stream import StreamSplit
from advtrain.data.table_files import as_trained
from advtrain.data.tables import RawTable, TableSpec, check_cells
from advtrain.data.tables import scale as scale_table
from advtrain.data.text_stream import StreamTextSplit, split_texts
from advtrain.data.texts import RawText, TextSpec
from advtrain.errors import UserError
from advtrain.recipe.data import AugmentConfig, DataConfig, TextShape
from advtrain.seeding import mix_seed
from advtrain.user_paths import user_path

__all__ = [
    "SOURCES",
    "ArraySplit",
    "AugmentConfig",
    "Batch",
    "BatchPlan",
    "DataConfig",
    "Dataset",
    "Found",
    "Inputs",
    "Place",
    "Split",
    "StreamSplit",
    "StreamTextSplit",
    "TableSpec",
    "TextSpec",
    "data_root",
    "decode",
    "load_data",
    "read_inputs",
    "stratified",
    "stratified_rows",
]


@dataclass(frozen=True)
class Dataset:
    """Checked data set with its splits. `digest` identifies its exact content and split."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int  # 0 for regression
    shape: tuple[int, ...]  # shape of one sample: (C, H, W), (F,) for tabular data, or a TextShape
    digest: str  # 64 hexadecimal digits
    class_names: list[str] | None = None
    found: Found = Found()
    table: TableSpec | None = None  # columns of a table and their scaling
    file: str | None = None  # name of the file or folder, such as pets/; None: a built-in data set
    text: TextSpec | None = None  # tokenizer of texts
    crop: int | None = None  # side of the center of each image that was taken before resizing; None: all
    synonyms: Any = (
        None  # table of substitutions of evaluation.threat (advtrain.edits.Table); None: not loaded
    )
    training_synonyms: Any = None  # table of substitutions of the adversary

    @property
    def title(self) -> str:
        """Name of the data for readers: the file or folder, or the built-in data set."""
        return self.file or self.name

    @property
    def eight_bit(self) -> bool:
        """True if the samples are 8-bit pixel values; radii are then multiples of 1/255."""
        if isinstance(self.train, ArraySplit):
            return self.train.images.dtype == np.uint8
        return isinstance(self.train, StreamSplit)

    @property
    def regression(self) -> bool:
        """True if samples have targets instead of labels."""
        return self.num_classes == 0

    @property
    def target_scale(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the training targets; None for classification."""
        if not self.regression:
            return None
        targets = self.train.labels.astype(np.float64)
        return float(targets.mean()), float(targets.std()) or 1.0

    def share_memory_of(self, equal: Dataset) -> None:
        """Replace arrays in memory by those of an equal data set, which frees their memory."""
        for mine, other in zip(
            (self.train, self.validation, self.test), (equal.train, equal.validation, equal.test), strict=True
        ):
            if isinstance(mine, ArraySplit) and isinstance(other, ArraySplit):
                mine.share_memory_of(other)


def data_root(given: str | None = None) -> Path:
    """Return the data root: the argument, else $ADVTRAIN_DATA_ROOT, else ./data.

    Raises:
        UserError: it contains a variable that is not set.
    """
    return user_path(given or os.environ.get("ADVTRAIN_DATA_ROOT") or "data", "the data root").resolve()


def load_data(
    config: DataConfig,
    root: Path,
    *,
    class_names: list[str] | None = None,
    like: TableSpec | TextSpec | None = None,
) -> Dataset:
    """Load, split and check a data set.

    Args:
        config: settings of the data.
        root: data root.
        class_names: classes of a model, in which the classes of the data are looked up.
        like: columns of a model, by which a table is scaled, or its tokenizer; None: those of the training split.

    Raises:
        UserError: the data is missing, a split is empty, or a label or value is out of range.
    """
    source = load_source(config, root, class_names)
    num_classes = _num_classes(config, source)
    for name, split in (("training", source.train), ("test", source.test), ("validation", source.validation)):
        if split is not None:
            check_split(f"{config.source}, {name} samples", split, num_classes, config)
    _check_gaps(config, source, num_classes)
    (train, validation, test), spec, notes = _splits(config, source, like)
    shapes = {split.shape for split in (train, validation, test)}
    if len(shapes) > 1:
        raise UserError(f"{config.source}: training and test images differ in shape: {sorted(shapes)}")
    shape = shapes.pop()
    if len(shape) == 1 and config.augment != AugmentConfig():
        kind = "texts" if isinstance(spec, TextSpec) else f"tables of {shape[0]} columns"
        raise UserError(f"data.augment is for images; the samples of {config.source} are {kind}")
    digest = digest_of([train, validation, test])
    if spec is not None:
        digest = hashlib.sha256(
            f"{digest} {spec.model_dump_json(exclude={'lists', 'column', 'label'})}".encode()
        ).hexdigest()
    if isinstance(spec, TextSpec):
        shape = TextShape(spec.max_length, spec.vocabulary, special_ids(spec.tokenizer))
    return Dataset(
        config.source,
        train,
        validation,
        test,
        num_classes,
        shape,
        digest,
        source.class_names,
        replace(source.found, notes=[*source.found.notes, *notes]),
        spec if isinstance(spec, TableSpec) else None,
        file_name(config, root),
        spec if isinstance(spec, TextSpec) else None,
        config.center_crop,
    )


def _splits(
    config: DataConfig, source: Source, like: TableSpec | TextSpec | None
) -> tuple[list[Split], TableSpec | TextSpec | None, list[str]]:
    """Return the training, validation and test split; scale a table by its training split.

    The tokenizer of texts is that of the training split, too.
    """
    train, validation, test = source.train, source.validation, source.test
    if test is None:
        train, test = _carve(train, config.test_fraction, config.split_seed, "data.test_fraction")
    if validation is None:
        train, validation = _carve(
            train, config.validation_fraction, config.split_seed, "data.validation_fraction"
        )
    if config.train_samples is not None:
        train = _fewer(train, config)
    parts = [train, validation, test]
    texts = [part for part in parts if isinstance(part, RawText)]
    if texts:
        spec = like if isinstance(like, TextSpec) else None
        if spec is None:
            spec = tokenizer_of(config, texts[0])
        ids, notes = split_texts(spec, texts, group_by_length=config.group_by_length)
        return [*ids], spec, notes
    raw = [part for part in parts if isinstance(part, RawTable)]
    if raw:
        like = like if isinstance(like, TableSpec) else None
        if like is not None:
            raw = [as_trained(part, like) for part in raw]
        table, scaled, notes = scale_table(
            raw, impute=config.missing == "impute", standard=config.scale == "standard", like=like
        )
        return [*scaled], table, notes
    if config.scale is not None or config.missing == "impute":
        name = "data.scale" if config.scale is not None else "data.missing"
        raise UserError(
            f"{name} is for tables of csv, parquet or npz (N, F) with data.scale; the data has none"
        )
    return [part for part in parts if not isinstance(part, Raw)], None, []


def _check_gaps(config: DataConfig, source: Source, num_classes: int) -> None:
    """Raise UserError for a class without training samples if the number of classes was inferred."""
    if num_classes == 0 or source.num_classes is not None or config.num_classes is not None:
        return
    empty = np.flatnonzero(np.bincount(source.train.labels, minlength=num_classes) == 0)
    if len(empty) == 0:
        return
    names = source.class_names or [str(number) for number in range(num_classes)]
    shown = ", ".join(names[number] for number in empty[:10]) + (", ..." if len(empty) > 10 else "")
    some = f"no training sample of class {shown}" if len(empty) == 1 else f"no training samples of {shown}"
    first = int(source.train.labels.min())
    remedy = f"subtract {first} from the labels, or " if len(empty) == first else ""
    raise UserError(
        f"{config.source}: the labels go up to {num_classes - 1}, but there is {some}; {remedy}store the labels as "
        f"text, or set data.num_classes={num_classes} to keep classes without samples"
    )


def _num_classes(config: DataConfig, source: Source) -> int:
    if source.num_classes == 0 and config.num_classes is not None:
        raise UserError(f"data.num_classes does not apply to {config.source}: it is a regression")
    if source.num_classes is not None:
        if config.num_classes not in (None, source.num_classes):
            raise UserError(
                f"data.num_classes is {config.num_classes}, but {config.source} has {source.num_classes} classes"
            )
        return source.num_classes
    if len(source.train) == 0:
        raise UserError(f"{config.source}: there are no training samples")
    return config.num_classes or int(source.train.labels.max()) + 1


def check_split(what: str, split: Split | Raw, num_classes: int, config: DataConfig) -> None:
    """Raise UserError for the first label outside [0, C) or value outside [0, 1], such as NaN."""
    if len(split) == 0:
        raise UserError(f"{what}: no samples found")
    if num_classes == 0 and len(infinite := np.flatnonzero(~np.isfinite(split.labels))):
        raise UserError(f"{what}: target of sample {infinite[0]} is {split.labels[infinite[0]]}")
    outside = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
    if num_classes and len(outside):
        raise UserError(
            f"{what}: label {split.labels[outside[0]]} of sample {outside[0]} is outside [0, {num_classes}); "
            "labels start at 0, and data.num_classes sets the number of classes"
        )
    if isinstance(split, RawTable):
        check_cells(split, impute=config.missing == "impute")
    if isinstance(split, ArraySplit) and split.images.dtype == np.float32:
        flat = split.images.reshape(len(split), -1)
        bad = np.flatnonzero(~((flat >= 0) & (flat <= 1)).all(1))  # NaN compares false, so it is caught too
        if len(bad):
            sample = flat[bad[0]]
            value = sample[~((sample >= 0) & (sample <= 1))][0]
            remedy = "divide 8-bit grey levels by 255, or store them as uint8"
            if split.images.ndim == 2:
                remedy = "set data.scale=minmax or standard to scale each column by the training samples"
            raise UserError(f"{what}: sample {bad[0]} contains {value}; values must lie in [0, 1] ({remedy})")


def _carve(split: Split | Raw, fraction: float, seed: int, path: str) -> tuple[Split | Raw, Split | Raw]:
    """Return (rest, held out), stratified by label. Copies of a text are held out together."""
    from sklearn.model_selection import train_test_split

    groups = split.groups() if isinstance(split, RawText) else np.arange(len(split))
    labels = split.labels[np.unique(groups, return_index=True)[1]]
    regression = labels.dtype != np.int64
    counts = Counter([0] * len(labels) if regression else labels.tolist())
    held = round(fraction * len(labels))
    if held < len(counts) or len(labels) - held < len(counts) or min(counts.values()) < 2:
        raise UserError(
            f"{path} = {fraction} of {len(labels)} samples would leave a split without some of the {len(counts)} "
            f"classes (the rarest has {min(counts.values())} samples)"
        )
    rest, out = train_test_split(
        np.arange(len(labels)),
        test_size=held,
        random_state=seed if seed < 2**32 else mix_seed("split", seed) % 2**32,  # scikit-learn takes 32 bits
        stratify=None if regression else labels,
    )
    first, second = (split.take(np.flatnonzero(np.isin(groups, chosen))) for chosen in (rest, out))
    return first, second


def _fewer(split: Split | Raw, config: DataConfig) -> Split | Raw:
    """Return data.train_samples of the training samples, stratified by label."""
    wanted = config.train_samples or 0
    classes = 0 if split.labels.dtype != np.int64 else len(np.unique(split.labels))
    if wanted > len(split):
        raise UserError(f"data.train_samples = {wanted}, but there are {len(split)} training samples")
    if wanted < classes:
        raise UserError(f"data.train_samples = {wanted} is below the number of classes, {classes}")
    return split.take(stratified_rows(split, wanted, config.split_seed))


def digest_of(splits: list[Split]) -> str:
    """Return a SHA-256 of all splits in order; for streams, of file names, sizes and labels."""
    total = hashlib.sha256()
    names: dict[int, bytes] = {}  # by index: several splits may share one
    for split in splits:
        total.update(split.labels.tobytes())
        if isinstance(split, ArraySplit):
            total.update(f"{split.images.shape} {split.images.dtype}".encode())
            total.update(np.ascontiguousarray(split.images).data)
        elif isinstance(split, StreamSplit):
            if id(split.index) not in names:
                names[id(split.index)] = _names_and_sizes(split.index.files)
            total.update(names[id(split.index)])
            total.update(split.rows.tobytes())
        elif isinstance(split, StreamTextSplit):
            total.update(_names_and_sizes(split.texts.files))
            for rows in (split.texts.file, split.texts.group, split.texts.offset):
                total.update(rows.tobytes())
    return total.hexdigest()


def _names_and_sizes(files: list[str]) -> bytes:
    paths = [Path(file) for file in files]
    return os.fsencode("\n".join(f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in paths))
