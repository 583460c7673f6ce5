"""Folders of images as people bring them: layouts, class names, hidden files, forms, damaged images."""

from __future__ import annotations

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from advtrain.data import DataConfig, Place, load_data
from advtrain.data.folders import Layout, layout_of
from advtrain.data.stream import _centre_crop, decode_batch
from advtrain.data.summary import DataSummary
from advtrain.errors import UserError


def write(path, *, shade=100, size=(8, 8), mode="RGB", count=1):
    """Write noisy images of a shade to `path`, or to `path`/NUMBER.png if there are several."""
    for number in range(count):
        file = path if count == 1 else path / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number + shade)
        pixels = rng.integers(shade, shade + 20, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(file)


@pytest.fixture
def pets(tmp_path):
    """Write a flat folder of two classes with 20 images each."""
    for name, shade in (("cat", 180), ("dog", 40)):
        write(tmp_path / "pets" / name, shade=shade, count=20)
    return tmp_path / "pets"


def load(path, **settings):
    return load_data(DataConfig(source="image_folder", path=str(path), stream=True, **settings), path.parent)


def total(data):
    return len(data.train) + len(data.validation) + len(data.test)


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        (["cat/1", "dog/1"], (".", None, None)),
        (["train/cat/1", "test/cat/1"], ("train", None, "test")),
        (["train/cat/1", "val/cat/1"], ("train", None, "val")),
        (["train/cat/1"], ("train", None, None)),
        (["train/cat/1", "valid/cat/1", "test/cat/1"], ("train", "valid", "test")),
        (["Training/cat/1", "Testing/cat/1"], ("Training", None, "Testing")),
        (["train/cat/1", "test/cat/1", "extra/1"], ("train", None, "test", "extra")),
        (["train/1", "car/1"], (".", None, None)),
        (["train/steam/1", "car/1"], (".", None, None)),
        (["train/1", "test/1", "car/1"], (".", None, None)),
        (["test/1", "car/1"], (".", None, None)),
        (["train/cat/1", "test/cat/1", ".git/1", "__MACOSX/train/1"], ("train", None, "test")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_layout_of_distinguishes_splits_from_classes(tmp_path, files, layout):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{file}.png").touch()
    train, validation, test, *ignored = [tmp_path / name if name else None for name in layout]
    assert layout_of(tmp_path) == Layout(train, validation, test, ignored)


def test_image_folder_passes_over_hidden_files(pets):
    plain = load(pets)
    for copy in (pets / "cat" / ".ipynb_checkpoints" / "0.png", pets / ".ipynb_checkpoints" / "0.png"):
        write(copy)
    (pets / "cat" / "._000.png").write_bytes(b"\0\5\x16\7")
    (pets / "dog" / "notes.txt").touch()
    (pets / "labels.csv").touch()
    data = load(pets)
    assert data.class_names == ["cat", "dog"]
    assert data.digest == plain.digest
    assert data.found.files == total(data) == 40
    assert {reason: sorted(files) for reason, files in data.found.skipped.items()} == {
        "hidden": [".ipynb_checkpoints", "cat/._000.png", "cat/.ipynb_checkpoints"],
        "format .txt is not read": ["dog/notes.txt"],
        "not in the folder of a class": ["labels.csv"],
    }


def test_image_folder_uses_its_own_validation_split(tmp_path):
    for split, count in (("train", 8), ("valid", 3), ("test", 2)):
        for name in ("cat", "dog"):
            write(tmp_path / "pets" / split / name, count=count)
    write(tmp_path / "pets" / "extra" / "1.png")
    data = load(tmp_path / "pets")
    assert [len(data.train), len(data.validation), len(data.test)] == [16, 6, 4]
    assert data.found.notes == ["not read, as no split has this name: extra"]


@pytest.mark.parametrize("content", [None, "a.heic", ".DS_Store"])
def test_class_without_images_is_refused_by_name(pets, content):
    (pets / "bird").mkdir()
    if content:
        (pets / "bird" / content).touch()
    reason = {None: "no files", "a.heic": r"format \.heic is not read: 1", ".DS_Store": "hidden: 1"}[content]
    with pytest.raises(UserError, match=rf"class 'bird' \({reason}\); remove its folder.*cat, dog"):
        load(pets)


def test_class_without_test_images_is_remarked_once(tmp_path):
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog"])):
        for name in names:
            write(tmp_path / "pets" / split / name, count=10)
    remarks = DataSummary.of(load(tmp_path / "pets")).remarks()
    assert [remark for remark in remarks if "cat" in remark] == [
        "no test sample of the classes cat: the report has no results for them"
    ]


def test_class_name_is_the_same_in_both_unicode_forms(tmp_path):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        for name in ("Häher", "Eule 🦉"):
            write(tmp_path / "birds" / split / unicodedata.normalize(form, name), count=10)
    data = load(tmp_path / "birds")
    assert data.class_names == ["Eule 🦉", "Häher"]
    assert np.bincount(data.test.labels).tolist() == [10, 10]


def test_names_in_latin_1_bytes_become_text(pets):
    os.rename(pets / "cat" / "003.png", os.fsencode(pets) + b"/cat/k\xe4se.png")
    os.rename(pets / "dog", os.fsencode(pets) + b"/h\xfcnd")
    (pets / "cat" / os.fsdecode(b"\xfc.txt")).touch()
    data = load(pets)
    assert data.class_names == ["cat", r"h\xfcnd"]
    assert data.found.skipped == {"format .txt is not read": [r"cat/\xfc.txt"]}
    assert len(data.digest) == 64
    (pets / "cat" / os.fsdecode(b"k\xe4se.png")).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cat/k\\xe4se\.png") as caught:
        load(pets)
    str(caught.value).encode()


@pytest.mark.ray
def test_stream_reads_file_with_name_in_latin_1(ray_cluster, pets):
    os.rename(pets / "cat" / "003.png", os.fsencode(pets) + b"/cat/k\xe4se.png")
    data = load(pets)
    assert sum(len(batch.y) for batch in data.train.batches(16, Place())) == len(data.train)


@pytest.mark.parametrize("stray", ["L", "RGB"])
def test_channels_are_decided_by_all_images(tmp_path, stray):
    for name in ("a", "b"):
        write(tmp_path / "set" / name, mode="RGB" if stray == "L" else "L", count=10)
    write(tmp_path / "set" / "a" / "003.png", mode=stray)
    data = load(tmp_path / "set")
    assert data.shape == (3, 8, 8)
    counts = (19, "a/000.png", 1, "a/003.png") if stray == "L" else (1, "a/003.png", 19, "a/000.png")
    color, first_color, gray, first_gray = counts
    assert data.found.notes[0].startswith(
        f"{color} images are in color (first: {first_color}) and {gray} in gray (first: {first_gray}): all"
    )
    assert data.found.modes == {"RGB": color, "L": gray}
    assert load(tmp_path / "set", channels=1).shape == (1, 8, 8)


def test_images_of_several_sizes_need_an_image_size(pets):
    write(pets / "dog" / "007.png", size=(12, 12))
    with pytest.raises(UserError, match=r"2 sizes \(8x8: 39, 12x12: 1\); set data.image_size"):
        load(pets)
    data = load(pets, image_size=10)
    assert data.shape == (3, 10, 10)
    assert data.found.sizes == {"8x8": 39, "12x12": 1}


def test_images_that_are_not_square_need_an_image_size(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "set" / name, size=(8, 6), count=10)
    with pytest.raises(UserError, match="8x6, not square; set data.image_size"):
        load(tmp_path / "set")


def damage(file):
    file.write_bytes(file.read_bytes()[:-60])  # cut: the header is sound


def test_on_error_skip_leaves_out_images_before_the_split(pets):
    whole = load(pets, on_error="skip")
    assert whole.digest == load(pets).digest
    damage(pets / "cat" / "000.png")
    (pets / "dog" / "001.png").write_bytes(b"no image")
    data = load(pets, on_error="skip")
    assert total(data) == 38
    assert data.found.skipped == {"cannot be decoded": ["cat/000.png", "dog/001.png"]}
    assert data.digest == load(pets, on_error="skip").digest != whole.digest
    for split in (data.train, data.validation, data.test):
        index = split.index
        rows = [index.place(row) for row in split.rows]
        files, groups, offsets = zip(*rows, strict=True)
        task = {"row": split.rows, "files": files, "group": groups, "offset": offsets, "column": "image"}
        assert decode_batch(task, *split.shape[:2], None, []).shape == (len(split), 3, 8, 8)
    with pytest.raises(UserError, match=r"cannot decode the image in .*dog/001\.png"):
        load(pets)


def test_on_error_skip_refuses_to_leave_out_most_images(pets):
    for file in sorted(pets.rglob("*.png"))[:21]:
        damage(file)
    with pytest.raises(
        UserError, match=r"21 of 40 training images cannot be decoded, more than half.*000\.png"
    ):
        load(pets, on_error="skip")


def test_on_error_skip_refuses_class_without_a_sound_image(pets):
    write(pets / "bird", count=2)
    for file in (pets / "bird").iterdir():
        damage(file)
    with pytest.raises(UserError, match=r"class 'bird' \(cannot be decoded\)"):
        load(pets, on_error="skip")


def test_on_error_is_refused_for_other_sources(tmp_path):
    with pytest.raises(UserError, match="data.on_error is for parquet and image_folder, not digits"):
        load_data(DataConfig(source="digits", on_error="skip"), tmp_path)


def test_parquet_images_are_surveyed(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path / "images", count=30)
    write(tmp_path / "images" / "000.png", mode="L")
    images = [file.read_bytes() for file in sorted((tmp_path / "images").iterdir())]
    images[17] = images[17][:-60]
    table = pa.table({"image": images, "label": [i % 2 for i in range(30)]})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=8)
    config = DataConfig(source="parquet", path="d.parquet", stream=True, on_error="skip")
    data = load_data(config, tmp_path)
    assert data.shape == (3, 8, 8)
    assert total(data) == 29
    assert data.found.skipped == {"cannot be decoded": ["d.parquet, row group 2, row 1"]}
    assert data.found.modes == {"RGB": 28, "L": 1}
    assert "first: d.parquet, row group 0, row 0" in data.found.notes[0]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_survey_reads_an_even_part_of_many_images(pets, kind, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("advtrain.data.survey.MOST_SURVEYED", 10)
    if kind == "folder":
        data = load(pets)
    else:
        images = [file.read_bytes() for file in sorted(pets.rglob("*.png"))]
        table = pa.table({"image": images, "label": [i // 20 for i in range(40)]})
        pq.write_table(table, pets / "d.parquet", row_group_size=5)
        data = load_data(DataConfig(source="parquet", path="d.parquet", stream=True), pets)
    assert total(data) == 40
    assert data.found.sizes == {"8x8": 10}
    assert data.found.notes == ["the forms are those of 10 of 40 images, evenly spaced"]


def test_center_of_a_narrow_image_is_resized_alone(monkeypatch):
    """The whole image would have 73 x 4,388,571 pixels."""
    column = np.arange(60_000) // 30_000 * 200
    image = Image.fromarray(column[:, None].astype(np.uint8))
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: sizes.append(a[1]) or resize(*a, **k))
    pixels = np.asarray(_centre_crop(image, 64))
    assert sizes == [(64, 64)]
    assert pixels.shape == (64, 64)
    assert pixels[0].max() < 100 < pixels[-1].min()


@pytest.mark.parametrize("size", [(31, 40), (64, 64), (90, 33)])
def test_crop_of_a_narrow_image_is_the_usual_one(monkeypatch, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8))
    usual = np.asarray(_centre_crop(image, 32)).astype(int)
    monkeypatch.setattr("advtrain.data.stream.MOST_PIXELS", 0)
    assert np.abs(np.asarray(_centre_crop(image, 32)) - usual).max() <= 1
