"""Copies of samples, within a split and across splits."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advtrain.data.batches import ArraySplit, Split
from advtrain.data.stream import StreamSplit


@dataclass(frozen=True)
class Copies:
    """Numbers of copies in the splits of a data set."""

    within: dict[str, int]  # split -> samples that equal an earlier one of the same split
    across: dict[str, int]  # "test in train" -> samples of the first split that equal one of the second
    conflicts: int  # samples that equal another one with a different label; 0 for regression targets
    searched: bool = True  # False: a stream of parquet rows, which are not read for this


def find_copies(splits: Mapping[str, Split]) -> Copies:
    """Count equal samples: equal pixels or columns in memory, equal files in a stream of files.

    Of streamed files, only those of equal size are read. The rows of streamed parquet files are not compared.

    Args:
        splits: the splits by name, in an order where a copy in a later split is reported against the earlier ones.
    """
    if any(
        isinstance(split, StreamSplit) and split.index.group.max(initial=-1) >= 0 for split in splits.values()
    ):
        return Copies({}, {}, 0, searched=False)
    keys = _keys(splits)
    within, across = {}, {}
    labels: dict[bytes, set[float]] = defaultdict(set)
    for number, (name, split) in enumerate(splits.items()):
        counts = Counter(keys[name])
        within[name] = sum(count - 1 for count in counts.values())
        for other in list(splits)[:number]:
            known = set(keys[other])
            across[f"{name} in {other}"] = sum(count for key, count in counts.items() if key in known)
        for key, label in zip(keys[name], split.labels.tolist(), strict=True):
            labels[key].add(label)
    classes = all(split.labels.dtype == np.int64 for split in splits.values())
    torn = {key for key, found in labels.items() if classes and len(found) > 1}
    conflicts = sum(key in torn for name in splits for key in keys[name])
    return Copies(within, across, conflicts)


def training_copies(split: Split, training: Split) -> int | None:
    """Count the samples that equal a training sample; None if they cannot be compared.

    Samples in memory are compared with samples in memory, and streamed files with streamed files.
    """
    if isinstance(split, StreamSplit) != isinstance(training, StreamSplit):
        return None
    copies = find_copies({"training": training, "other": split})
    return copies.across["other in training"] if copies.searched else None


def _keys(splits: Mapping[str, Split]) -> dict[str, list[bytes]]:
    """Return a key of each sample of each split; samples are equal if their keys are."""
    keys: dict[str, list[bytes]] = {}
    kinds = {split.images.dtype for split in splits.values() if isinstance(split, ArraySplit)}
    files: dict[str, list[str]] = {}
    for name, split in splits.items():
        if isinstance(split, StreamSplit):
            files[name] = [split.index.files[f] for f in split.index.file[split.rows]]
        else:
            assert isinstance(split, ArraySplit)
            rows = np.ascontiguousarray(split.images).reshape(len(split), -1)
            keys[name] = [_key(row, as_floats=len(kinds) > 1) for row in rows]
    sizes = {file: Path(file).stat().st_size for found in files.values() for file in found}
    several = {size for size, count in Counter(sizes.values()).items() if count > 1}
    for name, found in files.items():
        keys[name] = [
            _content(file) if sizes[file] in several else f"alone {sizes[file]}".encode() for file in found
        ]
    return keys


def _key(row: NDArray[Any], *, as_floats: bool) -> bytes:
    """Return the key of a sample; `as_floats` compares 8-bit values with floats in [0, 1]."""
    if as_floats:
        row = row / np.float32(255) if row.dtype == np.uint8 else row.astype(np.float32)
    return hashlib.blake2b(row.data, digest_size=16).digest()


def _content(file: str) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
