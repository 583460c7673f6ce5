"""Streams of images in files: where they are decoded."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from advtrain.data import Place
from advtrain.data.folders import index_folder
from advtrain.data.stream import StreamSplit


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
