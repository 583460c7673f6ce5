"""Streams of images in files: where they are decoded, and how often files are looked at."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advtrain.data import Place, digest_of
from advtrain.data.folders import index_folder
from advtrain.data.stream import ImageIndex, StreamSplit


class StartedError(Exception):
    """Ray would have been started."""


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Return a split of two gray images, 0 and 1; a start of Ray raises StartedError."""

    def start(address: str | None) -> None:
        raise StartedError(address)

    monkeypatch.setattr("advtrain.data.stream.start_ray", start)
    (tmp_path / "cat").mkdir()
    for value in range(2):
        image = Image.fromarray(np.full((8, 8, 3), value, np.uint8))
        image.save(tmp_path / "cat" / f"{value}.png")
    index, _ = index_folder(tmp_path)
    return StreamSplit(index, np.arange(2), 3, 8)


def test_stream_starts_ray_before_it_uses_ray_data(split):
    """Else Ray Data looks for a cluster by itself."""
    with pytest.raises(StartedError, match="None"):
        next(split.batches(1, Place()))


def test_single_batch_needs_no_pipeline(split):
    (batch,) = split.batches(2, Place())
    assert (batch.x * 255).amax((1, 2, 3)).tolist() == [0, 1]
    (unit,) = split.take(np.array([1])).batches(2, Place())
    assert (unit.x * 255).amax() == 1


@pytest.mark.parametrize("count", [100, 1_000])
def test_digest_reads_the_size_of_each_file_once(tmp_path, monkeypatch, count):
    files = [str(tmp_path / f"{number}.png") for number in range(count)]
    for file in files:
        Path(file).touch()
    rows, zeros = np.arange(count), np.zeros(count, np.int64)
    index = ImageIndex(files, rows, zeros - 1, zeros, zeros)
    splits = [StreamSplit(index, part, 3, 8) for part in np.array_split(rows, 3)]
    alone = [digest_of([split]) for split in splits]
    reads, real = Counter(), Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: reads.update([str(path)]) or real(path, **how))
    digest = digest_of(splits)
    assert reads == Counter(files)
    Path(files[0]).write_bytes(b"more")
    assert digest_of(splits) != digest
    assert len({*alone, digest}) == 4
