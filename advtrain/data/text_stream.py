"""Streamed texts: training texts in parquet files that Ray Data reads and encodes.

The place of each text, its label and its length are in memory. An epoch's order is therefore a pure function of
(seed, epoch), as for texts in memory. Validation and test texts are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from advtrain.data.batches import Batch, BatchPlan, Labels, Place, Rows
from advtrain.data.stored_texts import CHUNK, StoredTexts
from advtrain.data.stream import read_ahead, shuffled_groups
from advtrain.data.texts import PAD, RawText, TextSpec, TextSplit, encode_texts, note_cut, to_splits
from advtrain.recipe.data import AugmentConfig
from advtrain.seeding import mix_seed


@dataclass(frozen=True)
class StreamTextSplit:
    """Training texts in parquet files, read and encoded on demand."""

    texts: StoredTexts
    labels: Labels  # (N,)
    lengths: Rows  # (N,) tokens of each text, at most spec.max_length
    spec: TextSpec
    group_by_length: bool = False

    @property
    def shape(self) -> tuple[int]:
        """Shape of a sample: (longest text,)."""
        return (self.spec.max_length,)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Rows) -> StreamTextSplit:
        """Return a split with only the given rows."""
        return replace(self, texts=self.texts[rows], labels=self.labels[rows], lengths=self.lengths[rows])

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, augment: AugmentConfig, place: Place, start: int = 0
    ) -> Iterator[Batch]:
        """Yield this rank's part of an epoch's batches; texts are shuffled as streamed images."""
        order = shuffled_groups(self.texts.file, self.texts.group, np.random.default_rng([seed, epoch]))
        plan = BatchPlan(order, batch_size)
        if self.group_by_length:
            rng = np.random.default_rng(mix_seed("length", seed, epoch))
            plan = plan.grouped_by_length(self.lengths, rng, neighbors=True)
        return self._run(plan, place, start)

    def batches(self, batch_size: int, place: Place) -> Iterator[Batch]:
        """Yield this rank's part of one pass in order."""
        return self._run(BatchPlan(np.arange(len(self)), batch_size), place, 0)

    def _run(self, plan: BatchPlan, place: Place, start: int) -> Iterator[Batch]:
        parts = [plan.part(step, place.rank, place.world_size) for step in range(start, plan.num_steps)]
        files, columns, spec = self.texts.files, self.texts.columns, self.spec
        tasks = [
            {name: getattr(self.texts, name)[rows].tolist() for name in ("file", "group", "offset")}
            for rows, _, _ in parts
        ]

        def encoded(task: dict[str, Any]) -> dict[str, Any]:
            texts = StoredTexts(files, columns, **{name: np.array(task[name], np.int64) for name in task})
            # flat, because the batches of a stream must not differ in shape
            return {"x": encode_texts(spec, texts.tolist(), files[0])[0].reshape(-1)}

        for (rows, offset, total), found in zip(parts, read_ahead(tasks, encoded), strict=True):
            ids = np.array(found["x"], np.int64).reshape(len(rows), spec.max_length)
            x = torch.from_numpy(ids[:, : max(1, int(self.lengths[rows].max(initial=0)))])
            yield Batch(place.put(x), place.put(torch.from_numpy(self.labels[rows])), offset, total)


def split_texts(
    spec: TextSpec, parts: Sequence[RawText], *, group_by_length: bool
) -> tuple[list[TextSplit | StreamTextSplit], list[str]]:
    """Return the training, validation and test split, and notes.

    The training split is a stream if its texts are in files. `to_splits` describes the arguments and the notes.
    """
    train, *held = parts
    if not isinstance(train.texts, StoredTexts):
        in_memory, notes = to_splits(spec, parts, group_by_length=group_by_length)
        return [*in_memory], notes
    lengths, cut = np.zeros(len(train), np.int64), 0
    for first in range(0, len(train), CHUNK):
        rows = slice(first, first + CHUNK)
        ids, long, _ = encode_texts(spec, train.texts[rows].tolist(), train.where, first)
        lengths[rows] = (ids != PAD).sum(1)
        cut += int(long.sum())
    splits, notes = to_splits(spec, held)
    streamed = StreamTextSplit(train.texts, train.labels, lengths, spec, group_by_length)
    return [streamed, *splits], [*note_cut(spec, cut, len(train), "training "), *notes]
