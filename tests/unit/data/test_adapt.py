"""Classes that are kept, fewer training samples, and the form of built-in images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advtrain.data import ArraySplit, DataConfig, load_data
from advtrain.data.adapt import _label, fit_images
from advtrain.data.summary import DataSummary
from advtrain.data.survey import ImageSettings
from advtrain.data.unseen import Accepts, load_unseen
from advtrain.errors import UserError
from tests.kit import digits_recipe


def digits(**settings):
    return load_data(DataConfig(source="digits", **settings), Path())


def images_of(split, label):
    return sorted(image.tobytes() for image in split.images[split.labels == label])


def test_kept_classes_are_renumbered_in_the_given_order():
    whole, part = digits(), digits(classes=[7, "3", 5])
    assert (part.num_classes, part.class_names) == (3, ["7", "3", "5"])
    for new, old in enumerate((7, 3, 5)):
        ours, theirs = (
            sorted(sum((images_of(split, label) for split in (d.train, d.validation, d.test)), []))
            for d, label in ((part, new), (whole, old))
        )
        assert ours == theirs
    assert list(DataSummary.of(part).classes) == ["7", "3", "5"]
    assert part.digest != whole.digest


def test_classes_of_files_are_kept_by_name(tmp_path):
    for number, name in enumerate(("cat", "cow", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.full((4, 4, 3), 60 * number + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    config = DataConfig(source="image_folder", path="pets", classes=["dog", "cat"], stream=True)
    data = load_data(config, tmp_path)
    assert data.class_names == ["dog", "cat"]
    assert len(data.train) + len(data.validation) + len(data.test) == 24
    for split in (data.train, data.validation, data.test):
        folders = [Path(split.index.place(row)[0]).parent.name for row in split.rows]
        assert [["dog", "cat"][label] for label in split.labels] == folders


@pytest.mark.parametrize(
    ("number", "other"), [(1, "number 1 is the class '2'"), (3, "no class has number 3")]
)
def test_number_that_is_the_name_of_another_class_is_refused(number, other):
    names = ["1", "2", "3"]
    with pytest.raises(UserError, match=f"'{number}' has number {number - 1}, and {other}.*quotes"):
        _label(number, names)
    assert [_label(each, names) for each in (0, "1", "2", "3")] == [0, 0, 1, 2]


def test_classes_of_a_table_are_kept(tmp_path):
    lines = [f"{i},{i % 3},{'abc'[i % 3]}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["u,v,kind", *lines]))
    config = DataConfig(source="csv", path="t.csv", label="kind", classes=["c", "a"])
    data = load_data(config, tmp_path)
    v = [column.name for column in data.table.columns].index("v")
    assert data.class_names == ["c", "a"]
    assert (data.train.labels == np.where(data.train.images[:, v] > 0.5, 0, 1)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "digits", "classes": [1, 12]}, "data.classes: there is no class '12'"),
        ({"source": "digits", "classes": ["1", "x"]}, "data.classes: there is no class 'x'"),
        ({"source": "diabetes", "classes": [0, 1]}, "the data is a regression"),
        (
            {"source": "digits", "train_samples": 9},
            "data.train_samples = 9 is below the number of classes, 10",
        ),
        ({"source": "digits", "train_samples": 2000}, "data.train_samples = 2000, but there are 1294"),
        ({"source": "digits", "center_crop": 9}, "data.center_crop = 9 is larger than the images"),
        ({"source": "diabetes", "image_size": 8}, "data.image_size does not apply to diabetes"),
        ({"source": "diabetes", "channels": 1}, "data.channels does not apply to diabetes"),
        ({"source": "image_folder", "path": ".", "center_crop": 8}, "data.center_crop does not apply"),
    ],
)
def test_setting_that_does_not_fit_the_data_is_rejected(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_data(DataConfig(**settings), tmp_path)


def test_class_named_twice_is_rejected():
    with pytest.raises(UserError, match="names a class twice"):
        digits_recipe("data.classes=[1, '1']")


def test_train_samples_are_stratified_nested_and_leave_the_other_splits():
    whole, hundred, twenty = digits(), digits(train_samples=100), digits(train_samples=20)
    assert np.bincount(hundred.train.labels).tolist() == pytest.approx([10] * 10, abs=1)
    assert np.bincount(twenty.train.labels).tolist() == [2] * 10
    names = [{image.tobytes() for image in d.train.images} for d in (twenty, hundred, whole)]
    assert names[0] < names[1] < names[2]
    for split in ("validation", "test"):
        assert np.array_equal(getattr(whole, split).images, getattr(twenty, split).images)
    other = digits(train_samples=20, split_seed=1)
    assert {image.tobytes() for image in other.train.images} != names[0]


def test_train_samples_are_drawn_before_a_table_is_scaled(tmp_path):
    (tmp_path / "t.csv").write_text("\n".join(["u,y", *(f"{i},{i % 2}" for i in range(100))]))
    settings = {"source": "csv", "path": "t.csv", "label": "y"}
    data = load_data(DataConfig(**settings, train_samples=10), tmp_path)
    assert len(data.train) == 10
    assert (data.train.images.min(), data.train.images.max()) == (0, 1)


def test_smaller_images_are_averages_over_areas():
    """A pixel of 28 -> 8 covers 3.5 x 3.5 pixels, and a half of a pixel counts as two quarters of a finer image."""
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 28, 28), dtype=np.uint8)
    split = ArraySplit(images, np.arange(5))
    found = fit_images(split, ImageSettings(size=8), crop=None)
    finer = images.repeat(2, 2).repeat(2, 3)
    assert np.array_equal(found.images, np.rint(finer.reshape(5, 1, 8, 7, 8, 7).mean((3, 5))))
    cropped = fit_images(split, ImageSettings(size=5), crop=20)
    assert np.array_equal(
        cropped.images, np.rint(images[:, :, 4:24, 4:24].reshape(5, 1, 5, 4, 5, 4).mean((3, 5)))
    )


def test_channels_are_copied_or_averaged_as_pillow_does():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 6), dtype=np.uint8)
    split = ArraySplit(images, np.arange(5))
    gray = fit_images(split, ImageSettings(channels=1), crop=None)
    expected = [np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L")) for image in images]
    assert np.abs(gray.images[:, 0].astype(int) - np.stack(expected)).max() <= 1
    color = fit_images(gray, ImageSettings(channels=3), crop=None)
    assert np.array_equal(color.images, gray.images.repeat(3, 1))


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"channels": 3}, (3, 8, 8)),
        ({"image_size": 4}, (1, 4, 4)),
        ({"center_crop": 6}, (1, 6, 6)),
        ({"image_size": 16, "channels": 3}, (3, 16, 16)),
        ({"image_size": 8, "channels": 1, "center_crop": 8}, (1, 8, 8)),
    ],
)
def test_built_in_images_take_size_and_channels(settings, shape):
    data = digits(**settings)
    assert data.shape == shape
    assert data.test.images.dtype == np.uint8
    assert (data.digest == digits().digest) is (shape == (1, 8, 8))


def test_kept_classes_are_compared_with_those_of_a_model():
    config = DataConfig(source="digits", classes=[5, 6])
    accepts = Accepts((1, 8, 8), 2, ["5", "6"])
    assert load_unseen(config, Path(), accepts).num_classes == 2
    with pytest.raises(UserError, match=r"keeps \['5', '6'\], but the classes of the model are \['6', '5'\]"):
        load_unseen(config, Path(), Accepts((1, 8, 8), 2, ["6", "5"]))


def test_digest_of_recipe_depends_on_data_settings_that_are_set():
    base = digits_recipe().digest()
    for setting in ("classes=[1, 2]", "train_samples=50", "center_crop=6"):
        assert digits_recipe(f"data.{setting}").digest() != base
        assert digits_recipe(f"data.{setting.split('=')[0]}=null").digest() == base
