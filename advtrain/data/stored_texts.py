"""Texts that stay in parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from advtrain.data.batches import Rows
from advtrain.data.parquet import open_parquet
from advtrain.data.stream import column_of_group
from advtrain.errors import UserError

#: Texts that are read together.
CHUNK = 10_000


@dataclass(frozen=True)
class StoredTexts:
    """Places of N texts in parquet files; slices and iteration work as for an array of texts."""

    files: list[str]
    columns: list[str]  # name of the column of texts in each file
    file: Rows  # (N,) number of the file
    group: Rows  # (N,) row group
    offset: Rows  # (N,) row within its group

    @classmethod
    def of(cls, files: Sequence[Path], columns: Sequence[str]) -> StoredTexts:
        """Return all texts of parquet files, of which only the metadata is read."""
        parts = []
        for number, path in enumerate(files):
            metadata = open_parquet(path).metadata
            for group in range(metadata.num_row_groups):
                offset = np.arange(metadata.row_group(group).num_rows)
                parts.append((np.full_like(offset, number), np.full_like(offset, group), offset))
        file, groups, offset = (np.concatenate(each) for each in zip(*parts, strict=True))
        return cls([str(path) for path in files], list(columns), file, groups, offset)

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, rows: Rows | slice) -> StoredTexts:
        return replace(self, file=self.file[rows], group=self.group[rows], offset=self.offset[rows])

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), CHUNK):
            yield from self[first : first + CHUNK].tolist()

    def tolist(self) -> list[str]:
        """Read all texts; each row group is read once.

        Raises:
            UserError: a file is missing or has changed.
        """
        import pyarrow as pa

        texts = [""] * len(self)
        for row in np.lexsort((self.group, self.file)).tolist():
            file = int(self.file[row])
            try:
                values = column_of_group(self.files[file], int(self.group[row]), self.columns[file])
                texts[row] = str(values[int(self.offset[row])].as_py())
            except (pa.ArrowException, OSError, KeyError, IndexError) as error:
                raise UserError(f"'{self.files[file]}' cannot be read: {error}") from error
        return texts
