"""Streamed images: an index in memory, and images that Ray Data reads and decodes from disk.

The index (paths or parquet row groups, and labels) is small. An epoch's order, a rank's part and a resume are therefore
the same pure functions of (seed, epoch, step, rank) as for data in memory. Ray tasks read and decode the images, one
task per batch, and prefetch several batches.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from advtrain.data.arrays import class_labels
from advtrain.data.augment import AugmentConfig, augment
from advtrain.data.batches import ArraySplit, Batch, BatchPlan, Place, Rows, to_unit
from advtrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

#: Minimum number of rows in a window of parquet row groups within which rows are shuffled.
SHUFFLE_WINDOW = 50_000

#: Batches that Ray prefetches for each rank.
READ_AHEAD = 4

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
#: Most rows of a parquet file: their numbers are held in memory.
MOST_ROWS = 10**9


@dataclass(frozen=True)
class ImageIndex:
    """Location of each encoded image: a file, or (group >= 0) a row of a parquet row group."""

    files: list[str]
    file: Rows  # (N,) index into files
    group: Rows  # (N,) row group, -1 for an image file
    offset: Rows  # (N,) row within its group
    labels: Rows  # (N,)
    class_names: list[str] | None = None


def index_folder(path: Path, class_names: list[str] | None = None) -> ImageIndex:
    """Index `path`/CLASS/**/IMAGE; classes are `class_names`, or else the sorted folder names."""
    if not path.is_dir():
        raise UserError(f"image folder '{path}' does not exist; set data.path or data.root")
    found = sorted(p.name for p in path.iterdir() if p.is_dir())
    names = class_names or found
    if unknown := set(found) - set(names):
        raise UserError(f"'{path}' has classes that the training folder lacks: {', '.join(sorted(unknown))}")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        images = sorted(p for p in (path / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files += [str(p) for p in images]
        labels += [label] * len(images)
    if not files:
        raise UserError(f"no images in '{path}'; expected {path}/CLASS/IMAGE.jpg")
    n = len(files)
    return ImageIndex(files, np.arange(n), np.full(n, -1), np.zeros(n, np.int64), np.array(labels), names)


def index_parquet(paths: list[Path], *, labelled: bool = True) -> ImageIndex:
    """Index parquet files with the columns image{bytes, path} (or image: binary) and label.

    Without `labelled` the label column is optional; missing labels are -1.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file: list[Rows] = []
    group: list[Rows] = []
    offset: list[Rows] = []
    labels: list[Rows] = []
    for number, path in enumerate(paths):
        try:
            table = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"'{path}' is not a readable parquet file: {error}") from error
        if table.metadata.num_rows > MOST_ROWS:
            raise UserError(
                f"'{path}' claims {table.metadata.num_rows:,} rows; at most {MOST_ROWS:,} are read"
            )
        names = set(table.schema_arrow.names)
        if missing := {"image", *(["label"] if labelled else [])} - names:
            raise UserError(f"'{path}' lacks the column(s) {', '.join(sorted(missing))}")
        if "label" in names and (labelled or pa.types.is_integer(table.schema_arrow.field("label").type)):
            labels.append(_integers(_read_column(table, "label", path), path))
        else:
            labels.append(np.full(table.metadata.num_rows, -1))
        for g in range(table.metadata.num_row_groups):
            n = table.metadata.row_group(g).num_rows
            file.append(np.full(n, number))
            group.append(np.full(n, g))
            offset.append(np.arange(n))
    return ImageIndex(
        files=[str(p) for p in paths],
        file=np.concatenate(file),
        group=np.concatenate(group),
        offset=np.concatenate(offset),
        labels=np.concatenate(labels),
    )


def _read_column(table: Any, name: str, path: Path) -> Any:
    import pyarrow as pa

    try:
        return table.read(columns=[name])[name]
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise UserError(f"'{path}' is not a readable parquet file: {error}") from error


def _integers(column: pa.ChunkedArray, path: Path) -> Rows:
    import pyarrow as pa

    if not pa.types.is_integer(column.type):
        raise UserError(f"'{path}': the column label must hold integers, not {column.type}")
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise UserError(f"'{path}': the label of row {row} is null; every sample needs one")
    return class_labels(column.to_numpy(), f"'{path}'")


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
        parts = [x for x, _, _, _ in self._decoded(BatchPlan(self.rows, 1000), Place(), 0, None, [])]
        return ArraySplit(np.concatenate(parts), self.labels)

    def _shuffled(self, rng: np.random.Generator) -> Rows:
        if self.index.group[0] < 0:
            return rng.permutation(self.rows)
        unit = self.index.file[self.rows] * (self.index.group.max() + 1) + self.index.group[self.rows]
        groups = [self.rows[unit == u] for u in rng.permutation(np.unique(unit))]
        windows, window = [], [groups[0]]
        for group in groups[1:]:
            if sum(map(len, window)) >= SHUFFLE_WINDOW:
                windows.append(window)
                window = []
            window.append(group)
        return np.concatenate([rng.permutation(np.concatenate(w)) for w in [*windows, window]])

    def _run(
        self, plan: BatchPlan, place: Place, start: int, config: AugmentConfig, seed: list[int]
    ) -> Iterator[Batch]:
        decoded = self._decoded(plan, place, start, config.resized_crop, seed)
        for step, (images, labels, offset, total) in enumerate(decoded, start):
            x, y = torch.from_numpy(images), torch.from_numpy(labels)
            if place.device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()
            x = x.to(place.device, non_blocking=True)
            y = y.to(place.device, non_blocking=True)
            yield Batch(to_unit(augment(x, config, [*seed, step], offset, total)), y, offset, total)

    def _decoded(
        self, plan: BatchPlan, place: Place, start: int, resized_crop: float | None, seed: list[int]
    ) -> Iterator[tuple[NDArray[np.uint8], Rows, int, int]]:
        import ray.data

        tasks, parts = [], []
        for step in range(start, plan.num_steps):
            rows, offset, total = plan.part(step, place.rank, place.world_size)
            parts.append((self.index.labels[rows], offset, total))
            tasks.append(
                {
                    "files": [self.index.files[f] for f in self.index.file[rows]],
                    "group": self.index.group[rows].tolist(),
                    "offset": self.index.offset[rows].tolist(),
                    "row": rows.tolist(),
                }
            )
        if not tasks:
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        shape = (self.channels, self.size)
        # num_cpus=0: batches must be decoded even if the training workers hold every CPU.
        batches = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
            lambda task: _decode_task(task, *shape, resized_crop, seed),
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=min(READ_AHEAD, len(tasks))),
        )
        for row, part in zip(batches.iter_rows(), parts, strict=True):
            if row["error"]:
                raise UserError(row["error"])
            yield np.array(row["x"], dtype=np.uint8), *part


def image_shape(index: ImageIndex) -> tuple[int, int, int]:
    """Return (channels, height, width) of the first image: 1 channel if it is gray, else 3."""
    image = _open(index.files[index.file[0]], int(index.group[0]), int(index.offset[0]))
    return (1 if image.mode[0] in "L1I" and image.mode != "LA" else 3, image.height, image.width)


def _decode_task(task: dict[str, Any], *how: Any) -> dict[str, Any]:
    """Decode a batch in a Ray task; return a decoding error as a message, not a traceback."""
    try:
        return {"x": decode_batch(task, *how), "error": ""}
    except UserError as error:
        return {"x": np.zeros((0, 1, 1, 1), np.uint8), "error": str(error)}


def decode_batch(
    task: dict[str, Any], channels: int, size: int, resized_crop: float | None, seed: list[int]
) -> NDArray[np.uint8]:
    """Read and decode one batch to (n, C, size, size) uint8."""
    out = np.empty((len(task["row"]), channels, size, size), np.uint8)
    for i, (file, group, offset, row) in enumerate(
        zip(task["files"], task["group"], task["offset"], task["row"], strict=True)
    ):
        image = _eight_bit(_open(file, int(group), int(offset)), channels)
        if resized_crop is not None and seed:
            image = _random_resized_crop(image, size, resized_crop, np.random.default_rng([*seed, int(row)]))
        elif image.size != (size, size):
            image = _centre_crop(image, size)
        pixels = np.asarray(image)
        out[i] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return out


@lru_cache(maxsize=8)
def _image_column(file: str, group: int) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read_row_group(group, columns=["image"])["image"]


def _open(file: str, group: int, offset: int) -> Image.Image:
    where = file if group < 0 else f"{file}, row group {group}, row {offset}"
    try:
        if group < 0:
            image = Image.open(file)
        else:
            value = _image_column(file, group)[offset].as_py()
            image = Image.open(io.BytesIO(value["bytes"] if isinstance(value, dict) else value))
        image.load()  # decoding is lazy: a truncated image raises here
        return image
    except Exception as error:  # the decoders of Pillow raise any kind for a damaged file
        raise UserError(f"cannot decode the image in {where}: {error}") from error


def _eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8-bit gray or RGB; keep the upper 8 of 16 bits (Pillow would clip)."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


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
    image = image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))),
        Image.Resampling.BILINEAR,
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
