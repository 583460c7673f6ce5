"""Copies of samples, within a split and across splits."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from advtrain.data.batches import Split
from advtrain.data.rows import row_keys
from advtrain.data.stream import StreamSplit


@dataclass(frozen=True)
class Copies:
    """Numbers of copies in the splits of a data set."""

    within: dict[str, int]  # split -> samples that equal an earlier one of the same split
    across: dict[str, int]  # "test in train" -> samples of the first split that equal one of the second
    conflicts: int  # samples that equal another one with a different label; 0 for regression targets
    searched: bool = True  # False: a stream of parquet rows, which are not read for this


def find_copies(splits: Mapping[str, Split]) -> Copies:
    """Count equal samples: equal pixels, columns or texts in memory, or equal streamed files.

    Texts are equal without case and repeated blanks. Of streamed files, only those of equal size are read. Images in
    streamed parquet files are not compared.

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


def _keys(splits: Mapping[str, Split]) -> dict[str, list[bytes]]:
    """Return a key of each sample of each split; samples are equal if their keys are."""
    keys: dict[str, list[bytes]] = {}
    files: dict[str, list[str]] = {}
    for name, split in splits.items():
        if isinstance(split, StreamSplit):
            files[name] = [split.index.files[f] for f in split.index.file[split.rows]]
        else:
            keys[name] = row_keys(split).tolist()
    sizes = {file: Path(file).stat().st_size for found in files.values() for file in found}
    several = {size for size, count in Counter(sizes.values()).items() if count > 1}
    for name, found in files.items():
        keys[name] = [
            _content(file) if sizes[file] in several else f"alone {sizes[file]}".encode() for file in found
        ]
    return keys


def _content(file: str) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
