"""Records of samples: equal values have equal keys, and damage is detected."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from advtrain.data import DataConfig, Dataset, load_data, rows
from advtrain.data.batches import ArraySplit
from advtrain.data.folders import index_folder
from advtrain.data.rows import RowRecord, common_rows, record_rows, row_keys
from advtrain.data.stream import StreamSplit
from advtrain.data.tables import RawTable
from advtrain.errors import UserError


def split(x):
    return ArraySplit(x, np.zeros(len(x), np.int64))


def test_one_shared_sample_among_thousands_is_found_by_its_number():
    x = np.random.default_rng(0).integers(0, 256, (6000, 1, 4, 4), np.uint8)
    mine = x[:3000].copy()
    mine[1234] = x[4321]
    assert common_rows(row_keys(split(mine)), row_keys(split(x[3000:]))).tolist() == [1234]


@pytest.mark.parametrize(
    "same",
    [
        lambda x: x / np.float32(255),
        lambda x: x * np.float32(1 / 255),
        lambda x: (x / 255).astype(np.float32),
        lambda x: x.reshape(len(x), -1),
    ],
    ids=["divided", "multiplied", "in double precision", "flat"],
)
def test_keys_do_not_depend_on_the_type_of_equal_values(same):
    x = np.arange(256, dtype=np.uint8).reshape(16, 1, 4, 4)
    assert np.array_equal(row_keys(split(x)), row_keys(split(same(x))))


def test_keys_of_different_samples_differ():
    x = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    other = np.nextafter(x, np.float32(0))
    keys = np.concatenate([row_keys(split(part)) for part in (x, other, np.rint(255 * x).astype(np.uint8))])
    assert len(np.unique(keys)) == 150


def test_keys_of_files_equal_those_of_arrays_with_the_same_pixels(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    (tmp_path / "cat").mkdir()
    for number, image in enumerate(x):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "cat" / f"{number}.png")
    index, _ = index_folder(tmp_path)
    stream = StreamSplit(index, np.arange(6), 3, 8)  # one part, which is decoded without Ray
    assert np.array_equal(row_keys(stream), row_keys(split(x)))


def test_keys_of_a_table_are_those_of_its_rows_before_scaling(tmp_path):
    rng = np.random.default_rng(0)
    ages, colors = rng.permutation(1000)[:200] / 7, rng.choice(["red", "blue"], 200)
    lines = [
        f"{age!r},{color},{'ab'[i % 2]}"
        for i, (age, color) in enumerate(zip(ages.tolist(), colors, strict=True))
    ]
    (tmp_path / "all.csv").write_text("\n".join(["age,color,kind", *lines]))
    part = {"color": colors[:150], "kind": ["ab"[i % 2] for i in range(150)], "age": ages[:150].astype("f4")}
    pq.write_table(pa.table(part), tmp_path / "part.parquet")  # other range, order of columns and precision
    one = load_data(DataConfig(source="csv", path="all.csv", label="kind"), tmp_path)
    other = load_data(
        DataConfig(source="parquet", path="part.parquet", label="kind", features=["color", "age"]), tmp_path
    )
    known, mine = (
        np.concatenate([row_keys(getattr(data, name)) for name in ("train", "validation", "test")])
        for data in (one, other)
    )
    assert len(np.unique(known)) == 200
    assert len(common_rows(mine, known)) == 150


def test_keys_of_scaled_and_unscaled_arrays_are_equal(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (60, 12)).astype(np.float32) / np.float32(255)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(60) % 2)
    plain, scaled = (
        load_data(DataConfig(source="npz", path="x.npz", scale=scale), tmp_path) for scale in (None, "minmax")
    )
    for name in ("train", "validation", "test"):
        assert np.array_equal(row_keys(getattr(scaled, name)), row_keys(getattr(plain, name)))


@pytest.mark.parametrize("first", [1_700_000_000, 1_700_000_000.25, 2**24, -(2**40), 1e200])
def test_keys_of_rows_with_other_large_numbers_differ(first):
    numbers = first + np.arange(50) * max(1.0, abs(first) * 2.0**-50)
    rows = RawTable("f", "y", {"id": numbers, "age": np.full(50, 0.1)}, np.zeros(50))
    table = ArraySplit(np.zeros((50, 2), np.float32), np.zeros(50, np.int64), rows)
    assert len(np.unique(row_keys(table))) == 50


@pytest.mark.parametrize("number", [0.1, 7 / 3, 2.0**23, 2.0**40, 123_456.7])
def test_keys_of_numbers_in_single_and_double_precision_are_equal(number):
    tables = [
        RawTable("f", "y", {"x": np.array([value, 5.0])}, np.zeros(2))
        for value in (number, float(np.float32(number)))
    ]
    one, other = (row_keys(ArraySplit(np.zeros((2, 1)), np.zeros(2), table)) for table in tables)
    assert np.array_equal(one, other)


def test_record_survives_its_file_and_is_refused_if_a_byte_changed(tmp_path):
    record = record_rows(load_data(DataConfig(source="digits"), tmp_path))
    content = record.to_bytes()
    again = RowRecord.from_bytes(content, "f.rows")
    assert (again.data, again.data_digest) == (record.data, record.data_digest)
    assert all(
        np.array_equal(again.keys[name], record.keys[name]) for name in ("train", "validation", "test")
    )
    for position in (3, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        with pytest.raises(UserError, match="'f.rows' is damaged"):
            RowRecord.from_bytes(bytes(changed), "f.rows")
    with pytest.raises(UserError, match="'f.rows' is damaged"):
        RowRecord.from_bytes(content[:-40], "f.rows")


def test_a_record_with_another_text_as_a_form_is_refused():
    assert RowRecord.from_bytes(RowRecord("d", "e", forms=("1x8x8",)).to_bytes(), "f").forms == ("1x8x8",)
    with pytest.raises(UserError, match="'f.rows' is damaged"):
        RowRecord.from_bytes(RowRecord("d", "e", forms=("small",)).to_bytes(), "f.rows")


def test_a_large_stream_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_STREAMED", 3)
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "cat" / "0.png")
    index, _ = index_folder(tmp_path)
    large, small = (StreamSplit(index, np.zeros(n, np.int64), 3, 8) for n in (4, 1))
    record = record_rows(Dataset("f", large, small, small, 1, (3, 8, 8), "0" * 64))
    again = RowRecord.from_bytes(record.to_bytes(), "f")
    assert list(again.keys) == ["validation", "test"]
    assert "more than 3 samples" in again.reason
