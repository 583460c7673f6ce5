"""Inputs of predictions: every format is read in order, and errors describe the problem."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from advtrain.data import decode, read_inputs
from advtrain.errors import UserError
from tests.kit import write_images

SHAPE = (1, 8, 8)


@pytest.fixture
def images(tmp_path):
    """Write seven gray images whose shade is their number; return the folder."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for i in range(7):
        place = folder / ("deeper" if i > 4 else "") / f"{i}.png"
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(place)
    return folder


def shades(inputs, batch_size=3):
    parts = [decode(task, inputs.shape) for task in inputs.tasks(batch_size)]
    assert all(part.dtype == np.float32 for part in parts)
    return np.concatenate(parts).reshape(len(inputs), -1)


def test_read_inputs_orders_image_folder_by_path(images):
    inputs = read_inputs(images, SHAPE)
    assert [name.rpartition("/")[2] for name in inputs.names] == [f"{i}.png" for i in range(7)]
    assert np.allclose(shades(inputs)[:, 0], 20 * np.arange(7) / 255)
    assert inputs.labels is None


def test_read_inputs_accepts_single_image(images):
    assert np.allclose(shades(read_inputs(images / "3.png", SHAPE)), 60 / 255)


def test_decode_converts_images_to_model_channels_and_size(images):
    assert decode(next(read_inputs(images, (3, 6, 6)).tasks(2)), (3, 6, 6)).shape == (2, 3, 6, 6)


@pytest.mark.parametrize("layout", ["N,H,W", "N,C,H,W", "N,H,W,C", "uint8"])
def test_read_inputs_accepts_common_array_layouts(tmp_path, layout):
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8)).astype(np.uint8)
    stored = {
        "N,H,W": (x / 255).astype(np.float32),
        "N,C,H,W": (x / 255)[:, None],
        "N,H,W,C": (x / 255)[..., None],
        "uint8": x,
    }[layout]
    np.savez(tmp_path / "x.npz", x=stored, y=np.arange(5))
    inputs = read_inputs(tmp_path / "x.npz", SHAPE)
    assert np.allclose(shades(inputs), x.reshape(5, -1) / 255, atol=1e-7)
    assert inputs.labels.tolist() == [0, 1, 2, 3, 4]
    np.save(tmp_path / "x.npy", stored)
    assert np.allclose(shades(read_inputs(tmp_path / "x.npy", SHAPE)), x.reshape(5, -1) / 255, atol=1e-7)


@pytest.mark.parametrize("labelled", [True, False])
def test_read_inputs_accepts_parquet_without_labels(tmp_path, images, labelled):
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(images.rglob("*.png"))
    columns = {"image": [{"bytes": p.read_bytes(), "path": p.name} for p in files]}
    if labelled:
        columns["label"] = list(range(len(files)))
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=2)
    inputs = read_inputs(tmp_path / "x.parquet", SHAPE)
    assert np.allclose(shades(inputs)[:, 0], 20 * np.arange(7) / 255)
    assert (inputs.labels is not None) is labelled


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npz", {"x": np.zeros((2, 9, 9))}, r"samples \(1, 9, 9\); the model takes \(1, 8, 8\)"),
        ("x.npz", {"x": np.full((2, 8, 8), 2.0)}, "sample 0 of x has values outside"),
        ("x.npz", {"x": np.full((2, 8, 8), np.nan)}, "sample 0 of x has values outside"),
        ("x.npz", {"z": np.zeros((2, 8, 8))}, "has z; expected x"),
        ("x.npz", {"x": np.zeros((2, 8, 8), np.int64)}, "must be uint8, or float"),
        ("x.npz", b"nothing", "plain arrays"),
        ("x.npy", b"", "plain arrays"),
        ("x.parquet", b"nothing", "not a readable parquet"),
        ("x.txt", b"nothing", "holds no images"),
    ],
)
def test_read_inputs_error_describes_unreadable_input(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_inputs(write(tmp_path / name, content), SHAPE)


def test_read_inputs_rejects_pickled_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match="plain arrays"):
        read_inputs(tmp_path / "x.npy", SHAPE)


def test_decode_error_names_undecodable_image(tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    task = next(read_inputs(tmp_path / "broken.png", SHAPE).tasks(1))
    with pytest.raises(UserError, match="broken.png"):
        decode(task, SHAPE)


def test_read_inputs_rejects_images_for_tabular_model(tmp_path, images):
    with pytest.raises(UserError, match="not square images"):
        read_inputs(images, (10,))


def test_read_inputs_rejects_missing_or_empty_path(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_inputs(tmp_path / "none", SHAPE)
    with pytest.raises(UserError, match="holds no images"):
        read_inputs(tmp_path, SHAPE)


def test_read_inputs_reads_class_folders(tmp_path):
    write_images(tmp_path / "set", {"test": 2})
    assert len(read_inputs(tmp_path / "set", (3, 12, 12))) == 6
