"""Copies within and across splits, in memory and in streams."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from advtrain.data.batches import ArraySplit
from advtrain.data.duplicates import find_copies
from advtrain.data.folders import index_folder
from advtrain.data.stream import StreamSplit


def test_copies_are_counted_within_and_across_splits():
    x = np.arange(6 * 4, dtype=np.uint8).reshape(6, 1, 2, 2)
    train = ArraySplit(x[[0, 1, 1, 2]], np.array([0, 1, 1, 0]))
    test = ArraySplit(x[[3, 2, 2, 0]], np.array([0, 0, 1, 0]))
    copies = find_copies({"train": train, "test": test})
    assert copies.within == {"train": 1, "test": 1}
    assert copies.across == {"test in train": 3}
    assert copies.conflicts == 3  # image 2 is labelled 0, 0 and 1


def test_no_copies_in_different_samples():
    x = np.random.default_rng(0).random((50, 7)).astype(np.float32)
    splits = {
        "train": ArraySplit(x[:30], np.zeros(30, np.int64)),
        "test": ArraySplit(x[30:], np.ones(20, np.int64)),
    }
    copies = find_copies(splits)
    assert (copies.within, copies.across, copies.conflicts) == (
        {"train": 0, "test": 0},
        {"test in train": 0},
        0,
    )


def test_equal_files_of_a_stream_are_found(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "dog" / "copy.png").write_bytes((tmp_path / "cat" / "0.png").read_bytes())
    index, _ = index_folder(tmp_path)
    split = StreamSplit(index, np.arange(len(index.labels)), 3, 8)
    copies = find_copies({"train": split})
    assert copies.within == {"train": 1}
    assert copies.conflicts == 2


@pytest.mark.parametrize("as_floats", [False, True])
def test_copies_are_found_also_in_floats(as_floats):
    x = np.arange(0, 240, 10, np.uint8).reshape(6, 1, 2, 2)
    other = x[[1, 1, 4]] / np.float32(255) if as_floats else x[[1, 1, 4]]
    labels = np.zeros(3, np.int64)
    copies = find_copies({"train": ArraySplit(x[:3], labels), "test": ArraySplit(other, labels)})
    assert copies.across == {"test in train": 2}
