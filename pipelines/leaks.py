"""Comparison of samples with those that a model and its ancestors were trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from advtrain.data import Dataset, Split
from advtrain.data.rows import Keys, RowRecord, common_rows, form_of, row_keys
from advtrain.errors import UserError
from advtrain.events import Message, Progress
from advtrain.runs.leaks import LeakCheck, Lineage, check_leaks, find_leaks, refuse_leaks
from advtrain.runs.lineage import Ancestor

_TOO_HIGH = "the accuracy on these samples is too high"
#: Advice of commands with the option --allow-leak.
ALLOW_LEAK = ", or accept it with --allow-leak REASON, which rules out a promotion"


def check_training(
    dataset: Dataset,
    ancestors: Iterable[Ancestor],
    records: Mapping[str, RowRecord],
    allow_leak: str | None,
    progress: Progress,
    advice: str = "",
) -> dict[str, Any]:
    """Check a new run before its training; return entries for its run.json.

    Args:
        dataset: its data.
        ancestors: its ancestors.
        records: records of samples by the digest of their data.
        allow_leak: reason for which a leak is allowed; None: a leak is refused.
        progress: called with each warning.
        advice: another way that the command offers, for the error.

    Raises:
        UserError: validation or test samples are training samples of an ancestor, and that is not allowed; or it is
            allowed, but there are none.
    """
    check = check_leaks(dataset, ancestors, records)
    for unknown in check.unknown:
        progress(Message(unknown, "note"))
    if allow_leak is None:
        refuse_leaks(
            check,
            f"split the data as the ancestor's (data.split_seed), use other data or other weights{advice}",
        )
        return {}
    if not allow_leak.strip():
        raise UserError("--allow-leak needs a reason")
    if not check.leaks:
        raise UserError("--allow-leak: no sample of an ancestor was found; leave the option out")
    for leak in check.leaks:
        progress(Message(f"{leak}: {_TOO_HIGH}", "warning"))
    return {"allowed_leak": {"reason": allow_leak, "leaks": [str(leak) for leak in check.leaks]}}


def training_keys(lineage: Lineage, read: Callable[[], Split], progress: Progress) -> Keys | None:
    """Return the keys of the training samples of a model; None if they are unknown.

    Args:
        lineage: lineage of the model.
        read: reads the training samples; called for models of earlier versions, which have no record.
        progress: called with the note.
    """
    record = lineage.records.get(lineage.data_digest)
    try:
        if record is None:
            return row_keys(read())
        if "train" in record.keys:
            return record.keys["train"]
        raise UserError(record.reason)
    except UserError as error:
        progress(Message(f"copies of training samples are not searched: {error}", "note"))
        return None


def count_copies(
    reference: str,
    split: Split,
    dataset: Dataset,
    lineage: Lineage,
    training: Keys | None,
    progress: Progress,
) -> int | None:
    """Count the samples that a model or an ancestor was trained on; None: not searched.

    Args:
        reference: the model.
        split: samples that it is evaluated on.
        dataset: data of the samples.
        lineage: lineage of the model.
        training: keys of its training samples, if the data is other data; None: they are not searched.
        progress: called with the counts.

    Raises:
        UserError: an ancestor was trained on some of the samples, and that was not allowed.
    """
    tested = cache(lambda: row_keys(split))  # decodes a stream
    check = _check(split, dataset, lineage, training, tested)
    for unknown in check.unknown:
        progress(Message(f"{reference}: {unknown}", "note"))
    if lineage.allowed_leak is None:
        refuse_leaks(check, "take these samples out of the data, or evaluate on other data with --data")
    for leak in check.leaks:
        progress(Message(f"{leak}, which was allowed ({lineage.allowed_leak}): {_TOO_HIGH}", "warning"))
    copies = {row for leak in check.leaks for row in leak.rows}
    if training is None:
        return len(copies) or None
    own = common_rows(tested(), training).tolist()
    text = f"{len(own):,} of {len(split):,} samples of {dataset.title} are copies of training samples of {reference}"
    progress(Message(f"{text}: {_TOO_HIGH}" if own else text, "warning" if own else "info"))
    return len(copies.union(own))


def _check(
    split: Split, dataset: Dataset, lineage: Lineage, training: Keys | None, tested: Callable[[], Keys]
) -> LeakCheck:
    """Find the evaluated samples that an ancestor was trained on, and the model itself was not.

    `tested` returns the keys of the evaluated samples.
    """
    if not lineage.ancestors:
        return LeakCheck()
    if dataset.digest == lineage.data_digest:
        return check_leaks(dataset, lineage.ancestors, lineage.records, test=split)
    own = lineage.records.get(lineage.data_digest)
    keys = {} if own is None else {name: own.keys[name] for name in own.keys if name != "test"}
    keys |= {"test": tested()} | ({} if training is None else {"train": training})
    mine = RowRecord(dataset.title, dataset.digest, keys, forms=(form_of(dataset),))
    return find_leaks(mine, lineage.ancestors, lineage.records, splits=("test",))
