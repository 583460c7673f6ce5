"""Streamed images: an index in memory, and images that Ray Data reads and decodes from disk.

The index (paths or parquet row groups, and labels) is small. An epoch's order, a rank's part and a resume are therefore
the same pure functions of (seed, epoch, step, rank) as for data in memory. Ray tasks read and decode the images, one
task per batch, and prefetch several batches. A single batch, as of an evaluation, is read by the process itself.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from advtrain.cluster import start_ray
from advtrain.data.augment import augment
from advtrain.data.batches import ArraySplit, Batch, BatchPlan, Place, Rows, to_unit
from advtrain.data.images import MOST_PIXELS, decoding, read_image
from advtrain.errors import UserError
from advtrain.recipe.data import AugmentConfig

#: Minimum number of rows in a window of parquet row groups within which rows are shuffled.
SHUFFLE_WINDOW = 50_000

#: Batches that Ray prefetches for each rank.
READ_AHEAD = 4


@dataclass(frozen=True)
class ImageIndex:
    """Location of each encoded image: a file, or (group >= 0) a row of a parquet row group."""

    files: list[str]
    file: Rows  # (N,) index into files
    group: Rows  # (N,) row group, -1 for an image file
    offset: Rows  # (N,) row within its group
    labels: Rows  # (N,)
    class_names: list[str] | None = None
    column: str = "image"  # parquet: name of the image column

    def place(self, row: int) -> tuple[str, int, int]:
        """Return file, row group and offset of a row."""
        return self.files[self.file[row]], int(self.group[row]), int(self.offset[row])


@dataclass(frozen=True)
class StreamSplit:
    """Rows of an index, decoded to (C, size, size) on demand."""

    index: ImageIndex
    rows: Rows
    channels: int
    size: int

    @property
    def labels(self) -> Rows:
        """Labels in the split's order, (N,)."""
        return self.index.labels[self.rows]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a sample: (C, size, size)."""
        return self.channels, self.size, self.size

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Rows) -> StreamSplit:
        """Return a split with only the given rows."""
        return replace(self, rows=self.rows[rows])

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, augment: AugmentConfig, place: Place, start: int = 0
    ) -> Iterator[Batch]:
        """Yield this rank's part of an epoch's batches.

        Image files are shuffled globally. Parquet row groups are shuffled first, then the rows within windows of
        consecutive groups, so that a batch reads few groups.
        """
        plan = BatchPlan(self._shuffled(np.random.default_rng([seed, epoch])), batch_size)
        return self._run(plan, place, start, augment, [seed, epoch])

    def batches(self, batch_size: int, place: Place) -> Iterator[Batch]:
        """Yield this rank's part of one pass in order."""
        return self._run(BatchPlan(self.rows, batch_size), place, 0, AugmentConfig(), [])

    def to_memory(self) -> ArraySplit:
        """Decode all images once with Ray into 8-bit arrays."""
        return ArraySplit(np.concatenate(list(self.decoded())), self.labels)

    def decoded(self) -> Iterator[NDArray[np.uint8]]:
        """Yield all images in order, decoded with Ray, in parts (n, C, size, size)."""
        for images, _, _, _ in self._decoded(BatchPlan(self.rows, 1000), Place(), 0, None, []):
            yield images

    def _shuffled(self, rng: np.random.Generator) -> Rows:
        if self.index.group[0] < 0:
            return rng.permutation(self.rows)
        return self.rows[shuffled_groups(self.index.file[self.rows], self.index.group[self.rows], rng)]

    def _run(
        self, plan: BatchPlan, place: Place, start: int, config: AugmentConfig, seed: list[int]
    ) -> Iterator[Batch]:
        decoded = self._decoded(plan, place, start, config.resized_crop, seed)
        for step, (images, labels, offset, total) in enumerate(decoded, start):
            x, y = place.put(torch.from_numpy(images)), place.put(torch.from_numpy(labels))
            yield Batch(to_unit(augment(x, config, [*seed, step], offset, total)), y, offset, total)

    def _decoded(
        self, plan: BatchPlan, place: Place, start: int, resized_crop: float | None, seed: list[int]
    ) -> Iterator[tuple[NDArray[np.uint8], Rows, int, int]]:
        tasks, parts = [], []
        for step in range(start, plan.num_steps):
            rows, offset, total = plan.part(step, place.rank, place.world_size)
            parts.append((self.index.labels[rows], offset, total))
            tasks.append(
                {
                    "files": [os.fsencode(self.index.files[f]) for f in self.index.file[rows]],
                    "group": self.index.group[rows].tolist(),
                    "offset": self.index.offset[rows].tolist(),
                    "row": rows.tolist(),
                    "column": self.index.column,
                }
            )
        how = (self.channels, self.size, resized_crop, seed)
        found = read_ahead(tasks, lambda task: {"x": decode_batch(task, *how)})
        for batch, part in zip(found, parts, strict=True):
            yield np.array(batch["x"], dtype=np.uint8), *part


def shuffled_groups(file: Rows, group: Rows, rng: np.random.Generator) -> Rows:
    """Return an order (N,) of parquet rows in which consecutive rows are in few row groups.

    The row groups are shuffled first, then the rows within windows of `SHUFFLE_WINDOW` rows of consecutive groups.

    Args:
        file: (N,) number of the file of each row.
        group: (N,) row group of each row in its file.
        rng: source of the order.
    """
    unit = file * (group.max() + 1) + group
    by_unit = np.argsort(unit, kind="stable")
    groups = np.split(by_unit, np.flatnonzero(np.diff(unit[by_unit])) + 1)
    windows: list[list[Rows]] = [[]]
    for number in rng.permutation(len(groups)):
        if sum(map(len, windows[-1])) >= SHUFFLE_WINDOW:
            windows.append([])
        windows[-1].append(groups[number])
    return np.concatenate([rng.permutation(np.concatenate(window)) for window in windows])


def read_ahead(
    tasks: list[dict[str, Any]], read: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the batch of each task in order, read by Ray tasks a few batches ahead.

    A single task is run by the process itself, because a pipeline takes longer to start than a batch to read. An
    evaluation takes single batches.

    Raises:
        UserError: `read` raises one.
    """
    found = _on_ray(tasks, read) if len(tasks) > 1 else (_caught(task, read) for task in tasks)
    for batch in found:
        if batch["error"]:
            raise UserError(batch["error"])
        yield batch


def _on_ray(
    tasks: list[dict[str, Any]], read: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Read batches in Ray tasks, a few ahead."""
    start_ray(None)  # else Ray Data looks for a cluster itself, and waits minutes for one that is gone
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # num_cpus=0: batches must be decoded even if the training workers hold every CPU.
    batches = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        lambda task: _caught(task, read),
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=min(READ_AHEAD, len(tasks))),
    )
    found: Iterator[dict[str, Any]] = batches.iter_rows()
    return found


def _caught(task: dict[str, Any], read: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Read a batch; return an error of its content as a message, because Ray adds a traceback to errors."""
    try:
        return read(task) | {"error": ""}
    except UserError as error:
        return {"x": np.zeros((0, 1, 1, 1), np.uint8), "error": str(error)}


def decode_batch(
    task: dict[str, Any], channels: int, size: int, resized_crop: float | None, seed: list[int]
) -> NDArray[np.uint8]:
    """Read and decode one batch to (n, C, size, size) uint8.

    The file names are bytes: not all are UTF-8, which Ray needs for text.
    """
    out = np.empty((len(task["row"]), channels, size, size), np.uint8)
    for i, (file, group, offset, row) in enumerate(
        zip(task["files"], task["group"], task["offset"], task["row"], strict=True)
    ):
        place = os.fsdecode(file), int(group), int(offset)
        with decoding(place_name(*place)):
            _, image = read_image(encoded(*place, task["column"]), channels)
        if resized_crop is not None and seed:
            image = _random_resized_crop(image, size, resized_crop, np.random.default_rng([*seed, int(row)]))
        elif image.size != (size, size):
            image = _centre_crop(image, size)
        pixels = np.asarray(image)
        out[i] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return out


@lru_cache(maxsize=8)
def column_of_group(file: str, group: int, column: str) -> Any:
    """Read the encoded images or the texts of a row group; the last ones read are kept."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read_row_group(group, columns=[column])[column]


def encoded(file: str, group: int, offset: int, column: str = "image") -> str | IO[bytes]:
    """Return the path of an image file, or the bytes of an image in a parquet row."""
    if group < 0:
        return file
    value = column_of_group(file, group, column)[offset].as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if not content:
        raise ValueError(f"the row holds no bytes; the column {column} must hold the bytes of every image")
    return io.BytesIO(content)


def place_name(file: str, group: int, offset: int) -> str:
    """Return the place of an image for messages: its path, or the row of a parquet file."""
    return file if group < 0 else f"{file}, row group {group}, row {offset}"


def _random_resized_crop(
    image: Image.Image, size: int, min_area: float, rng: np.random.Generator
) -> Image.Image:
    """Crop a random box and resize it to size x size (Szegedy et al. 2015).

    The area share is in [min_area, 1] and the aspect ratio in [3/4, 4/3].
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            box = (left, top, left + w, top + h)
            return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return _centre_crop(image, size)


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to 8/7 of `size` (ImageNet: 256 for 224) and crop the center."""
    scale = size * 8 / 7 / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > MOST_PIXELS:  # a narrow image would fill the memory: resize the box of the crop alone
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))
