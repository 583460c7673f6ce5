"""Streamed texts: equal to texts in memory, and batches as pure functions of seed, epoch, step and rank."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from advtrain.data import AugmentConfig, DataConfig, Place, StreamTextSplit, load_data, stream
from advtrain.data.rows import row_keys
from advtrain.data.summary import DataSummary
from advtrain.errors import UserError
from advtrain.evaluation import edits
from tests.kit import write_parquet_texts
from tests.linear_text_kit import text_recipe
from tests.unit.training.test_loop import check_resume


def load(folder, **settings):
    return load_data(DataConfig(source="text", path=folder.name, **settings), folder.parent)


def read_here(tasks, read):
    return (stream._caught(task, read) for task in tasks)


@pytest.fixture
def here(monkeypatch):
    """Read all batches in this process, without Ray."""
    monkeypatch.setattr(stream, "_on_ray", read_here)


def words(batches):
    return [
        (ids[ids != 0].tolist(), int(y)) for batch in batches for ids, y in zip(batch.x, batch.y, strict=True)
    ]


def epoch_of(split, epoch=0, place=None, start=0):
    return list(split.train_batches(8, 0, epoch, AugmentConfig(), place or Place(), start))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("splits", [None, {"train": slice(300)}])
@pytest.mark.parametrize("unit", ["words", "bytes"])
def test_streamed_texts_equal_those_in_memory(tmp_path, splits, unit):
    folder = write_parquet_texts(tmp_path / "set", splits)
    held, streamed = (load(folder, tokenizer=unit, stream=value) for value in (False, True))
    assert isinstance(streamed.train, StreamTextSplit)
    assert streamed.text == held.text
    assert (streamed.shape, streamed.class_names) == (held.shape, held.class_names)
    assert streamed.eight_bit is False
    for name in ("validation", "test"):
        assert np.array_equal(getattr(streamed, name).images, getattr(held, name).images)
    assert words(streamed.train.batches(9, Place())) == words(held.train.batches(9, Place()))
    assert np.array_equal(row_keys(streamed.train), row_keys(held.train))
    one, other = DataSummary.of(streamed), DataSummary.of(held)
    assert (one.classes, one.copies, one.dtype, one.values) == (other.classes, other.copies, "int64", None)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("grouped", [False, True])
def test_streamed_batches_are_functions_of_seed_epoch_step_and_rank(tmp_path, monkeypatch, grouped):
    monkeypatch.setattr(stream, "SHUFFLE_WINDOW", 60)
    split = load(write_parquet_texts(tmp_path / "set"), stream=True, group_by_length=grouped).train
    whole = epoch_of(split)
    assert sorted(words(whole)) == sorted(words(split.batches(len(split), Place())))
    rest = epoch_of(pickle.loads(pickle.dumps(split)), start=9)
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(rest, whole[9:], strict=True))
    assert words(epoch_of(split, 1)) != words(whole)
    ranks = [epoch_of(split, place=Place(rank, 3)) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert words(rank[step] for rank in ranks) == words([batch])
        assert batch.x.shape[1] == (batch.x != 0).sum(1).max()
    padding = sum(int((b.x == 0).sum()) for b in whole) / sum(b.x.numel() for b in whole)
    assert padding < 0.1 if grouped else padding > 0.2


@pytest.mark.usefixtures("here")
def test_rank_without_rows_has_an_empty_batch(tmp_path):
    split = load(write_parquet_texts(tmp_path / "set"), stream=True).train.take(np.arange(3))
    (batch,) = split.train_batches(3, 0, 0, AugmentConfig(), Place(0, 4))
    assert (batch.x.shape, len(batch.y), batch.total) == ((0, 1), 0, 3)


@pytest.mark.ray
def test_ray_reads_the_batches_that_this_process_reads(ray_cluster, tmp_path, monkeypatch):
    split = load(write_parquet_texts(tmp_path / "set"), stream=True, group_by_length=True).train
    by_ray = epoch_of(split, start=24)
    monkeypatch.setattr(stream, "_on_ray", read_here)
    assert words(by_ray) == words(epoch_of(split, start=24))
    (tmp_path / "set" / "train-1.parquet").unlink()
    stream.column_of_group.cache_clear()
    with pytest.raises(UserError, match="train-1.parquet' cannot be read"):
        epoch_of(split)


@pytest.mark.usefixtures("here")
def test_copies_classes_and_cut_texts_are_those_of_texts_in_memory(tmp_path):
    splits = {"train": slice(240), "test": slice(200, 300)}
    folder = write_parquet_texts(tmp_path / "set", splits)
    settings = {"max_length": 6, "classes": ["good", "bad"], "train_samples": 60}
    held, streamed = (load(folder, stream=value, **settings) for value in (False, True))
    assert streamed.found.notes[0] == "40 training texts are left out, because they are copies of test texts"
    assert any("training texts (" in note and "longer than 6 tokens" in note for note in streamed.found.notes)
    assert words(streamed.train.batches(7, Place())) == words(held.train.batches(7, Place()))
    assert len(streamed.train) == 60


def test_digest_of_streamed_texts_changes_with_the_files_and_the_split(tmp_path):
    folder = write_parquet_texts(tmp_path / "set")
    digests = {
        load(folder, stream=True).digest,
        load(folder, stream=True, split_seed=1).digest,
        load(folder).digest,
    }
    assert len(digests) == 3
    assert load(folder, stream=True).digest in digests
    (folder / "train-1.parquet").rename(folder / "train-2.parquet")
    assert load(folder, stream=True).digest not in digests


def test_faulty_row_of_a_stream_is_named(tmp_path):
    folder = write_parquet_texts(tmp_path / "set")
    table = pa.table({"text": [*(f"text {i}" for i in range(30)), None], "label": ["bad"] * 31})
    pq.write_table(table, folder / "train-1.parquet", row_group_size=7)
    with pytest.raises(UserError, match=r"train-1.parquet', row 30: the text is empty"):
        load(folder, stream=True)


def test_check_by_transfer_draws_the_same_texts_from_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(edits, "NUM_TRAINING", 50)
    folder = write_parquet_texts(tmp_path / "set")
    held, streamed = (edits.training_texts(load(folder, stream=value), 3) for value in (False, True))
    assert held is not None
    assert streamed is not None
    assert len(streamed[0]) == 50
    assert streamed[0] == held[0]
    assert np.array_equal(streamed[1], held[1])


@pytest.mark.usefixtures("here")
def test_resumed_training_on_a_stream_has_the_weights_of_an_uninterrupted_run(tmp_path):
    data = {"source": "text", "path": str(write_parquet_texts(tmp_path / "set")), "group_by_length": True}
    model = {"name": "text_cnn", "args": {"dim": 8, "channels": 4}}  # with dropout
    recipe = text_recipe(tmp_path, {"name": "fgsm"}, data=data | {"stream": True}, model=model)
    check_resume(tmp_path, recipe, load_data(recipe.data, tmp_path))
