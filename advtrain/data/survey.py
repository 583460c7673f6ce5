"""Survey of the images of a data set: their forms, and images that cannot be decoded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from advtrain.data.batches import Rows
from advtrain.data.folders import below
from advtrain.data.found import Found
from advtrain.data.images import Header, UndecodableError, decoding, read_header, read_image
from advtrain.data.stream import ImageIndex, StreamSplit, column_of_group, encoded, place_name
from advtrain.errors import UserError

#: Number of images of a split from which on the headers of an evenly spaced part are read.
MOST_SURVEYED = 100_000
#: Largest share of the images of a split that may be left out.
MOST_SKIPPED = 0.5
#: Reason of images that are left out.
UNDECODABLE = "cannot be decoded"
#: Images that a thread opens at a time.
_CHUNK = 64


@dataclass(frozen=True)
class ImageSettings:
    """Settings of the recipe for images."""

    channels: int | None = None  # None: 3 if any image has color, else 1
    size: int | None = None  # None: the side of all images
    skip: bool = False  # leave out images that cannot be decoded


@dataclass(frozen=True)
class _Seen:
    """Header of each image that was opened, by row, and the errors of those that were not."""

    headers: dict[int, Header]
    errors: dict[int, UndecodableError]


def survey(
    indexes: Mapping[str, ImageIndex], base: Path, settings: ImageSettings
) -> tuple[dict[str, StreamSplit], Found]:
    """Read the headers of all images, and decide the shape of a sample.

    Of a split of more than 100,000 images, only the headers of an evenly spaced part are read. With `settings.skip`,
    all images are decoded once, which takes as long as the reading of an epoch. The splits then leave out the images
    that cannot be decoded, so they are the same whenever the data are loaded.

    Args:
        indexes: images of each split by its name.
        base: folder that paths in the result are relative to.
        settings: settings of the recipe.

    Raises:
        UserError: an image cannot be read, the sizes differ without `settings.size`, or more than half of the images
            of a split cannot be decoded.
    """
    seen: dict[str, _Seen] = {}
    skipped: list[str] = []
    forms: list[tuple[str, Header]] = []
    for name, index in indexes.items():
        if len(index.labels) == 0:
            raise UserError(f"{', '.join(repr(file) for file in index.files)}: no rows found")
        seen[name] = one = _look(index, settings.skip)
        if len(one.errors) > MOST_SKIPPED * len(index.labels):
            raise UserError(
                f"{len(one.errors):,} of {len(index.labels):,} {name} images cannot be decoded, more than half; "
                f"the first: {next(iter(one.errors.values()))}"
            )
        skipped += [below(base, place_name(*index.place(row))) for row in one.errors]
        forms += [(place_name(*index.place(row)), header) for row, header in one.headers.items()]
    channels, notes = _channels(forms, base, settings.channels)
    size = settings.size or _common_size(forms, base)
    total = sum(len(index.labels) for index in indexes.values())
    if len(forms) + len(skipped) < total:
        notes.append(f"the forms are those of {len(forms):,} of {total:,} images, evenly spaced")
    splits = {
        name: StreamSplit(index, _kept(index, seen[name]), channels, size) for name, index in indexes.items()
    }
    found = Found(
        files=len({file for index in indexes.values() for file in index.files}),
        skipped={UNDECODABLE: skipped} if skipped else {},
        sizes=dict(_sizes(forms).most_common()),
        modes=dict(Counter(header.mode for _, header in forms).most_common()),
        notes=notes,
    )
    return splits, found


def _look(index: ImageIndex, decode: bool) -> _Seen:
    """Read the headers, or decode all images; an error is kept if all are decoded, else raised."""
    seen = _Seen({}, {})
    rows = np.arange(len(index.labels)) if decode else _sample(index)
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        for run in _runs(index, rows):
            if index.group[run[0]] >= 0:  # read the row group once, before the threads need it
                file, group, _ = index.place(int(run[0]))
                with decoding(file):
                    column_of_group(file, group, index.column)
            chunks = [run[i : i + _CHUNK].tolist() for i in range(0, len(run), _CHUNK)]
            for chunk, results in zip(chunks, pool.map(partial(_open, index, decode), chunks), strict=True):
                for row, result in zip(chunk, results, strict=True):
                    if isinstance(result, Header):
                        seen.headers[row] = result
                    elif decode and isinstance(result, UndecodableError):
                        seen.errors[row] = result
                    else:
                        pool.shutdown(cancel_futures=True)
                        raise result
    column_of_group.cache_clear()
    return seen


def _open(index: ImageIndex, decode: bool, rows: list[int]) -> list[Header | UserError]:
    results: list[Header | UserError] = []
    for row in rows:
        place = index.place(row)
        try:
            with decoding(place_name(*place)):
                source = encoded(*place, index.column)
                results.append(read_image(source, 1)[0] if decode else read_header(source))
        except UserError as error:
            results.append(error)
    return results


def _sample(index: ImageIndex) -> Rows:
    """Return at most about MOST_SURVEYED rows, evenly spaced; of parquet files, whole row groups."""
    n = len(index.labels)
    if n <= MOST_SURVEYED:
        return np.arange(n)
    if index.group[0] < 0:
        return np.linspace(0, n - 1, MOST_SURVEYED).astype(np.int64)
    return np.concatenate(list(_runs(index, np.arange(n)))[:: -(-n // MOST_SURVEYED)])


def _runs(index: ImageIndex, rows: Rows) -> Iterator[Rows]:
    """Yield the rows of each parquet row group; all rows if they are image files."""
    if index.group[0] < 0:
        yield rows
        return
    file, group = index.file[rows], index.group[rows]
    yield from np.split(rows, np.flatnonzero(np.diff(file).astype(bool) | np.diff(group).astype(bool)) + 1)


def _kept(index: ImageIndex, seen: _Seen) -> Rows:
    return np.setdiff1d(np.arange(len(index.labels)), np.array(list(seen.errors), np.int64))


def _sizes(forms: list[tuple[str, Header]]) -> Counter[str]:
    return Counter(f"{header.width}x{header.height}" for _, header in forms)


def _common_size(forms: list[tuple[str, Header]], base: Path) -> int:
    """Return the side of the images, or raise UserError if they are not all the same square."""
    sizes = _sizes(forms)
    width, height = forms[0][1].width, forms[0][1].height
    if len(sizes) == 1 and width == height:
        return width
    some = ", ".join(f"{size}: {n:,}" for size, n in sizes.most_common(3))
    what = (
        f"the images have {len(sizes):,} sizes ({some}{', ...' if len(sizes) > 3 else ''})"
        if len(sizes) > 1
        else f"the images are {width}x{height}, not square"
    )
    raise UserError(f"'{base}': {what}; set data.image_size, the side after resizing")


def _channels(forms: list[tuple[str, Header]], base: Path, wanted: int | None) -> tuple[int, list[str]]:
    """Return the number of channels, and notes on what is converted."""
    color = [place for place, header in forms if not header.gray]
    gray = [place for place, header in forms if header.gray]
    channels = wanted or (3 if color else 1)
    notes = []
    if wanted is None and color and gray:
        notes.append(
            f"{len(color):,} images are in color (first: {below(base, color[0])}) and {len(gray):,} in gray (first: "
            f"{below(base, gray[0])}): all are read with 3 channels, as data.channels is not set"
        )
    elif wanted == 1 and color:
        notes.append(f"{len(color):,} color images are converted to gray, as data.channels is 1")
    elif wanted == 3 and gray:
        notes.append(f"{len(gray):,} gray images are read with 3 equal channels, as data.channels is 3")
    for what, count in {
        "have transparency, which is composited on white": sum(header.alpha for _, header in forms),
        "have 16-bit gray, of which the upper 8 bits are kept": sum(h.mode.startswith("I") for _, h in forms),
        "have floating-point pixels, which are read as [0, 1]": sum(h.mode == "F" for _, h in forms),
        "are in CMYK, which is converted to RGB": sum(h.mode == "CMYK" for _, h in forms),
    }.items():
        if count:
            notes.append(f"{count:,} images {what}")
    return channels, notes
