"""Leaks: samples that an ancestor was trained on are found, at every depth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from advtrain.data import ArraySplit, DataConfig, Dataset, digest_of, load_data
from advtrain.data.folders import index_folder
from advtrain.data.rows import RowRecord, merge_records, row_keys
from advtrain.data.stream import StreamSplit
from advtrain.errors import UserError
from advtrain.runs.leaks import Lineage, check_leaks, records_in, refuse_leaks, write_rows
from advtrain.runs.lineage import Ancestor


def dataset(digest, train, validation, test):
    """Return data with the given samples; a sample is its number."""

    def split(numbers):
        x = np.array(numbers, np.float32)[:, None] / np.float32(1009)
        return ArraySplit(x, np.zeros(len(x), np.int64))

    return Dataset("d", split(train), split(validation), split(test), 2, (1,), digest * 64, file="d.npz")


def ancestor(digest, *older, reference="models:/parent/1"):
    return Ancestor("start", reference, "f" * 64, "parent", digest * 64, older)


@pytest.mark.parametrize(
    ("train", "validation", "test", "expected"),
    [
        ([1, 2], [3], [4, 5], []),  # the same data and split
        ([1], [], [2, 5], [("test", "train", 1)]),
        ([1], [], [9, 3, 5], [("test", "validation", 1)]),
        ([7], [2, 1], [5], [("validation", "train", 2)]),
        ([1, 3], [2], [1, 2, 3], [("validation", "train", 1)]),  # 1, 2 and 3 are copies in its own data
        ([5], [4], [6], []),  # the test samples of an ancestor may be trained on
    ],
)
def test_leaks_are_counted_by_split(tmp_path, train, validation, test, expected):
    write_rows(tmp_path / "rows", dataset("a", [1, 2], [3], [4, 5]))
    check = check_leaks(dataset("b", train, validation, test), [ancestor("a")], records_in(tmp_path / "rows"))
    assert [(leak.split, leak.seen, leak.count) for leak in check.leaks] == expected
    assert not check.unknown


def test_a_leak_is_refused_with_its_number_and_examples(tmp_path):
    write_rows(tmp_path, dataset("a", range(100), [], []))
    check = check_leaks(dataset("b", [200], [], range(90, 110)), [ancestor("a")], records_in(tmp_path))
    message = (
        r"10 of 20 test samples are training samples of its ancestor models:/parent/1 \(d.npz\), "
        r"numbers 0, 1, 2, 3, 4, \.\.\.: .*; take them out"
    )
    with pytest.raises(UserError, match=message):
        refuse_leaks(check, "take them out")


def test_ancestors_of_ancestors_are_compared(tmp_path):
    write_rows(tmp_path, dataset("a", [1, 2], [], []))
    write_rows(tmp_path, dataset("b", [3, 4], [], []))
    parent = ancestor("b", ancestor("a", reference="models:/old/7"))
    check = check_leaks(dataset("c", [9], [], [5, 2]), [parent], records_in(tmp_path))
    assert [(leak.reference, leak.rows) for leak in check.leaks] == [("models:/old/7", (1,))]


def test_an_ancestor_without_a_record_is_unknown(tmp_path):
    parent = replace(ancestor("a", reference="weights.pth"), data_digest=None)
    large = RowRecord("stream/", "c" * 64, reason="streams are not recorded")
    check = check_leaks(dataset("b", [1], [2], [3]), [parent, ancestor("c")], {"c" * 64: large})
    assert check.leaks == []
    assert check.unknown == [
        "the training data of weights.pth is unknown: there is no record of its samples",
        "the training data of models:/parent/1 is unknown: streams are not recorded",
    ]
    refuse_leaks(check, "")


def test_a_damaged_or_renamed_record_is_refused(tmp_path):
    path = write_rows(tmp_path, dataset("a", [1], [], []))
    renamed = path.rename(tmp_path / f"{'b' * 64}.rows")
    with pytest.raises(UserError, match="is damaged: it is the record of the data aaaaaaaaaaaa"):
        records_in(tmp_path)
    renamed.write_bytes(renamed.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged: its digest"):
        records_in(tmp_path)


def test_another_split_of_the_same_data_leaks_and_other_classes_do_not(tmp_path):
    digits = load_data(DataConfig(source="digits"), tmp_path)
    write_rows(tmp_path, digits)
    parent = [Ancestor("start", "p", "f" * 64, "p", digits.digest)]
    again = load_data(DataConfig(source="digits", split_seed=1), tmp_path)
    leaks = check_leaks(again, parent, records_in(tmp_path)).leaks
    assert {leak.split for leak in leaks} == {"validation", "test"}
    assert check_leaks(digits, parent, records_in(tmp_path)).leaks == []
    low, high = (
        replace(
            digits,
            digest=digest * 64,
            **{
                name: (part := getattr(digits, name)).take(np.flatnonzero((part.labels < 5) == is_low))
                for name in ("train", "validation", "test")
            },
        )
        for digest, is_low in (("1", True), ("2", False))
    )
    write_rows(tmp_path, low)
    parent = [ancestor("1")]
    assert check_leaks(high, parent, records_in(tmp_path)).leaks == []


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"image_size": 16}, "1x8x8, here 1x16x16"),
        ({"channels": 3}, "1x8x8, here 3x8x8"),
        ({"center_crop": 4, "image_size": 8}, "1x8x8, here 1x8x8 of a crop of 4"),
        ({}, ""),
    ],
)
def test_the_same_data_in_another_form_is_unknown(tmp_path, settings, form):
    parent, child = (
        load_data(DataConfig(source="digits", **each), tmp_path)
        for each in ({}, {"split_seed": 1} | settings)
    )
    for each in (parent, child):
        write_rows(tmp_path, each)
    named = Ancestor("start", "models:/digits/1", "f" * 64, "p", parent.digest)
    records = records_in(tmp_path)
    for check in (check_leaks(child, [named], records), Lineage(child.digest, (named,), records).check()):
        assert bool(check.leaks) == (not form)
        assert check.unknown == (
            [
                "the training data of models:/digits/1 is unknown: its samples have another form "
                f"({form}), so common samples are not found"
            ]
            if form
            else []
        )


@pytest.mark.parametrize(("name", "is_known"), [("d.csv", False), ("e.npz", True)])
def test_another_form_matters_for_data_of_the_same_name(tmp_path, name, is_known):
    write_rows(tmp_path, dataset("a", [1], [2], [3]))
    wide = np.zeros((1, 2), np.float32)
    split = ArraySplit(wide, np.zeros(1, np.int64))
    child = Dataset("d", split, split, split, 2, (2,), "b" * 64, file=name)
    assert (check_leaks(child, [ancestor("a")], records_in(tmp_path)).unknown == []) == is_known


def stream(folder, size):
    """Return 9 images of a folder, read at a size; a split has 3."""
    index, _ = index_folder(folder)
    train, validation, test = (StreamSplit(index, np.arange(i, i + 3), 3, size) for i in (0, 3, 6))
    digest = digest_of([train, validation, test])
    return Dataset("image_folder", train, validation, test, 1, (3, size, size), digest, file="pets/")


def test_a_record_of_a_stream_at_another_size_is_not_its_own(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    for number, image in enumerate(x):
        Image.fromarray(image).save(tmp_path / "pets" / "cat" / f"{number}.png")
    parent, child = (stream(tmp_path / "pets", size) for size in (8, 16))
    assert parent.digest == child.digest
    for each in (parent, child):
        write_rows(tmp_path / "rows", each)
        write_rows(tmp_path / str(each.shape[1]), each)
    records = records_in(tmp_path / "rows")
    apart = [records_in(tmp_path / size)[parent.digest] for size in ("8", "16")]
    assert merge_records(apart)[parent.digest].to_bytes() == records[parent.digest].to_bytes()
    for each in (parent, child):
        assert np.isin(row_keys(each.test), records[parent.digest].keys["test"]).all()
    named = Ancestor("start", "p", "f" * 64, "p", parent.digest)
    check = check_leaks(child, [named], records_in(tmp_path / "8"))
    assert (check.leaks, check.unknown) == ([], [])  # the same files in the same splits
    swapped = replace(child, train=child.test, test=child.train, digest="c" * 64)
    assert len(check_leaks(swapped, [named], records_in(tmp_path / "8")).unknown) == 1
    assert [leak.count for leak in check_leaks(swapped, [named], records).leaks] == [3]
