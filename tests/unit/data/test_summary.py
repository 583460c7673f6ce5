"""Summary of a data set, and the data settings of a path."""

from __future__ import annotations

import json

import numpy as np
import pytest

from advtrain.data import DataConfig, load_data
from advtrain.data.batches import ArraySplit
from advtrain.data.found import Found
from advtrain.data.locate import data_config
from advtrain.data.summary import DataSummary
from advtrain.errors import UserError


def npz(folder, y_train, y_test, same=0):
    """Write an npz whose first `same` test images are training images."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (len(y_train), 4, 4), np.uint8)
    other = rng.integers(0, 256, (len(y_test), 4, 4), np.uint8)
    other[:same] = x[:same]
    path = folder / "d.npz"
    np.savez(path, x_train=x, y_train=np.array(y_train), x_test=other, y_test=np.array(y_test))
    return load_data(DataConfig(source="npz", path=str(path), num_classes=1 + max(y_train)), folder)


def test_summary_counts_samples_of_each_class_in_each_split(tmp_path):
    summary = DataSummary.of(npz(tmp_path, [0] * 20 + [1] * 40, [0] * 3 + [1] * 5))
    assert summary.samples == {"train": 54, "validation": 6, "test": 8}
    assert summary.classes == {
        "0": {"train": 18, "validation": 2, "test": 3},
        "1": {"train": 36, "validation": 4, "test": 5},
    }
    assert (summary.shape, summary.dtype, summary.remarks()) == ((1, 4, 4), "uint8", [])
    assert json.loads(json.dumps(summary.to_json()))["samples"]["train"] == 54


@pytest.mark.parametrize(
    ("y_train", "y_test", "same", "remark"),
    [
        ([0] * 20 + [1] * 20, [0] * 5 + [1] * 5, 3, "of 10 test samples are copies of train"),
        (
            [0] * 400 + [1] * 10,
            [0] * 5 + [1] * 5,
            0,
            "less than 5% of the training samples of the largest one: 1",
        ),
        ([0] * 20 + [1] * 20, [0] * 5, 0, "no test sample of the classes 1"),
        (
            [1] * 20 + [2] * 20,
            [0, 1, 2],
            0,
            "no training sample of the classes 0: the model cannot learn them",
        ),
    ],
)
def test_summary_remarks_on_what_looks_wrong(tmp_path, y_train, y_test, same, remark):
    (found,) = DataSummary.of(npz(tmp_path, y_train, y_test, same)).remarks()
    assert remark in found


def test_summary_names_skipped_files_and_notes(tmp_path):
    data = npz(tmp_path, [0] * 20 + [1] * 20, [0, 1])
    skipped = {"hidden": ["a/.x", "a/.y", "b/.z", "c/.z"]}
    object.__setattr__(data, "found", Found(files=4, skipped=skipped, notes=["one image is gray"]))
    assert DataSummary.of(data).remarks() == [
        "one image is gray",
        "4 files skipped, hidden: a/.x, a/.y, b/.z and 1 more",
    ]


def test_summary_of_a_regression_has_the_range_of_the_targets(tmp_path):
    summary = DataSummary.of(load_data(DataConfig(source="diabetes", task="regression"), tmp_path))
    assert summary.classes == {}
    assert summary.targets["train"] == (25.0, 346.0)
    assert summary.remarks() == []


def test_data_config_finds_files_folders_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "rows").mkdir()
    for name in ("d.npz", "rows/train-0.parquet"):
        (tmp_path / name).touch()
    root = tmp_path / "elsewhere"
    assert data_config("digits", root) == DataConfig(source="digits")
    assert data_config("d.npz", root).source == "npz"
    assert data_config("pets", root, image_size=8).image_size == 8
    assert data_config("pets", root).source == "image_folder"
    (root / "hub" / "data").mkdir(parents=True)
    (root / "hub" / "data" / "train-0.parquet").write_bytes(b"")
    assert data_config("hub", root).source == "parquet"
    assert data_config("rows", root).source == data_config("rows/train-0.parquet", root).source == "parquet"
    assert data_config("cat", tmp_path / "pets").path == str(tmp_path / "pets" / "cat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digts", "did you mean 'digits'"),
        ("gone.npz", "no such file"),
        ("a.doc", "a file: .npz, .csv, .parquet"),
    ],
)
def test_data_config_says_what_it_takes(tmp_path, text, message):
    (tmp_path / "a.doc").touch()
    with pytest.raises(UserError, match=message):
        data_config(text, tmp_path)


def test_constant_data_is_remarked():
    split = ArraySplit(np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1]))
    from advtrain.data import Dataset

    remarks = DataSummary.of(Dataset("zeros", split, split, split, 2, (1, 2, 2), "0" * 64)).remarks()
    assert "every value of every sample is 0" in remarks
