"""Changes of loaded data: classes that are kept, and the form of built-in images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advtrain.data.batches import ArraySplit, Split
from advtrain.data.request import Raw, Source
from advtrain.data.stream import StreamSplit
from advtrain.data.survey import ImageSettings
from advtrain.data.tables import RawTable
from advtrain.data.texts import RawText
from advtrain.errors import UserError, nearest

#: Weights of red, green and blue in a gray value (ITU-R 601, as Pillow).
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
#: Images that are converted at a time.
CHUNK = 2000


def keep_classes(source: Source, wanted: Sequence[int | str]) -> Source:
    """Keep the samples of some classes; their labels become 0, 1, ... in the order given.

    Args:
        source: data of a classification.
        wanted: names of classes, or numbers of labels.

    Raises:
        UserError: a class does not exist or has no training sample, or the data is a regression.
    """
    if source.num_classes == 0:
        raise UserError("data.classes is for classes; the data is a regression")
    names = source.class_names or [
        str(label) for label in range(source.num_classes or int(source.train.labels.max(initial=-1)) + 1)
    ]
    labels = [_label(each, names) for each in wanted]
    new = np.full(max(len(names), 1), -1)
    new[labels] = np.arange(len(labels))
    train = _of_classes(source.train, new)
    counts = np.bincount(train.labels.astype(np.int64), minlength=len(labels))
    if empty := [names[labels[number]] for number in np.flatnonzero(counts == 0)]:
        raise UserError(f"data.classes: no training sample of class {', '.join(empty)}")
    return replace(
        source,
        train=train,
        validation=None if source.validation is None else _of_classes(source.validation, new),
        test=None if source.test is None else _of_classes(source.test, new),
        num_classes=len(labels),
        class_names=[names[label] for label in labels],
    )


def _label(wanted: int | str, names: list[str]) -> int:
    """Return the label of a class by its name, or by its number."""
    name = str(wanted)
    if isinstance(wanted, int) and name in names and names.index(name) != wanted:
        is_number = 0 <= wanted < len(names)
        other = (
            f"number {wanted} is the class '{names[wanted]}'"
            if is_number
            else f"no class has number {wanted}"
        )
        raise UserError(
            f"data.classes: {wanted} may be a name or a number: the class '{name}' has number {names.index(name)}, and "
            f"{other}; write the name of the class in quotes, for example ['{name}']"
        )
    if isinstance(wanted, int) and 0 <= wanted < len(names):
        return wanted
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    raise UserError(f"data.classes: there is no class '{wanted}'{nearest(str(wanted), names)}")


def _of_classes(split: Split | Raw, new: NDArray[np.int64]) -> Split | Raw:
    """Return the samples whose new label is not negative; `new` maps old labels to new ones."""
    old = split.labels.astype(np.int64)
    known = np.flatnonzero((old >= 0) & (old < len(new)))
    part = split.take(known[new[old[known]] >= 0])
    labels = new[part.labels.astype(np.int64)]
    if isinstance(part, StreamSplit):
        every = np.full(len(part.index.labels), -1)
        every[part.rows] = labels
        return replace(part, index=replace(part.index, labels=every))
    if isinstance(part, RawTable | RawText):
        return replace(part, labels=labels)
    assert isinstance(part, ArraySplit)
    return ArraySplit(part.images, labels)


def fit_images(split: Split | Raw, settings: ImageSettings, crop: int | None) -> ArraySplit:
    """Crop, resize and convert 8-bit images.

    Args:
        split: images (N, C, H, W).
        settings: size and channels; None keeps them. A pixel of a resized image is the average over its area.
        crop: side of the crop around the center that is taken first; None: the whole image.

    Raises:
        UserError: the crop is larger than the images.
    """
    assert isinstance(split, ArraySplit)
    images: NDArray[Any] = split.images
    if crop is not None:
        if crop > min(images.shape[2:]):
            raise UserError(f"data.center_crop = {crop} is larger than the images, {images.shape[2:]}")
        top, left = ((side - crop) // 2 for side in images.shape[2:])
        images = images[:, :, top : top + crop, left : left + crop]
    channels, (height, width) = settings.channels or images.shape[1], images.shape[2:]
    size = (settings.size or height, settings.size or width)
    if (channels, *size) == images.shape[1:]:
        return ArraySplit(np.ascontiguousarray(images), split.labels)
    rows, columns = _area_weights(height, size[0]), _area_weights(width, size[1]).T
    found = np.empty((len(images), channels, *size), np.uint8)
    for first in range(0, len(images), CHUNK):
        part = images[first : first + CHUNK].astype(np.float32)
        if channels < part.shape[1]:
            part = np.einsum("c,nchw->nhw", LUMA, part)[:, None]
        found[first : first + CHUNK] = np.rint(rows @ part @ columns)  # one channel is copied to three
    return ArraySplit(found, split.labels)


def _area_weights(old: int, new: int) -> NDArray[np.float32]:
    """Return the share (new, old) of each of `old` pixels in each of `new` pixels of the same length."""
    edges = np.arange(new + 1) * old / new
    pixels = np.arange(old)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (covered.clip(0) * new / old).astype(np.float32)
