"""A column of texts that stays in parquet files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from advtrain.data.batches import Rows
from advtrain.data.stream import image_column
from advtrain.errors import UserError

#: Texts that are read together.
_CHUNK = 50_000


@dataclass(frozen=True)
class TextColumn:
    """Places of N texts in parquet files; iteration reads them, a row group at a time."""

    files: list[str]
    columns: list[str]  # name of the column of texts in each file
    file: Rows  # (N,) number of the file
    group: Rows  # (N,) row group
    offset: Rows  # (N,) row within its group

    @classmethod
    def of(cls, files: Sequence[Any], columns: Sequence[str]) -> TextColumn:
        """Return all texts of parquet files, whose metadata is read for it."""
        import pyarrow.parquet as pq

        parts = []
        for number, path in enumerate(files):
            metadata = pq.ParquetFile(path).metadata
            for group in range(metadata.num_row_groups):
                offset = np.arange(metadata.row_group(group).num_rows)
                parts.append((np.full_like(offset, number), np.full_like(offset, group), offset))
        file, group_of, offset = (np.concatenate(each) for each in zip(*parts, strict=True))
        return cls([str(path) for path in files], list(columns), file, group_of, offset)

    @property
    def shape(self) -> tuple[int]:
        """Shape of the column, (N,)."""
        return (len(self),)

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, rows: Rows | slice) -> TextColumn:
        return replace(self, file=self.file[rows], group=self.group[rows], offset=self.offset[rows])

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _CHUNK):
            yield from self[first : first + _CHUNK].tolist()

    def tolist(self) -> list[str]:
        """Return all texts; each row group is read once.

        Raises:
            UserError: a file is missing or has changed.
        """
        import pyarrow as pa

        texts = [""] * len(self)
        for row in np.lexsort((self.group, self.file)).tolist():
            file = int(self.file[row])
            try:
                values = image_column(self.files[file], int(self.group[row]), self.columns[file])
                texts[row] = str(values[int(self.offset[row])].as_py())
            except (pa.ArrowException, OSError, KeyError, IndexError) as error:
                raise UserError(f"'{self.files[file]}' cannot be read: {error}") from error
        return texts

    def places(self) -> dict[str, Any]:
        """Return the places as plain values for a task of Ray; `at` reads them."""
        return {
            "files": [os.fsencode(self.files[file]) for file in self.file],
            "columns": [self.columns[file] for file in self.file],
            "group": self.group.tolist(),
            "offset": self.offset.tolist(),
        }

    @classmethod
    def at(cls, places: dict[str, Any]) -> TextColumn:
        """Return the column of the places that `places` gave."""
        files = [os.fsdecode(file) for file in places["files"]]
        numbers = np.arange(len(files))
        group, offset = (np.array(places[name], np.int64) for name in ("group", "offset"))
        return cls(files, list(places["columns"]), numbers, group, offset)
