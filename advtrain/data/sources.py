"""Data sources: each loads training and test samples, before splitting and checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advtrain.data.arrays import class_labels, read_arrays
from advtrain.data.batches import ArraySplit, Split
from advtrain.data.found import Found
from advtrain.data.stream import ImageIndex, StreamSplit, image_shape, index_folder, index_parquet
from advtrain.errors import UserError


@dataclass(frozen=True)
class Request:
    """Settings of a data source."""

    root: Path
    path: Path | None
    download: bool
    stream: bool
    image_size: int | None
    regression: bool = False


@dataclass(frozen=True)
class Source:
    """Samples loaded by a source. `test` is None if the source has no test split."""

    train: Split
    test: Split | None
    num_classes: int | None  # None: inferred from the labels; 0: regression
    class_names: list[str] | None = None
    found: Found = Found()


def digits(request: Request) -> Source:
    """Load the 1,797 gray 8x8 digits of scikit-learn, with 17 levels scaled to 8 bits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[:, None]
    return Source(ArraySplit(images, data.target.astype(np.int64)), None, 10)


def _table(x: NDArray[np.float64], y: NDArray[np.float64]) -> Source:
    """Scale each column to [0, 1], the attack's box, by its minimum and maximum in all samples."""
    low, high = x.min(0), x.max(0)
    scaled = ((x - low) / np.where(high > low, high - low, 1)).astype(np.float32)
    return Source(ArraySplit(scaled, y.astype(np.float32)), None, 0)


def diabetes(request: Request) -> Source:
    """Load scikit-learn's diabetes regression: 442 patients, 10 features, targets of 25 to 346."""
    from sklearn.datasets import load_diabetes

    return _table(*load_diabetes(return_X_y=True))


def friedman1(request: Request) -> Source:
    """Generate the Friedman 1 regression with 2,000 samples (Friedman 1991).

    y = 10 sin(pi x0 x1) + 20 (x2 - 1/2)^2 + 10 x3 + 5 x4 + N(0, 1), with 10 uniform features.
    """
    from sklearn.datasets import make_friedman1

    return _table(*make_friedman1(n_samples=2000, n_features=10, noise=1.0, random_state=0))


def linear(request: Request) -> Source:
    """Generate a linear regression, whose worst case has a closed form.

    y = w . x + N(0, 0.1^2), with 2,000 samples, 10 uniform features and w = (10, -9, ..., -1).
    """
    rng = np.random.default_rng(0)
    x = rng.random((2000, 10))
    w = np.arange(10, 0, -1) * np.where(np.arange(10) % 2, -1, 1)
    return _table(x, x @ w + 0.1 * rng.standard_normal(2000))


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
    """Load an .npz with x_train, y_train and optional x_test, y_test, or with x and y.

    Images are (N, C, H, W), (N, H, W, C) or (N, H, W), and tables (N, F): uint8, or float in [0, 1]. y holds integer
    labels, or numbers if data.task is regression.
    """
    path = _existing(request)
    arrays = read_arrays(path)
    suffix = "_train" if "x_train" in arrays else ""
    if missing := {f"x{suffix}", f"y{suffix}"} - set(arrays):
        raise UserError(
            f"'{path}' has no {', '.join(sorted(missing))} (found: {', '.join(sorted(arrays)) or 'nothing'}); "
            "expected x_train, y_train (and x_test, y_test), or x and y"
        )

    def split(part: str) -> ArraySplit:
        x, y = arrays[f"x{part}"], arrays[f"y{part}"]
        if len(x) != len(y.reshape(-1)):
            raise UserError(f"'{path}': x{part} has {len(x)} samples but y{part} has {len(y.reshape(-1))}")
        images = channels_first(x, f"'{path}': x{part}")
        if request.regression:
            if y.dtype.kind not in "iuf":
                raise UserError(f"'{path}': y{part} must hold numbers, not {y.dtype}")
            return ArraySplit(images, y.reshape(-1).astype(np.float32))
        if not np.issubdtype(y.dtype, np.integer):
            raise UserError(
                f"'{path}': y{part} must hold integer labels, not {y.dtype} "
                "(for regression targets set data.task: regression)"
            )
        return ArraySplit(images, class_labels(y, f"'{path}': y{part}"))

    held_out = split("_test") if "x_test" in arrays and suffix else None
    return Source(split(suffix), held_out, 0 if request.regression else None)


def parquet(request: Request) -> Source:
    """Load a folder with train*.parquet and optional test*.parquet, or one file.

    The columns are image{bytes, path} and label.
    """
    path = _existing(request)
    if path.is_file():
        return Source(_images(index_parquet([path]), request), None, None)
    train, test = (sorted(path.glob(f"{kind}*.parquet")) for kind in ("train", "test"))
    if not train:
        raise UserError(f"no train*.parquet in '{path}'")
    held_out = _images(index_parquet(test), request) if test else None
    return Source(_images(index_parquet(train), request), held_out, None)


def image_folder(request: Request) -> Source:
    """Load `path`/train/CLASS/IMAGE and optional `path`/val/ or test/, or `path`/CLASS/IMAGE."""
    path = _existing(request)
    if not (path / "train").is_dir():
        index = index_folder(path)
        return Source(_images(index, request), None, len(index.class_names or []), index.class_names)
    index = index_folder(path / "train")
    held_out = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    test = _images(index_folder(held_out, index.class_names), request) if held_out else None
    return Source(_images(index, request), test, len(index.class_names or []), index.class_names)


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
    "parquet": parquet,
    "image_folder": image_folder,
}


def _existing(request: Request) -> Path:
    if request.path is None:
        raise UserError("data.path is not set; set it to a path, absolute or relative to the data root")
    path = request.root / request.path.expanduser()
    if not path.exists():
        raise UserError(f"'{path}' does not exist; set data.path, or the data root with --data-root")
    return path


def _images(index: ImageIndex, request: Request) -> Split:
    if len(index.labels) == 0:
        raise UserError(f"{', '.join(repr(file) for file in index.files)}: no rows found")
    channels, height, width = image_shape(index)
    size = request.image_size
    if size is None:
        if height != width:
            raise UserError(
                f"the first image is {width}x{height}, not square; set data.image_size, the side after resizing"
            )
        size = height
    split = StreamSplit(index, np.arange(len(index.labels)), channels, size)
    if request.stream:
        return split
    return split.to_memory()


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
    if np.issubdtype(x.dtype, np.floating):
        return np.ascontiguousarray(x, dtype=np.float32)
    raise UserError(f"{what} must be uint8, or float in [0, 1], not {x.dtype}")
