"""Leaks: validation and test samples of a model that one of its ancestors was trained on.

A test sample may be in no ancestor's training or validation split, because the validation split chose the ancestor's
weights. A validation sample may be in no ancestor's training split; that it is in an ancestor's validation split is
the rule for a model and an ancestor with the same data. Samples that are also in an earlier split of the model's own
data are copies within that data, see data/summary.py. They are no leak from an ancestor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from advtrain.data import Dataset
from advtrain.data.rows import SPLITS, Keys, RowRecord, common_rows, record_rows, row_keys
from advtrain.errors import UserError
from advtrain.runs.folder import write_atomically
from advtrain.runs.lineage import Ancestor, all_ancestors

#: Split of a model -> splits of an ancestor in which its samples may not be.
FORBIDDEN = {"validation": ("train",), "test": ("train", "validation")}
_WORDS = {"train": "training", "validation": "validation", "test": "test"}
#: Number of examples in messages.
_SHOWN = 5


@dataclass(frozen=True)
class Leak:
    """Samples of one split that are in one split of an ancestor."""

    reference: str  # of the ancestor
    data: str  # title of the ancestor's data
    split: str  # of the model: validation or test
    seen: str  # of the ancestor: train or validation
    count: int
    total: int  # samples of the split
    examples: tuple[int, ...] = ()  # their numbers in the split, from 0; empty: unknown

    def __str__(self) -> str:
        text = (
            f"{self.count:,} of {self.total:,} {_WORDS[self.split]} samples are {_WORDS[self.seen]} samples "
            f"of its ancestor {self.reference} ({self.data})"
        )
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{text}, numbers {', '.join(map(str, self.examples))}{more}" if self.examples else text


@dataclass(frozen=True)
class LeakCheck:
    """Result of the comparison of a model's samples with the data of its ancestors."""

    leaks: list[Leak] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # one sentence per ancestor that cannot be compared

    def as_json(self) -> dict[str, Any]:
        """Return plain values, as in run.json."""
        return {"leaks": [str(leak) for leak in self.leaks], "unknown": self.unknown}


def write_rows(folder: Path, dataset: Dataset) -> Path:
    """Write the record of a data set to `folder`/DATA_DIGEST.rows, unless it is there; return its path."""
    path = folder / f"{dataset.digest}.rows"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        write_atomically(path, record_rows(dataset).to_bytes())
    return path


def read_rows(files: Iterable[Path]) -> dict[str, RowRecord]:
    """Read records; return them by the digest of their data.

    Raises:
        UserError: a file is damaged, or is called by another digest than its own.
    """
    found = {}
    for file in files:
        try:
            record = RowRecord.from_bytes(file.read_bytes(), str(file))
        except OSError as error:
            raise UserError(f"'{file}' cannot be read: {error.strerror}") from error
        if file.name != f"{record.data_digest}.rows":
            raise UserError(f"'{file}' is damaged: it is the record of the data {record.data_digest[:12]}")
        found[record.data_digest] = record
    return found


def records_in(folder: Path) -> dict[str, RowRecord]:
    """Read all records of a folder such as RUN/rows; none if it does not exist."""
    return read_rows(sorted(folder.glob("*.rows")))


def check_leaks(
    dataset: Dataset, ancestors: Iterable[Ancestor], records: Mapping[str, RowRecord]
) -> LeakCheck:
    """Look for the validation and test samples of a data set in the data of all ancestors.

    Args:
        dataset: data of the model.
        ancestors: its ancestors; their own ancestors are compared too.
        records: records of samples by the digest of their data.
    """
    ancestors = list(all_ancestors(ancestors))
    if not any(ancestor.data_digest in records for ancestor in ancestors):
        return find_leaks({}, ancestors, records)  # decodes no stream
    return find_leaks({name: row_keys(getattr(dataset, name)) for name in SPLITS}, ancestors, records)


def find_leaks(
    keys: Mapping[str, Keys],
    ancestors: Iterable[Ancestor],
    records: Mapping[str, RowRecord],
    *,
    in_order: bool = True,
) -> LeakCheck:
    """Look for the keys of the validation and test samples in the records of all ancestors.

    Args:
        keys: keys of the model's samples by split.
        ancestors: ancestors of the model.
        records: records of samples by the digest of their data.
        in_order: whether the keys are in the order of their split, so that examples can be given.
    """
    check = LeakCheck()
    for ancestor in dict.fromkeys(all_ancestors(ancestors)):
        record = records.get(ancestor.data_digest or "")
        if record is None or not record.keys:
            reason = record.reason if record is not None else "there is no record of its samples"
            check.unknown.append(f"the training data of {ancestor.reference} is unknown: {reason}")
            continue
        for split, forbidden in FORBIDDEN.items():
            if split not in keys:
                continue
            own = [keys[name] for name in SPLITS[: SPLITS.index(split)] if name in keys]
            copies = np.isin(keys[split], np.concatenate(own)) if own else np.zeros(len(keys[split]), bool)
            for seen in forbidden:
                rows = common_rows(keys[split], record.keys[seen])
                rows = rows[~copies[rows]]
                if len(rows):
                    examples = tuple(rows[:_SHOWN].tolist()) if in_order else ()
                    total = len(keys[split])
                    found = Leak(ancestor.reference, record.data, split, seen, len(rows), total, examples)
                    check.leaks.append(found)
    return check


def refuse_leaks(check: LeakCheck, advice: str) -> None:
    """Raise a UserError that names the leaks, if there are any; `advice` says what to do."""
    if check.leaks:
        found = "; ".join(map(str, check.leaks))
        raise UserError(f"{found}: the accuracy on these samples would be too high; {advice}")
