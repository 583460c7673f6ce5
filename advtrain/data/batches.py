"""Batch plan (the rows of each rank at each step) and data in memory as 8-bit tensors.

The plan is a pure function of (seed, epoch, step, rank), so a resume needs no iterator state. The rows of all ranks at
a step form the same global batch for any number of workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advtrain.data.augment import augment
from advtrain.recipe.data import AugmentConfig

Rows = NDArray[np.int64]
#: One per sample: int64 class labels, or float32 regression targets.
Labels = NDArray[np.int64] | NDArray[np.float32]

#: Up to this size in bytes, a data set is copied to the GPU once instead of batch by batch.
RESIDENT_BYTES = 4 * 2**30

#: Batches whose samples are sorted together by length, as in the Trainer of transformers.
LENGTH_WINDOW = 50


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    x: Tensor  # (n, C, H, W) float32 in [0, 1]
    y: Tensor  # (n,) int64, or float32 targets
    offset: int  # position of the first row in the global batch
    total: int  # rows of the global batch
    texts: NDArray[np.object_] | None = None  # (n,) str, of which x are the token ids; None: no texts


@dataclass(frozen=True)
class BatchPlan:
    """Split of one pass over `order` into global batches, and of each batch over the ranks.

    The pass has ceil(N / batch_size) steps whose sizes differ by at most one row. No row is dropped or repeated, and
    every rank has the same number of steps.
    """

    order: Rows
    batch_size: int

    @property
    def num_steps(self) -> int:
        """Number of steps of one pass."""
        return -(-len(self.order) // self.batch_size)

    def part(self, step: int, rank: int, world_size: int) -> tuple[Rows, int, int]:
        """Return the rows of one rank at one step, their offset in the global batch, and its size."""
        first, last = self._start(step), self._start(step + 1)
        size = last - first
        low, high = (size * r // world_size for r in (rank, rank + 1))
        return self.order[first + low : first + high], low, size

    def _start(self, step: int) -> int:
        return len(self.order) * step // self.num_steps

    def grouped_by_length(
        self, lengths: NDArray[np.integer[Any]], rng: np.random.Generator, *, neighbors: bool = False
    ) -> BatchPlan:
        """Return a plan whose batches hold samples of similar length, in random order.

        Windows of `LENGTH_WINDOW` batches are drawn at random. The samples of a window are sorted by length and dealt
        out to its batches.

        Args:
            lengths: (N,) length of each sample of the split.
            rng: source of the order of batches, and of samples within a batch.
            neighbors: True if the batches of a window are consecutive, so that a stream reads few row groups.
        """
        steps = rng.permutation(self.num_steps)
        if neighbors:
            steps = steps[np.argsort(steps // LENGTH_WINDOW, kind="stable")]
        batches: dict[int, Rows] = {}
        used = 0
        for window in np.split(steps, range(LENGTH_WINDOW, self.num_steps, LENGTH_WINDOW)):
            sizes = [self._start(step + 1) - self._start(step) for step in window]
            rows = self.order[used : used + sum(sizes)]
            used += len(rows)
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            # shuffled, because consecutive rows of a batch go to one rank, which would get all long texts
            parts = (rng.permutation(part) for part in np.split(rows, np.cumsum(sizes)[:-1]))
            batches.update(zip(window.tolist(), parts, strict=True))
        return replace(self, order=np.concatenate([batches[step] for step in range(self.num_steps)]))


@dataclass(frozen=True)
class Place:
    """Destination of batches: rank, world size and device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    def put(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device; a copy to a GPU is pinned and does not block."""
        if tensor.is_cpu and self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


class RawRows(Protocol):
    """Rows of a table before scaling."""

    @property
    def columns(self) -> Mapping[str, NDArray[Any]]:
        """Cells (N,) of each column: float64, or text as objects."""
        ...

    def take(self, rows: Rows) -> Self:
        """Return a table with only the given rows."""
        ...


class Labelled(Protocol):
    """Samples with labels."""

    @property
    def labels(self) -> Labels:
        """Labels or targets in the split's order, (N,)."""
        ...

    def __len__(self) -> int: ...


class Split(Labelled, Protocol):
    """Training, validation or test data, in memory or streamed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample: (C, H, W), or (F,) for tabular data."""
        ...

    def take(self, rows: Rows) -> Split:
        """Return a split with only the given rows."""
        ...

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, augment: AugmentConfig, place: Place, start: int = 0
    ) -> Iterator[Batch]:
        """Yield this rank's part of an epoch's shuffled, augmented batches, from step `start` on."""
        ...

    def batches(self, batch_size: int, place: Place) -> Iterator[Batch]:
        """Yield this rank's part of one pass in the split's own order, unaugmented."""
        ...


def stratified(split: Split, num_samples: int, seed: int) -> Split:
    """Return a seeded random subset of `num_samples` with the class proportions of the split.

    It has a sample of every class if `num_samples` is at least the number of classes. For a regression the rows are
    drawn uniformly.
    """
    return split if num_samples >= len(split) else split.take(stratified_rows(split, num_samples, seed))


def stratified_rows(split: Labelled, num_samples: int, seed: int) -> Rows:
    """Return the row numbers that `stratified` selects, in ascending order."""
    if num_samples >= len(split):
        return np.arange(len(split))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(split))
    if split.labels.dtype != np.int64:
        return np.sort(order[:num_samples])
    # Each class gets evenly spaced ranks in [0, 1), so the smallest ranks keep the class proportions.
    rank = np.empty(len(split))
    for label in np.unique(split.labels):
        rows = order[split.labels[order] == label]
        rank[rows] = np.arange(len(rows)) / len(rows)
    return np.sort(order[np.argsort(rank[order], kind="stable")][:num_samples])


def to_unit(x: Tensor) -> Tensor:
    """Convert 8-bit pixel values to float32 in [0, 1]; return floats unchanged."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


class ArraySplit:
    """Samples in memory.

    `images` is (N, C, H, W), or (N, F) for tabular data: uint8, or float32 in [0, 1]. `labels` is (N,): int64 labels,
    or float32 targets. `raw` holds the rows of a table before scaling, in the process that has read it.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | NDArray[np.float32] | NDArray[np.int64],
        labels: Labels,
        raw: RawRows | None = None,
    ) -> None:
        self.images, self.labels, self.raw = images, labels, raw
        self._resident: tuple[torch.device, Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample: (C, H, W), or (F,) for tabular data."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def share_memory_of(self, equal: ArraySplit) -> None:
        """Replace the arrays by those of a split with equal samples, which frees their memory."""
        self.images, self.labels, self._resident = equal.images, equal.labels, None

    def take(self, rows: Rows) -> ArraySplit:
        """Return a split with only the given rows."""
        raw = None if self.raw is None else self.raw.take(rows)
        return ArraySplit(self.images[rows], self.labels[rows], raw)

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, augment: AugmentConfig, place: Place, start: int = 0
    ) -> Iterator[Batch]:
        """Yield this rank's part of an epoch's batches; each epoch shuffles all samples."""
        yield from self._run(self._plan(batch_size, seed, epoch), place, start, augment, [seed, epoch])

    def _plan(self, batch_size: int, seed: int, epoch: int) -> BatchPlan:
        """Return the shuffled batches of a training epoch."""
        return BatchPlan(np.random.default_rng([seed, epoch]).permutation(len(self)), batch_size)

    def batches(self, batch_size: int, place: Place) -> Iterator[Batch]:
        """Yield this rank's part of one pass in order."""
        yield from self._run(BatchPlan(np.arange(len(self)), batch_size), place, 0, AugmentConfig(), [])

    def _run(
        self, plan: BatchPlan, place: Place, start: int, config: AugmentConfig, seed: list[int]
    ) -> Iterator[Batch]:
        images, labels = self._tensors(place.device)
        for step in range(start, plan.num_steps):
            rows, offset, total = plan.part(step, place.rank, place.world_size)
            index = torch.from_numpy(rows).to(images.device)
            x, y = place.put(images.index_select(0, index)), place.put(labels.index_select(0, index))
            x = augment(x, config, [*seed, step], offset, total)
            yield self._batch(rows, Batch(self.to_inputs(x), y, offset, total))

    def _batch(self, rows: Rows, batch: Batch) -> Batch:
        """Return the batch of these rows with what else the split knows about them."""
        return batch

    def to_inputs(self, x: Tensor) -> Tensor:
        """Return the inputs of the model for stored samples (n, ...)."""
        return to_unit(x)

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images and labels as tensors, on `device` unless they exceed RESIDENT_BYTES."""
        home = device if self.images.nbytes <= RESIDENT_BYTES else torch.device("cpu")
        if self._resident is None or self._resident[0] != home:
            self._resident = (home, _tensor(self.images).to(home), _tensor(self.labels).to(home))
        return self._resident[1], self._resident[2]

    def __getstate__(self) -> dict[str, object]:
        return {"images": self.images, "labels": self.labels, "raw": None, "_resident": None}


def _tensor(array: NDArray[np.generic]) -> Tensor:
    """Return a tensor that shares the array's memory.

    Arrays in Ray's object store are read-only, and nothing writes to the tensor.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)
