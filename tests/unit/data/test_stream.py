"""Streams of images in files are decoded on the Ray of the command, never on one that Ray Data looks for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from advtrain.data import Place
from advtrain.data.folders import index_folder
from advtrain.data.stream import StreamSplit


def test_stream_starts_ray_before_it_uses_ray_data(tmp_path, monkeypatch):
    class StartedError(Exception):
        pass

    def start(address: str | None) -> None:
        raise StartedError(address)

    monkeypatch.setattr("advtrain.data.stream.start_ray", start)
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "cat" / "0.png")
    index, _ = index_folder(tmp_path)
    split = StreamSplit(index, np.arange(1), 3, 8)
    with pytest.raises(StartedError, match="None"):
        next(split.batches(1, Place()))
