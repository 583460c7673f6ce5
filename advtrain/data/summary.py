"""Summary of a data set before training: its files, classes and splits, and faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from advtrain.data import Dataset
from advtrain.data.batches import ArraySplit, Split
from advtrain.data.duplicates import Copies, find_copies
from advtrain.data.found import Found
from advtrain.data.texts import TextSplit
from advtrain.data.units import FeatureUnits, feature_units
from advtrain.text import listed

#: A class with fewer than this share of the samples of the largest one is called rare.
RARE = 0.05
#: Number of classes in a remark.
_SHOWN = 5
#: What it means if a class that is trained has no sample in a split.
_ABSENT = {
    "validation": "they do not count when the best checkpoint is chosen",
    "test": "the report has no results for them",
}


@dataclass(frozen=True)
class DataSummary:
    """Facts of a data set and its splits; `to_json` gives them as plain values."""

    name: str
    digest: str
    shape: tuple[int, ...]  # (C, H, W), (F,) for tables, or (L,) for texts
    dtype: str  # uint8, float32, or int64 for the token ids of texts
    values: tuple[float, float] | None  # smallest and largest value in memory; None: streamed, or texts
    samples: dict[str, int]  # split -> samples
    classes: dict[str, dict[str, int]]  # class -> split -> samples; empty for a regression
    targets: dict[str, tuple[float, float]]  # split -> smallest and largest target of a regression
    copies: Copies
    found: Found
    features: list[FeatureUnits] = field(default_factory=list)  # of a table, with their ranges
    file: str | None = None  # name of the file or folder; None: a built-in data set

    @property
    def title(self) -> str:
        """Name of the data for readers: the file or folder, or the built-in data set."""
        return self.file or self.name

    @classmethod
    def of(cls, dataset: Dataset) -> DataSummary:
        """Return the summary of a data set; this reads the samples that are in memory."""
        splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
        return cls(
            dataset.name,
            dataset.digest,
            tuple(dataset.shape),
            _dtype(dataset),
            _range(list(splits.values())),
            {name: len(split) for name, split in splits.items()},
            {} if dataset.regression else _classes(dataset, splits),
            {name: (float(s.labels.min()), float(s.labels.max())) for name, s in splits.items()}
            if dataset.regression
            else {},
            find_copies(splits),
            dataset.found,
            feature_units(dataset.table),
            dataset.file,
        )

    def remarks(self) -> list[str]:
        """Return a sentence for each fact that a user should know before training."""
        remarks = list(self.found.notes)
        for reason, files in self.found.skipped.items():
            plural = "" if len(files) == 1 else "s"
            remarks.append(f"{len(files):,} file{plural} skipped, {reason}: {listed(files, 3)}")
        empty = [name for name, counts in self.classes.items() if not sum(counts.values())]
        if empty:
            remarks.append(
                f"no sample of the classes {listed(empty, _SHOWN)}: the model has outputs that never train"
            )
        most = max((counts["train"] for counts in self.classes.values()), default=0)
        rare = [name for name, counts in self.classes.items() if 0 < counts["train"] < RARE * most]
        if rare:
            remarks.append(
                f"classes with less than {RARE:.0%} of the training samples of the largest one: {listed(rare, _SHOWN)}"
            )
        trained = {name: counts for name, counts in self.classes.items() if counts["train"]}
        untrained = [name for name in self.classes if name not in trained and name not in empty]
        if untrained:
            remarks.append(
                f"no training sample of the classes {listed(untrained, _SHOWN)}: the model cannot learn them"
            )
        for split, consequence in _ABSENT.items():
            if absent := [name for name, counts in trained.items() if not counts[split]]:
                remarks.append(f"no {split} sample of the classes {listed(absent, _SHOWN)}: {consequence}")
        for where, count in self.copies.across.items():
            if count:
                later, _, earlier = where.partition(" in ")
                remarks.append(
                    f"{count:,} of {self.samples[later]:,} {later} samples are copies of {earlier} samples: "
                    "the accuracy on these samples is too high"
                )
        if self.copies.conflicts:
            remarks.append(f"{self.copies.conflicts:,} samples equal another one with a different label")
        if self.values is not None and self.values[0] == self.values[1]:
            remarks.append(f"every value of every sample is {self.values[0]:g}")
        return remarks

    def to_json(self) -> dict[str, Any]:
        """Return the summary as values for JSON; `digest` is the key of a record's own digest."""
        values = asdict(self)
        return {"data_digest": values.pop("digest"), **values}


def _dtype(dataset: Dataset) -> str:
    if isinstance(dataset.train, ArraySplit):
        return str(dataset.train.images.dtype)
    return "int64" if dataset.text is not None else "uint8"


def _range(splits: list[Split]) -> tuple[float, float] | None:
    arrays = [s.images for s in splits if isinstance(s, ArraySplit) and not isinstance(s, TextSplit)]
    if len(arrays) < len(splits):
        return None
    return float(min(a.min() for a in arrays)), float(max(a.max() for a in arrays))


def distinct_names(class_names: list[str] | None, num_classes: int) -> list[str]:
    """Return a distinct name for each class; its number if the classes have no names."""
    names = class_names or [str(label) for label in range(num_classes)]
    if len(set(names)) < len(names):
        return [f"{name} ({label})" for label, name in enumerate(names)]
    return names


def _classes(dataset: Dataset, splits: dict[str, Split]) -> dict[str, dict[str, int]]:
    """Return the samples of each class in each split, by the name of the class."""
    names = distinct_names(dataset.class_names, dataset.num_classes)
    counts = {name: Counter(split.labels.tolist()) for name, split in splits.items()}
    return {each: {name: counts[name][label] for name in splits} for label, each in enumerate(names)}
