"""Data sources, splits and the rejection of bad data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from advtrain.data import ArraySplit, AugmentConfig, DataConfig, Place, StreamSplit, load_data
from advtrain.errors import UserError
from tests.kit import digits_data, write_images


def npz(path, **arrays):
    np.savez(path / "data.npz", **arrays)
    return DataConfig(source="npz", path="data.npz")


def good(n=60, shape=(4, 4), classes=3):
    rng = np.random.default_rng(0)
    return {"x": rng.integers(0, 256, (n, *shape), dtype=np.uint8), "y": np.arange(n) % classes}


def test_splits_are_disjoint_stratified_seeded_and_complete():
    data, again = digits_data(), digits_data()
    assert data.digest == again.digest
    parts = [data.train, data.validation, data.test]
    assert sum(map(len, parts)) == 1797
    pixels = np.concatenate([p.images.reshape(len(p), -1) for p in parts])
    from sklearn.datasets import load_digits

    original = np.round(load_digits().data * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, pixels)) == sorted(map(bytes, original))
    for part in parts:
        shares = np.bincount(part.labels, minlength=10) / len(part)
        assert np.abs(shares - 0.1).max() < 0.03


def test_digest_depends_on_split_seed():
    one = load_data(DataConfig(source="digits"), Path())
    other = load_data(DataConfig(source="digits", split_seed=1), Path())
    assert one.digest != other.digest


@pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (5, 5, 1), (3, 5, 5), (5, 5, 3)], ids=str)
def test_npz_accepts_common_layouts(tmp_path, shape):
    arrays = good(shape=shape)
    data = load_data(npz(tmp_path, **arrays), tmp_path)
    channels = 3 if 3 in shape else 1
    assert data.shape == (channels, 5, 5)
    first = np.flatnonzero((arrays["x"].reshape(60, -1) == 0).sum(1) >= 0)[0]
    image = (
        arrays["x"][first] if len(shape) == 2 or shape[0] in (1, 3) else arrays["x"][first].transpose(2, 0, 1)
    )
    whole = np.concatenate([data.train.images, data.validation.images, data.test.images])
    assert (whole == image.reshape(channels, 5, 5)).all((1, 2, 3)).any()


def test_npz_keeps_its_test_split(tmp_path):
    a, b = good(60), good(30)
    data = load_data(npz(tmp_path, x_train=a["x"], y_train=a["y"], x_test=b["x"], y_test=b["y"]), tmp_path)
    assert len(data.test) == 30
    assert len(data.train) + len(data.validation) == 60


def test_mnist_is_read_from_the_data_root(data_root):
    data = load_data(DataConfig(source="mnist"), data_root)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [54_000, 6_000, 10_000]
    assert data.shape == (1, 28, 28)


def test_fashion_mnist_is_read_from_its_own_folder(data_root, tmp_path):
    """FashionMNIST/raw has the file format of MNIST, so files of MNIST are used in its place."""
    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "FashionMNIST" / "raw").symlink_to(data_root / "MNIST" / "raw")
    data = load_data(DataConfig(source="fashion_mnist"), tmp_path)
    assert len(data.test) == 10_000
    assert data.digest == load_data(DataConfig(source="mnist"), data_root).digest


@pytest.mark.ray
def test_parquet_is_identical_in_memory_and_streamed(ray_cluster, tmp_path, data_root):
    """Oracle: each image decoded by hand from its bytes."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    source = pq.ParquetFile(data_root / "CIFAR10-jpeg" / "test.parquet").read_row_group(0)
    folder = tmp_path / "cifar"
    folder.mkdir()
    pq.write_table(source.slice(0, 300), folder / "train-0.parquet", row_group_size=70)
    pq.write_table(source.slice(300, 300), folder / "train-1.parquet", row_group_size=128)
    pq.write_table(source.slice(600, 60), folder / "test.parquet")
    config = {"source": "parquet", "path": "cifar", "num_classes": 10}
    held = load_data(DataConfig(**config), tmp_path)
    streamed = load_data(DataConfig(**config, stream=True), tmp_path)
    assert isinstance(held.train, ArraySplit)
    assert isinstance(streamed.train, StreamSplit)
    by_hand = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(row["bytes"]))).transpose(2, 0, 1)
            for row in source.slice(600, 60)["image"].to_pylist()
        ]
    )
    assert np.array_equal(held.test.images, by_hand)
    assert np.array_equal(held.test.labels, source.slice(600, 60)["label"].to_numpy())
    for name in ("train", "validation", "test"):
        ours = torch.cat([b.x for b in getattr(streamed, name).batches(64, Place())])
        assert torch.equal(ours, torch.from_numpy(getattr(held, name).images).float() / 255)
    # An epoch of the stream over three ranks covers every row once.
    rows = [
        torch.cat(
            [b.x.flatten(1) for b in streamed.train.train_batches(50, 0, 1, AugmentConfig(), Place(rank, 3))]
        )
        for rank in range(3)
    ]
    seen = sorted(bytes(r.numpy().tobytes()) for r in torch.cat(rows))
    expected = sorted(
        bytes(r.tobytes()) for r in (torch.from_numpy(held.train.images).float() / 255).flatten(1).numpy()
    )
    assert seen == expected


@pytest.mark.ray
def test_image_folder_streams_random_crops_and_resumes_in_mid_epoch(ray_cluster, tmp_path):
    write_images(tmp_path / "pets", {"train": 20, "val": 8})
    config = DataConfig(
        source="image_folder",
        path="pets",
        stream=True,
        image_size=10,
        augment=AugmentConfig(resized_crop=0.3, flip=True),
    )
    data = load_data(config, tmp_path)
    assert data.class_names == ["class0", "class1", "class2"]
    assert data.shape == (3, 10, 10)
    assert len(data.test) == 24
    whole = list(data.train.train_batches(16, 0, 0, config.augment, Place()))
    rest = list(data.train.train_batches(16, 0, 0, config.augment, Place(), start=2))
    assert sum(len(b.y) for b in whole) == len(data.train)
    assert all(torch.equal(a.x, b.x) for a, b in zip(rest, whole[2:], strict=True))
    for batch in whole:  # each class has its own shade, so images and labels can be matched
        assert torch.equal((batch.x.mean((1, 2, 3)) * 255 // 60).long(), batch.y)


BAD = {
    "label 7 of sample 3 is outside": lambda a: a["y"].__setitem__(3, 7),
    "label -1 of sample 5 is outside": lambda a: a["y"].__setitem__(5, -1),
}


@pytest.mark.parametrize("message", BAD)
def test_load_data_names_sample_with_label_out_of_range(tmp_path, message):
    arrays = good()
    BAD[message](arrays)
    config = npz(tmp_path, **arrays).model_copy(update={"num_classes": 3})
    with pytest.raises(UserError, match=message):
        load_data(config, tmp_path)


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (1.5, "1.5"), (-0.1, "-0.1"), (255.0, "255")])
def test_load_data_names_sample_with_value_outside_unit_interval(tmp_path, value, shown):
    arrays = good()
    arrays["x"] = arrays["x"].astype(np.float32) / 255
    arrays["x"][4, 1, 2] = value
    with pytest.raises(UserError, match=rf"sample 4 contains {shown}.*\[0, 1\]"):
        load_data(npz(tmp_path, **arrays), tmp_path)


def drop(key):
    return lambda a: a.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("y"), r"has no labels \(y\)"),
        (lambda a: a.update(y=a["y"][:-1]), "60 samples but y has 59"),
        (lambda a: a.update(y=a["y"] + 0.5), "label 0.5 of sample 0 is not a whole number"),
        (lambda a: a.update(x=a["x"].astype(np.int64)), "uint8, or float"),
        (lambda a: a.update(x=a["x"].reshape(60, 2, 2, 2, 2)), r"\(N, C, H, W\)"),
        (lambda a: a.update(x=a["x"][:0], y=a["y"][:0]), "no training samples"),
        (lambda a: a.update(x=a["x"][:4], y=a["y"][:4]), "without some of the 3 classes"),
    ],
)
def test_npz_with_wrong_arrays_is_rejected(tmp_path, change, message):
    arrays = good()
    change(arrays)
    with pytest.raises(UserError, match=message):
        load_data(npz(tmp_path, **arrays), tmp_path)


def test_npz_with_pickled_objects_is_rejected(tmp_path):
    with pytest.raises(UserError, match="plain arrays"):
        load_data(npz(tmp_path, x=np.array([{}, {}]), y=np.array([0, 1])), tmp_path)


def test_truncated_npz_is_rejected(tmp_path):
    config = npz(tmp_path, **good())
    content = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="no intact"):
        load_data(config, tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_non_npz_file_is_rejected(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"'.*data\.npz' is not a readable file of plain arrays"):
        load_data(DataConfig(source="npz", path="data.npz"), tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.5], "label 0.5 of sample 0 is not a whole number"),
        ([["a"], ["b"]], "the column label holds list<"),
        ([0, None], "the label of row 1 is null"),
        ([], "no rows"),
    ],
)
def test_invalid_parquet_file_is_rejected(tmp_path, labels, message):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array([b""] * len(labels), pa.binary())
    pq.write_table(
        pa.table({"image": images, "label": labels or pa.array([], pa.int64())}), tmp_path / "d.parquet"
    )
    with pytest.raises(UserError, match=f"d.parquet'.*{message}"):
        load_data(DataConfig(source="parquet", path="d.parquet"), tmp_path)
    (tmp_path / "d.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"d\.parquet' is not a readable parquet"):
        load_data(DataConfig(source="parquet", path="d.parquet"), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": "mnits"}, "did you mean 'mnist'"),
        ({"source": "mnist"}, "--data-root.*data.download=true"),
        ({"source": "npz"}, "data.path is not set"),
        ({"source": "npz", "path": "gone.npz"}, "does not exist"),
        ({"source": "image_folder", "path": "empty"}, "no images"),
        ({"source": "parquet", "path": "empty"}, r"no train\*\.parquet"),
        ({"source": "digits", "num_classes": 9}, "has 10 classes"),
        ({"source": "digits", "validation_fraction": 0.001}, "validation_fraction"),
    ],
    ids=str,
)
def test_load_data_rejects_invalid_config_with_suggestion(tmp_path, config, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        load_data(DataConfig(**config), tmp_path)


@pytest.mark.ray
def test_load_data_error_names_undecodable_image(ray_cluster, tmp_path):
    write_images(tmp_path / "pets", {"train": 12, "val": 4})
    broken = tmp_path / "pets" / "train" / "class1" / "003.png"
    broken.write_bytes(broken.read_bytes()[:-60])  # truncated: the header is sound
    with pytest.raises(UserError, match=r"class1/003\.png"):
        load_data(DataConfig(source="image_folder", path="pets", image_size=8), tmp_path)


def test_test_classes_missing_from_training_are_rejected(tmp_path):
    write_images(tmp_path / "pets", {"train": 4, "val": 4})
    shutil.rmtree(tmp_path / "pets" / "train" / "class2")
    with pytest.raises(UserError, match="class2"):
        load_data(DataConfig(source="image_folder", path="pets", stream=True, image_size=8), tmp_path)
