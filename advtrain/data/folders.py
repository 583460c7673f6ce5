"""Folders of images: which subfolders are splits, and which are classes."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from advtrain.data.images import is_hidden, list_images, subfolders
from advtrain.data.stream import ImageIndex
from advtrain.errors import UserError
from advtrain.text import listed, readable

#: Names of the folder of each split, in lower case.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing")
VALIDATION_NAMES = ("val", "validation", "valid")
#: Number of names in a message.
_SHOWN = 10


@dataclass(frozen=True)
class Layout:
    """Folders of the splits; a flat folder has only `train`, whose subfolders are the classes."""

    train: Path
    validation: Path | None = None
    test: Path | None = None
    ignored: list[Path] = field(default_factory=list)  # folders beside the splits


def layout_of(path: Path) -> Layout:
    """Find the subfolders of `path` that are splits.

    The folder has splits if it has a folder train (or training), and no other folder or one that is named test,
    testing, val, validation or valid. Upper case counts as lower case. Otherwise each subfolder is a class, also one
    called train. Without a test folder, the validation folder is the test split.
    """
    folders = subfolders(path)

    def named(names: tuple[str, ...]) -> Path | None:
        return next((p for name in names for p in folders if p.name.lower() == name), None)

    train, validation, test = named(TRAIN_NAMES), named(VALIDATION_NAMES), named(TEST_NAMES)
    others = [p for p in folders if p not in (train, validation, test)]
    if train is None or (others and not ((validation or test) and subfolders(train))):
        return Layout(path)
    if test is None:
        validation, test = None, validation
    return Layout(train, validation, test, others)


def index_folder(
    path: Path, class_names: list[str] | None = None
) -> tuple[ImageIndex, dict[str, list[Path]]]:
    """Index `path`/CLASS/**/IMAGE; return the index, and the files that are not read by reason.

    Args:
        path: folder with a folder for each class.
        class_names: classes of the training folder; None: the classes are the sorted names of the folders. A name
            is the same however its accents are encoded (Unicode NFC or NFD).

    Raises:
        UserError: there is no image, a class of a training folder has none, or a class is unknown.
    """
    folders: dict[str, list[Path]] = defaultdict(list)
    for folder in subfolders(path):
        folders[class_name(folder.name)].append(folder)
    names = class_names or sorted(folders)
    if unknown := sorted(set(folders) - set(names)):
        raise UserError(f"'{path}' has classes that the training folder lacks: {listed(unknown, _SHOWN)}")
    files: list[str] = []
    labels: list[int] = []
    skipped: dict[str, list[Path]] = defaultdict(list)
    empty: dict[str, str] = {}
    for label, name in enumerate(names):
        before = len(files)
        passed: dict[str, int] = defaultdict(int)
        for folder in folders.get(name, []):
            images, others = list_images(folder)
            files += map(str, images)
            labels += [label] * len(images)
            for reason, paths in others.items():
                skipped[reason] += paths
                passed[reason] += len(paths)
        if len(files) == before:
            empty[name] = ", ".join(f"{reason}: {n:,}" for reason, n in passed.items()) or "no files"
    for file in sorted(path.iterdir()):
        if is_hidden(file.name):
            skipped["hidden"].append(file)
        elif not file.is_dir():
            skipped["not in the folder of a class"].append(file)
    if not files:
        raise UserError(f"no images in '{path}'; expected {path}/CLASS/IMAGE.jpg")
    if empty and class_names is None:
        raise UserError(no_images(path, empty, [name for name in names if name not in empty]))
    n = len(files)
    index = ImageIndex(files, np.arange(n), np.full(n, -1), np.zeros(n, np.int64), np.array(labels), names)
    return index, dict(skipped)


def no_images(path: Path, empty: dict[str, str], others: list[str]) -> str:
    """Return the message for training classes without an image; `empty` maps each to the reason."""
    what = "; ".join(f"'{name}' ({reason})" for name, reason in list(empty.items())[:_SHOWN])
    return (
        f"'{readable(str(path))}': no image that can be read for the class {what}; remove its folder, or add images "
        f"(the classes with images are {listed(others, _SHOWN)})"
    )


def class_name(folder: str) -> str:
    """Return the name of a class: the folder's name in Unicode NFC, as text that can be stored."""
    return readable(unicodedata.normalize("NFC", folder))


def below(base: Path, path: Path | str) -> str:
    """Return a path relative to the base, as text that can be stored."""
    return readable(os.path.relpath(path, base))
