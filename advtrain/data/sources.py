"""Data sources: each loads training and test samples, before splitting and checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advtrain.data.arrays import LABEL_NAMES, SAMPLE_NAMES, SPLITS, class_labels, find_array, read_arrays
from advtrain.data.batches import ArraySplit, Labels
from advtrain.data.folders import below, index_folder, layout_of, no_images
from advtrain.data.found import Found
from advtrain.data.parquet import image_column, index_parquet, open_parquet, split_files
from advtrain.data.request import Request, Source, existing_path
from advtrain.data.stream import ImageIndex, StreamSplit
from advtrain.data.survey import UNDECODABLE, ImageSettings, survey
from advtrain.data.table_files import read_table
from advtrain.data.tables import RawTable, of_array
from advtrain.data.text_files import built_in_texts, text
from advtrain.errors import UserError
from advtrain.recipe.data import TEXT_FILES


def digits(request: Request) -> Source:
    """Load the 1,797 gray 8x8 digits of scikit-learn, with 17 levels scaled to 8 bits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[:, None]
    return Source(ArraySplit(images, data.target.astype(np.int64)), None, 10)


def _unit_columns(x: NDArray[np.float64], y: NDArray[np.float64]) -> Source:
    """Scale each column to [0, 1], the attack's box, by its minimum and maximum in all samples."""
    low, high = x.min(0), x.max(0)
    scaled = ((x - low) / np.where(high > low, high - low, 1)).astype(np.float32)
    return Source(ArraySplit(scaled, y.astype(np.float32)), None, 0)


def diabetes(request: Request) -> Source:
    """Load scikit-learn's diabetes regression: 442 patients, 10 features, targets of 25 to 346."""
    from sklearn.datasets import load_diabetes

    return _unit_columns(*load_diabetes(return_X_y=True))


def friedman1(request: Request) -> Source:
    """Generate the Friedman 1 regression with 2,000 samples (Friedman 1991).

    y = 10 sin(pi x0 x1) + 20 (x2 - 1/2)^2 + 10 x3 + 5 x4 + N(0, 1), with 10 uniform features.
    """
    from sklearn.datasets import make_friedman1

    return _unit_columns(*make_friedman1(n_samples=2000, n_features=10, noise=1.0, random_state=0))


def linear(request: Request) -> Source:
    """Generate a linear regression, whose worst case has a closed form.

    y = w . x + N(0, 0.1^2), with 2,000 samples, 10 uniform features and w = (10, -9, ..., -1).
    """
    rng = np.random.default_rng(0)
    x = rng.random((2000, 10))
    w = np.arange(10, 0, -1) * np.where(np.arange(10) % 2, -1, 1)
    return _unit_columns(x, x @ w + 0.1 * rng.standard_normal(2000))


def _torchvision(name: str, num_classes: int) -> Callable[[Request], Source]:
    def load(request: Request) -> Source:
        import torchvision

        factory = getattr(torchvision.datasets, name)
        parts = []
        for train in (True, False):
            chosen = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
            try:
                data = factory(root=str(request.root), download=request.download, **chosen)
            except RuntimeError as error:
                raise UserError(
                    f"{name} is not in '{request.root}' ({error}); set the folder that contains it with "
                    "--data-root, or allow the download with --set data.download=true"
                ) from error
            except OSError as error:
                raise UserError(
                    f"{name} could not be read or downloaded into '{request.root}': {error}"
                ) from error
            labels = np.asarray(data.labels if name == "SVHN" else data.targets, dtype=np.int64)
            parts.append(ArraySplit(channels_first(np.asarray(data.data), f"{name} images"), labels))
        # MNIST calls its classes "0 - zero"; the digits themselves are better names.
        names = None if name in ("MNIST", "SVHN") else [str(label) for label in data.classes]
        return Source(parts[0], parts[1], num_classes, names)

    load.__doc__ = f"Load torchvision.datasets.{name} as 8-bit arrays."
    return load


def npz(request: Request) -> Source:
    """Load an .npz with x_train, y_train and optional x_val, x_test and so on, or with x and y.

    Images are (N, C, H, W), (N, H, W, C) or (N, H, W), and tables (N, F): uint8, or float in [0, 1]. y holds class
    labels (`class_labels`), or numbers if data.task is regression. `SAMPLE_NAMES` and `LABEL_NAMES` are other names of
    the arrays; data.image and data.label set them. With data.scale, tables may hold any numbers.
    """
    path = existing_path(request)
    arrays = read_arrays(path)
    samples = (request.image,) if request.image else SAMPLE_NAMES
    labels = (request.label,) if request.label else LABEL_NAMES
    splits = SPLITS if find_array(arrays, samples, SPLITS["train"]) else {"train": ("",)}
    names = request.class_names
    parts: dict[str, ArraySplit | RawTable] = {}
    for part, spellings in splits.items():
        x_key, y_key = (find_array(arrays, known, spellings) for known in (samples, labels))
        if x_key is None and part != "train":
            continue
        if x_key is None or y_key is None:
            missing = request.image or "samples (x)" if x_key is None else request.label or "labels (y)"
            raise UserError(
                f"'{path}' has no {missing}{'' if '' in spellings else f' for {part}'} "
                f"(found: {', '.join(sorted(arrays)) or 'nothing'}); expected x_train, y_train (and x_test, y_test), "
                "or x and y; data.image and data.label set other names"
            )
        x, y, what = arrays[x_key], arrays[y_key], f"'{path}': {y_key}"
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            count = [len(a) if a.ndim else "no" for a in (x, y)]
            raise UserError(f"'{path}': {x_key} has {count[0]} samples but {y_key} has {count[1]}")
        if request.regression:
            labels_here: Labels = _targets(y, what)
        else:
            labels_here, names = class_labels(y, what, names)
        where = f"'{path}': {x_key}"
        if request.scale and x.ndim == 2:
            parts[part] = of_array(x, labels_here, where, y_key)
        else:
            parts[part] = ArraySplit(channels_first(x, where), labels_here)
    classes = 0 if request.regression else len(names) if names else None
    return Source(parts["train"], parts.get("test"), classes, names, validation=parts.get("validation"))


def _targets(y: NDArray[Any], what: str) -> NDArray[np.float32]:
    if y.dtype.kind not in "iuf" or y.ndim != 1 and y.shape[1:] != (1,):
        raise UserError(f"{what} must hold numbers (N,), not {y.dtype} {y.shape}")
    return y.reshape(-1).astype(np.float32)


def parquet(request: Request) -> Source:
    """Load a parquet file of images, or a folder with the files of the splits.

    The files are train* and, if there are such, val* and test*. The files val* are the validation split if there are
    files test*, else the test split. `index_parquet` describes the columns.
    """
    path = existing_path(request)
    files, notes = _files(path, "parquet")
    if holds_table(request):
        return _table(files, notes, request)
    names = request.class_names
    indexes: dict[str, ImageIndex] = {}
    for part in files:
        index = index_parquet(files[part], image=request.image, label=request.label, class_names=names)
        indexes[part], names = index, index.class_names
    splits, found = survey(indexes, path if path.is_dir() else path.parent, request.images)
    held = {name: split if request.stream else split.to_memory() for name, split in splits.items()}
    classes = len(names) if names else None
    found = replace(found, notes=notes + found.notes)
    return Source(held["train"], held.get("test"), classes, names, found, held.get("validation"))


def csv(request: Request) -> Source:
    """Load a table from a CSV file, or from a folder with the files of the splits.

    Names of the files are as for parquet. data.label is the column to predict, and data.features the others to use.
    """
    return _table(*_files(existing_path(request), "csv"), request)


def _files(path: Path, suffix: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of each split, the training files first, and notes."""
    files = split_files(path, suffix) if path.is_dir() else {"train": [path]}
    if "test" in files or "validation" not in files:
        return files, []
    note = "there are no test files, so the validation files are the test split"
    return {"train": files["train"], "test": files["validation"]}, [note]


def holds_table(request: Request) -> bool:
    """Return whether parquet files hold a table: data.features is set, or they have no images."""
    if request.image is not None or (request.label is None and request.features is None):
        return False
    files, _ = _files(existing_path(request), "parquet")
    schema = open_parquet(files["train"][0]).schema_arrow
    return request.features is not None or image_column(schema, None) is None


def _table(files: dict[str, list[Path]], notes: list[str], request: Request) -> Source:
    """Load the splits of a table with the columns and the class names of the training files."""
    if request.stream or request.images != ImageSettings():
        raise UserError("data.stream, image_size, channels and on_error are for images; the data is a table")
    parts: dict[str, RawTable] = {}
    names = request.class_names
    for part, paths in files.items():
        parts[part], names = read_table(
            paths,
            request.label,
            request.features,
            regression=request.regression,
            class_names=names,
            like=parts.get("train"),
        )
    classes = 0 if request.regression else len(names) if names else None
    found = Found(files=sum(map(len, files.values())), notes=notes)
    return Source(parts["train"], parts.get("test"), classes, names, found, parts.get("validation"))


def image_folder(request: Request) -> Source:
    """Load `path`/train/CLASS/IMAGE, with val/ and test/ if they exist, or `path`/CLASS/IMAGE.

    `layout_of` decides which. Class names are the names of the folders.
    """
    path = existing_path(request)
    if not path.is_dir():
        raise UserError(f"'{path}' is a file; data.path of an image_folder is a folder")
    layout = layout_of(path)
    indexes: dict[str, ImageIndex] = {}
    skipped: dict[str, list[str]] = {}
    notes = []
    names = request.class_names
    for kind, folder in (
        ("training", layout.train),
        ("validation", layout.validation),
        ("test", layout.test),
    ):
        if folder is None:
            continue
        indexes[kind], passed = index_folder(folder, names)
        names = indexes[kind].class_names or []
        for reason, files in passed.items():
            skipped.setdefault(reason, []).extend(below(path, file) for file in files)
    if layout.ignored:
        notes.append(
            f"not read, as no split has this name: {', '.join(below(path, p) for p in layout.ignored)}"
        )
    splits, found = survey(indexes, path, request.images)
    if request.class_names is None:
        _check_classes(splits["training"], layout.train, names or [])
    held = {name: split if request.stream else split.to_memory() for name, split in splits.items()}
    found = replace(found, skipped=skipped | found.skipped, notes=notes + found.notes)
    return Source(held["training"], held.get("test"), len(names or []), names, found, held.get("validation"))


def _counts(labels: NDArray[np.int64], names: list[str]) -> list[int]:
    counts: list[int] = np.bincount(labels, minlength=len(names)).tolist()
    return counts


def _check_classes(split: StreamSplit, folder: Path, names: list[str]) -> None:
    """Raise UserError for a class of which no training image can be decoded."""
    counts = _counts(split.labels, names)
    if 0 in counts:
        empty = {name: UNDECODABLE for name, n in zip(names, counts, strict=True) if n == 0}
        raise UserError(no_images(folder, empty, [name for name in names if name not in empty]))


#: Sources of images in files, which Ray decodes and which are resized.
IMAGE_FILES = ("parquet", "image_folder")
#: Sources of images that are built in.
BUILT_IN_IMAGES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn")
#: Sources of tables in files, which are scaled.
TABLE_FILES = ("npz", "csv", "parquet")

SOURCES: dict[str, Callable[[Request], Source]] = {
    "digits": digits,
    "diabetes": diabetes,
    "friedman1": friedman1,
    "linear": linear,
    "mnist": _torchvision("MNIST", 10),
    "fashion_mnist": _torchvision("FashionMNIST", 10),
    "cifar10": _torchvision("CIFAR10", 10),
    "cifar100": _torchvision("CIFAR100", 100),
    "svhn": _torchvision("SVHN", 10),
    "npz": npz,
    "csv": csv,
    "parquet": parquet,
    "image_folder": image_folder,
    "text": text,
    **{name: built_in_texts(name) for name in TEXT_FILES},
}


def channels_first(x: NDArray[np.generic], what: str) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Convert images to (N, C, H, W), uint8 or float32; return tables (N, F) in their layout."""
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim not in (2, 4):
        raise UserError(f"{what} must be (N, C, H, W), (N, H, W, C), (N, H, W) or (N, F), not {x.shape}")
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x, dtype=np.uint8)
    if np.issubdtype(x.dtype, np.floating) or x.dtype.kind == "b":
        return np.ascontiguousarray(x, dtype=np.float32)
    raise UserError(f"{what} must be uint8, or float in [0, 1], not {x.dtype}{_remedy(x)}")


def _remedy(x: NDArray[np.generic]) -> str:
    fits = x.dtype.kind in "iu" and x.size > 0 and x.min() >= 0 and x.max() <= 255
    return "; its values fit 8 bits: store x.astype('uint8')" if fits else ""
