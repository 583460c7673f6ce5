"""Labels and layouts of npz and parquet files as other tools write them."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from advtrain.data import DataConfig, load_data, read_inputs
from advtrain.data.arrays import class_labels
from advtrain.data.loading import load_source
from advtrain.data.parquet import index_parquet, split_files
from advtrain.data.summary import DataSummary
from advtrain.data.unseen import Accepts, load_unseen
from advtrain.errors import UserError

TEXTS = np.array(["wolf", "cat", "cat", "dog"])


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [
        (np.array([0, 2, 1], np.uint8), [0, 2, 1], None),
        (np.array([[0], [2], [1]]), [0, 2, 1], None),
        (np.array([0, 2, 1], np.float16), [0, 2, 1], None),
        (np.array([True, False]), [1, 0], ["False", "True"]),
        (np.eye(3)[[2, 0, 1]], [2, 0, 1], ["0", "1", "2"]),
        (np.eye(3, dtype=bool)[[2, 0]], [2, 0], ["0", "1", "2"]),
        (TEXTS, [2, 0, 0, 1], ["cat", "dog", "wolf"]),
        (TEXTS.astype(bytes), [2, 0, 0, 1], ["cat", "dog", "wolf"]),
        (np.array(["10", "2", "0"]), [2, 1, 0], ["0", "2", "10"]),
        (np.array([], np.int64), [], None),
    ],
    ids=repr,
)
def test_class_labels_accepts_every_form(values, labels, names):
    found, named = class_labels(values, "y")
    assert found.dtype == np.int64
    assert (found.tolist(), named) == (labels, names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0, 1.5]), "label 1.5 of sample 1 is not a whole number"),
        (np.array([0, np.nan]), "label nan of sample 1"),
        (np.array([[0.9, 0.1], [0, 1]]), r"row 0 is \[0.9, 0.1\].*one-hot"),
        (np.array([[0, 1], [1, 1]]), r"row 1 is \[1, 1\]"),
        (np.array([[0, 1], [0, 0]]), r"row 1 is \[0, 0\]"),
        (np.array([["a", "b"]]), "one-hot rows must hold numbers"),
        (np.zeros((2, 3, 3)), r"shape \(2, 3, 3\)"),
        (np.array(["a", ""]), "label of sample 1 is empty"),
        (np.array(["2020-01-01"], "datetime64[D]"), "not datetime64"),
        (np.array([0, 10**9]), "label 1000000000 of sample 1 is too large"),
    ],
    ids=str,
)
def test_class_labels_refuses_what_is_no_label(values, message):
    with pytest.raises(UserError, match=f"y.*{message}"):
        class_labels(values, "y")


def test_class_labels_looks_texts_up_in_known_names():
    names = ["wolf", "dog", "cat"]
    assert class_labels(TEXTS, "y", names)[0].tolist() == [0, 2, 2, 1]
    with pytest.raises(UserError, match="'emu' of sample 1 is no class.*wolf, dog, cat"):
        class_labels(np.array(["cat", "emu"]), "y", names)


def arrays(y, n=60):
    x = np.random.default_rng(0).integers(0, 256, (n, 4, 4), dtype=np.uint8)
    return {"x": x, "y": np.resize(y, (n, *np.shape(y)[1:]))}


def npz(path, **content):
    np.savez(path / "data.npz", **content)
    return DataConfig(source="npz", path="data.npz")


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([1, 2, 3], r"no training sample of class 0; subtract 1 .*data.num_classes=4"),
        ([0, 1, 3], "no training sample of class 2; store the labels as text"),
        ([0, 30], r"no training samples of 1, 2, .*, 10, \.\.\."),
    ],
)
def test_npz_with_classes_without_samples_is_refused(tmp_path, y, message):
    with pytest.raises(UserError, match=message):
        load_data(npz(tmp_path, **arrays(y)), tmp_path)


def test_num_classes_keeps_classes_without_samples(tmp_path):
    config = npz(tmp_path, **arrays([1, 2, 3])).model_copy(update={"num_classes": 4})
    data = load_data(config, tmp_path)
    assert data.num_classes == 4
    (remark,) = DataSummary.of(data).remarks()
    assert remark.startswith("no sample of the classes 0: ")


def test_text_labels_of_all_splits_share_the_training_classes(tmp_path):
    train, rest = arrays(["b", "a", "c"]), arrays(["c", "b"], 10)
    splits = {f"{k}_train": v for k, v in train.items()} | {f"{k}_test": v for k, v in rest.items()}
    data = load_data(npz(tmp_path, **splits), tmp_path)
    assert data.class_names == ["a", "b", "c"]
    assert data.test.labels.tolist() == [2, 1] * 5
    splits["y_test"][3] = "d"
    with pytest.raises(UserError, match="y_test: label 'd' of sample 3 is no class"):
        load_data(npz(tmp_path, **splits), tmp_path)


def test_npz_reads_split_first_names_with_validation(tmp_path):
    """Arrays train_images, val_labels and so on, with labels (N, 1), as in MedMNIST."""
    sizes = {"train": 40, "val": 20, "test": 10}
    content = {}
    for split, n in sizes.items():
        content[f"{split}_images"], content[f"{split}_labels"] = arrays([[0], [1]], n).values()
    data = load_data(npz(tmp_path, **content), tmp_path)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [40, 20, 10]


def test_image_and_label_name_the_arrays(tmp_path):
    x, y = arrays([0, 1]).values()
    config = npz(tmp_path, pixels=x, kind=y, x=x[:5], y=y[:5])
    named = config.model_copy(update={"image": "pixels", "label": "kind"})
    data = load_data(named, tmp_path)
    assert sum(len(s) for s in (data.train, data.validation, data.test)) == 60
    with pytest.raises(UserError, match="has no shade .*found: kind, pixels, x, y"):
        load_data(config.model_copy(update={"label": "shade"}), tmp_path)
    with pytest.raises(UserError, match="data.label does not apply to digits"):
        load_data(DataConfig(source="digits", label="y"), tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bool"])
def test_npz_accepts_other_types_of_pixels(tmp_path, dtype):
    content = arrays([0, 1])
    content["x"] = (content["x"] / 255).round().astype(dtype)
    assert load_data(npz(tmp_path, **content), tmp_path).train.images.dtype == np.float32


def test_integer_pixels_are_refused_with_remedy(tmp_path):
    content = arrays([0, 1])
    content["x"] = content["x"].astype(np.int64)
    with pytest.raises(UserError, match=r"not int64; its values fit 8 bits: store x.astype\('uint8'\)"):
        load_data(npz(tmp_path, **content), tmp_path)


def test_object_array_is_refused_with_remedy(tmp_path):
    with pytest.raises(UserError, match=r"dtype object, which is a pickle.*y.astype\(str\)"):
        load_data(npz(tmp_path, x=np.zeros((2, 4, 4)), y=np.array(["a", 1], object)), tmp_path)


def png(shade):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels, names=None, columns=("image", "label")):
    path.parent.mkdir(exist_ok=True, parents=True)
    table = pa.table(dict(zip(columns, [images, labels], strict=True)))
    if names:
        about = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path)
    return path


IMAGES = [png(10 * i) for i in range(4)]


@pytest.mark.parametrize(
    "images",
    [
        pa.array(IMAGES),
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES).dictionary_encode(),
        pa.array([{"bytes": b, "path": None} for b in IMAGES]),
    ],
    ids=lambda a: str(a.type)[:30],
)
@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")], ids="-".join)
def test_index_parquet_accepts_every_image_column(tmp_path, images, columns):
    path = write_parquet(tmp_path / "d.parquet", images, [1, 0, 1, 0], columns=columns)
    inputs = read_inputs(path, (1, 4, 4), ["no", "yes"])
    (task,) = inputs.tasks(4)
    from advtrain.data import decode

    assert decode(task, (1, 4, 4))[:, 0, 0, 0] * 255 == pytest.approx([0, 10, 20, 30])
    assert inputs.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "declared", "numbers", "names"),
    [
        ([1, 0, 1, 2], ["x", "y", "z"], [1, 0, 1, 2], ["x", "y", "z"]),
        (["b", "a", "b", "c"], None, [1, 0, 1, 2], ["a", "b", "c"]),
        (pa.array(["b", "a", "b", "c"]).dictionary_encode(), None, [1, 0, 1, 2], ["a", "b", "c"]),
        ([True, False, True, True], None, [1, 0, 1, 1], ["False", "True"]),
        ([1.0, 0.0, 1.0, 2.0], None, [1, 0, 1, 2], None),
    ],
    ids=str,
)
def test_index_parquet_reads_labels_and_class_names(tmp_path, labels, declared, numbers, names):
    index = index_parquet([write_parquet(tmp_path / "d.parquet", IMAGES, labels, declared)])
    assert index.labels.tolist() == numbers
    assert index.class_names == names


@pytest.mark.parametrize("names", [["y", "x"], ["x", "other"], ["x", "y"], None])
@pytest.mark.parametrize("where", ["test split", "model", "next file"])
def test_parquet_that_numbers_the_classes_in_another_order_is_refused(tmp_path, names, where):
    write_parquet(tmp_path / "train-0.parquet", IMAGES, [0, 1, 0, 1], ["x", "y"])
    other = {"test split": "test.parquet", "next file": "train-1.parquet"}.get(where, "other.parquet")
    path = write_parquet(tmp_path / other, IMAGES, [0, 1, 1, 0], names)

    def read():
        if where == "model":
            return load_unseen(
                DataConfig(source="parquet", path=other), tmp_path, Accepts((1, 4, 4), 2, ["x", "y"])
            )
        config = DataConfig(source="parquet", path=str(tmp_path), validation_fraction=0.5, test_fraction=0.25)
        return load_source(config, tmp_path)

    if names != ["y", "x"]:
        assert read().class_names == ["x", "y"]
        return
    with pytest.raises(UserError, match=f"{path.name}': class 0 is y, but .* in the model y is class 1"):
        read()


@pytest.mark.parametrize(
    ("columns", "how", "message"),
    [
        (("picture", "label"), {}, "lacks a column of images.*picture, label; set data.image"),
        (("image", "kind"), {}, "lacks a column of labels.*image, kind; set data.label"),
        (("image", "label"), {"label": "kind"}, "lacks the column kind"),
        (("picture", "label"), {"image": "pictures"}, "no column pictures; did you mean 'picture'"),
        (("image", "label"), {"image": "label"}, "the column label holds int64; images are"),
    ],
    ids=str,
)
def test_index_parquet_names_missing_column(tmp_path, columns, how, message):
    path = write_parquet(tmp_path / "d.parquet", IMAGES, [0, 1, 0, 1], columns=columns)
    with pytest.raises(UserError, match=message):
        index_parquet([path], **how)


def test_decode_names_null_image(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", [IMAGES[0], None], [0, 1])
    from advtrain.data import decode

    with pytest.raises(UserError, match="row 1: the row holds no bytes"):
        decode(next(read_inputs(path, (1, 4, 4)).tasks(2)), (1, 4, 4))


@pytest.mark.parametrize(
    "layout", ["{}-00000-of-00002.parquet", "data/{}-00000-of-00002.parquet", "{}/0000.parquet"]
)
def test_split_files_finds_layouts_of_hugging_face(tmp_path, layout):
    for split in ("train", "validation", "test"):
        first = tmp_path / layout.format(split)
        for file in (first, first.with_name(first.name.replace("0-of", "1-of"))):
            file.parent.mkdir(exist_ok=True, parents=True)
            file.touch()
    count = 1 if layout.startswith("{}/") else 2
    found = split_files(tmp_path, "parquet")
    assert {part: len(files) for part, files in found.items()} == dict.fromkeys(found, count)
    assert set(found) == {"train", "validation", "test"}


def test_split_files_passes_over_hidden_files_only(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("a.parquet", "_b.parquet", ".c.parquet", "._a.parquet"):
        (tmp_path / "train" / name).touch()
    found = split_files(tmp_path, "parquet")["train"]
    assert [file.name for file in found] == ["_b.parquet", "a.parquet"]


def test_split_files_names_missing_shard(tmp_path):
    for number in (0, 2):
        (tmp_path / f"train-0000{number}-of-00003.parquet").touch()
    with pytest.raises(UserError, match="2 of 3 files of 'train'; file 1 is missing"):
        split_files(tmp_path, "parquet")


@pytest.mark.parametrize(
    ("splits", "sizes"), [(("test", "val"), (40, 20, 20)), (("val",), (36, 4, 20))], ids=str
)
def test_validation_files_are_the_test_split_if_there_is_none(tmp_path, monkeypatch, splits, sizes):
    from advtrain.data import ArraySplit
    from advtrain.data.stream import StreamSplit

    write_parquet(tmp_path / "train-0.parquet", IMAGES * 10, [0, 1] * 20, ["no", "yes"])
    for split in splits:
        write_parquet(tmp_path / f"{split}-0.parquet", IMAGES * 5, [0, 1] * 10)
    monkeypatch.setattr(
        StreamSplit, "to_memory", lambda s: ArraySplit(np.zeros((len(s), 1, 4, 4), np.uint8), s.labels)
    )
    data = load_data(DataConfig(source="parquet", path="."), tmp_path)
    assert tuple(len(s) for s in (data.train, data.validation, data.test)) == sizes
    assert data.class_names == ["no", "yes"]
    assert len(data.found.notes) == 2 - len(splits)
