"""Batch-wise writer for prediction records, as parquet, CSV or JSON lines.

The file gets its final name after the last batch, so a file with that name is complete.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from advtrain.documents import dump_json
from advtrain.errors import UserError, find

Add = Callable[[list[dict[str, Any]]], None]


@contextmanager
def record_file(path: Path | None) -> Iterator[Add]:
    """Yield a function that appends records to the file; without a path it discards them.

    Raises:
        UserError: the suffix is not .parquet, .csv or .jsonl, or the file cannot be written.
    """
    if path is None:
        yield lambda records: None
        return
    sink = check_suffix(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    if path.is_dir():
        raise UserError(f"cannot write '{path}': it is a folder")
    try:
        part.touch()
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error
    try:
        with sink(part) as add:
            yield add
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_suffix(path: Path) -> Callable[[Path], AbstractContextManager[Add]]:
    """Return the writer for the file's suffix, or raise a UserError."""
    return find(_SINKS, path.suffix, f"kind of file in '{path.name}':")


@contextmanager
def _parquet(part: Path) -> Iterator[Add]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None

    def add(records: list[dict[str, Any]]) -> None:
        nonlocal writer
        rows = pa.Table.from_pylist(records)
        writer = writer or pq.ParquetWriter(part, rows.schema)
        writer.write_table(rows)

    try:
        yield add
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _csv(part: Path) -> Iterator[Add]:
    with part.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None

        def add(records: list[dict[str, Any]]) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, list(records[0]))
                writer.writeheader()
            for record in records:
                writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()})

        yield add


@contextmanager
def _jsonl(part: Path) -> Iterator[Add]:
    with part.open("w") as file:
        yield lambda records: file.writelines(dump_json(record) + "\n" for record in records)


_SINKS: dict[str, Callable[[Path], AbstractContextManager[Add]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".jsonl": _jsonl,
}
