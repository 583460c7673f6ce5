"""Leaks: validation and test samples of a model that an ancestor was trained on.

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

from advtrain.data import Dataset, Split
from advtrain.data.rows import (
    SPLITS,
    RowRecord,
    common_rows,
    form_of,
    is_recorded,
    merge_records,
    record_rows,
    row_keys,
)
from advtrain.errors import UserError
from advtrain.runs.folder import RunFolder, sync, write_atomically
from advtrain.runs.lineage import Ancestor, all_ancestors, ancestors_in

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
    rows: tuple[int, ...] = ()  # their numbers in the split, from 0; empty: unknown

    def __str__(self) -> str:
        text = (
            f"{self.count:,} of {self.total:,} {_WORDS[self.split]} samples are {_WORDS[self.seen]} samples "
            f"of its ancestor {self.reference} ({self.data})"
        )
        more = ", ..." if self.count > _SHOWN else ""
        return f"{text}, numbers {', '.join(map(str, self.rows[:_SHOWN]))}{more}" if self.rows else text


@dataclass(frozen=True)
class LeakCheck:
    """Result of the comparison of a model's samples with the data of its ancestors."""

    leaks: list[Leak] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # one sentence per ancestor that cannot be compared


def write_rows(folder: Path, dataset: Dataset) -> Path:
    """Write the record of a data set to `folder`/DATA_DIGEST.rows if it is missing.

    A record of another form that is there is kept. Return its path.
    """
    path = folder / f"{dataset.digest}.rows"
    known = read_rows([path]) if path.exists() else {}
    if not known or form_of(dataset) not in known[dataset.digest].forms:
        add_record(folder, record_rows(dataset))
    return path


def add_record(folder: Path, record: RowRecord) -> None:
    """Write a record to `folder`/DATA_DIGEST.rows, merged with the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.data_digest}.rows"
    known = read_rows([path]).values() if path.exists() else []
    (merged,) = merge_records([*known, record]).values()
    write_atomically(path, merged.to_bytes())


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
    dataset: Dataset,
    ancestors: Iterable[Ancestor],
    records: Mapping[str, RowRecord],
    *,
    test: Split | None = None,
) -> LeakCheck:
    """Find the validation and test samples of a data set that an ancestor was trained on.

    Args:
        dataset: data of the model.
        ancestors: its ancestors; their own ancestors are compared too.
        records: records of samples by the digest of their data.
        test: look only for these samples of the test split; None: all validation and test samples.
    """
    ancestors = list(all_ancestors(ancestors))
    compared = {ancestor.data_digest for ancestor in ancestors} & records.keys()
    if test is None:
        compared.discard(dataset.digest)  # the same splits have no leak
    if not compared:
        return find_leaks(RowRecord("", ""), ancestors, records)  # decodes no stream
    own, form = records.get(dataset.digest), form_of(dataset)
    keys = {} if own is None or form not in own.forms else dict(own.keys)
    for name in SPLITS:
        split = getattr(dataset, name) if name != "test" or test is None else test
        wanted = name == "test" or (name == "validation" and test is None)  # in order, for the examples
        if wanted or (name not in keys and is_recorded(split)):
            keys[name] = row_keys(split)
    mine = RowRecord(dataset.title, dataset.digest, keys, forms=(form,))
    return find_leaks(mine, ancestors, records, splits=("test",) if test is not None else tuple(FORBIDDEN))


def find_leaks(
    mine: RowRecord,
    ancestors: Iterable[Ancestor],
    records: Mapping[str, RowRecord],
    *,
    splits: Iterable[str] = tuple(FORBIDDEN),
    in_order: bool = True,
) -> LeakCheck:
    """Find keys of validation and test samples in the records of all ancestors.

    Args:
        mine: keys of the model's samples, which need not be sorted.
        ancestors: ancestors of the model.
        records: records of samples by the digest of their data.
        splits: splits whose samples are looked for.
        in_order: whether the keys are in the order of their split, so that examples can be given.
    """
    check, keys = LeakCheck(), mine.keys
    for ancestor in dict.fromkeys(all_ancestors(ancestors)):
        record = records.get(ancestor.data_digest or "")
        if record is None or "train" not in record.keys:
            reason = record.reason if record is not None else "there is no record of its samples"
            check.unknown.append(f"the training data of {ancestor.reference} is unknown: {reason}")
            continue
        if differ := record.other_form(mine):
            reason = f"its samples have another form ({differ}), so common samples are not found"
            check.unknown.append(f"the training data of {ancestor.reference} is unknown: {reason}")
        for split in splits:
            if split not in keys:
                continue
            own = [keys[name] for name in SPLITS[: SPLITS.index(split)] if name in keys]
            copies = np.isin(keys[split], np.concatenate(own)) if own else np.zeros(len(keys[split]), bool)
            for seen in FORBIDDEN[split]:
                rows = common_rows(keys[split], record.keys.get(seen, keys[split][:0]))
                rows = rows[~copies[rows]]
                if len(rows):
                    numbers = tuple(rows.tolist()) if in_order else ()
                    found = Leak(
                        ancestor.reference, record.data, split, seen, len(rows), len(keys[split]), numbers
                    )
                    check.leaks.append(found)
    return check


@dataclass(frozen=True)
class Lineage:
    """Ancestors of a model, and records of the samples of its data and of theirs."""

    data_digest: str = ""  # of its own data
    ancestors: tuple[Ancestor, ...] = ()
    records: Mapping[str, RowRecord] = field(default_factory=dict)  # by the digest of their data
    allowed_leak: str | None = None  # reason for which a leak was allowed
    unrecorded: tuple[str, ...] = ()  # settings of the recipe that name weights without a recorded ancestor

    @classmethod
    def of_run(cls, run: RunFolder) -> Lineage:
        """Read the lineage of a run; a trial or cell shares the record of its campaign or study."""
        folder = run.path.parents[1] if run.path.parent.name in ("trials", "cells") else run.path
        if folder != run.path:
            sync(folder / "rows")
        records = merge_records([*records_in(folder / "rows").values(), *records_in(run.rows).values()])
        return cls.from_json(run.facts(), records)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any], records: Mapping[str, RowRecord]) -> Lineage:
        """Return the lineage in the entries of a run.json, or in what `as_json` has written."""
        allowed = facts.get("allowed_leak") or {}
        return cls(str(facts["data_digest"]), ancestors_in(facts), records, allowed.get("reason"))

    def as_json(self) -> dict[str, Any]:
        """Return plain values, without the records."""
        allowed = {} if self.allowed_leak is None else {"allowed_leak": {"reason": self.allowed_leak}}
        ancestors = [ancestor.as_json() for ancestor in self.ancestors]
        return {"data_digest": self.data_digest, "ancestors": ancestors, **allowed}

    def check(self) -> LeakCheck:
        """Compare the recorded samples; the result has no examples."""
        own = self.records.get(self.data_digest, RowRecord("", self.data_digest))
        found = find_leaks(own, self.ancestors, self.records, in_order=False)
        unknown = [f"{setting} has no recorded ancestor" for setting in self.unrecorded]
        if self.ancestors and not FORBIDDEN.keys() <= own.keys.keys():
            unknown.append("its own validation and test samples are not recorded")
        return LeakCheck(found.leaks, found.unknown + unknown)


def refuse_leaks(check: LeakCheck, advice: str) -> None:
    """Raise a UserError that names the leaks, if there are any; `advice` says what to do."""
    if check.leaks:
        found = "; ".join(map(str, check.leaks))
        raise UserError(f"{found}: the accuracy on these samples would be too high; {advice}")
