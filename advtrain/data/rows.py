"""Record of the samples of a data set, to find them among the samples of later models.

A sample is a key: 16 bytes of BLAKE2b over its decoded values. Equal values have equal keys, whatever their source or
type: 8-bit pixels and the same pixels as floats in [0, 1], a folder of PNG files and an .npz. An image of another size,
crop or number of channels has another key, so a record names the forms of its samples.

A record is one file: a line of JSON, the sorted keys of each split, and the SHA-256 of all that.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from advtrain.data.batches import ArraySplit, RawRows, Rows, Split
from advtrain.data.stream import StreamSplit
from advtrain.data.text_stream import StreamTextSplit
from advtrain.data.texts import TextSplit, text_key
from advtrain.documents import dump_json, parse_json
from advtrain.errors import UserError

if TYPE_CHECKING:
    from advtrain.data import Dataset

#: (N,) of 16 bytes each.
Keys = NDArray[np.bytes_]

SPLITS = ("train", "validation", "test")
#: Streamed splits with more samples are not recorded: each sample would be decoded once more.
MOST_STREAMED = 100_000

_FORMAT = "advtrain rows 1"
_KEY = np.dtype("S16")
_BLOCK = 4096
#: Largest distance of 255 x from a whole number for 8-bit values x: float32 division and multiplication differ.
_ROUNDING = 1e-4
#: From here on, float32 has no fractions.
_WHOLE = 2.0**23


@dataclass(frozen=True)
class RowRecord:
    """Keys of the samples of a data set."""

    data: str  # title of the data
    data_digest: str
    keys: Mapping[str, Keys] = field(default_factory=dict)  # recorded splits -> sorted, distinct
    reason: str = ""  # why a split is not recorded
    # forms of its samples, see `form_of`; several if the digest does not cover the form
    forms: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the content of the record's file."""
        head = {
            "format": _FORMAT,
            "data": self.data,
            "data_digest": self.data_digest,
            "samples": {name: len(keys) for name, keys in self.keys.items()},
            "reason": self.reason,
            "forms": self.forms,
        }
        content = dump_json(head).encode() + b"\n" + b"".join(keys.tobytes() for keys in self.keys.values())
        return content + hashlib.sha256(content).digest()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> RowRecord:
        """Read a record from the content of its file.

        Raises:
            UserError: the content is damaged; `where` names the file.
        """
        body, digest = content[:-32], content[-32:]
        if hashlib.sha256(body).digest() != digest:
            raise UserError(f"'{where}' is damaged: its digest differs from its content")
        line, _, rest = body.partition(b"\n")
        try:
            head = parse_json(line.decode())
            if head["format"] != _FORMAT:
                raise ValueError(f"its format is {head['format']!r}, not {_FORMAT!r}")
            keys, start = {}, 0
            for name, count in head["samples"].items():
                keys[str(name)] = np.frombuffer(rest, _KEY, count, start * _KEY.itemsize)
                start += count
            forms = tuple(map(str, head.get("forms", ())))
            for form in forms:
                _values(form)
            return cls(str(head["data"]), str(head["data_digest"]), keys, str(head["reason"]), forms)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"'{where}' is damaged: {error}") from error

    def merged(self, other: RowRecord) -> RowRecord:
        """Return a record of both forms of the same samples."""
        keys = {
            name: np.unique(
                np.concatenate([record.keys[name] for record in (self, other) if name in record.keys])
            )
            for name in SPLITS
            if name in self.keys or name in other.keys
        }
        forms = tuple(sorted({*self.forms, *other.forms}))
        return RowRecord(self.data, self.data_digest, keys, self.reason or other.reason, forms)

    def other_form(self, other: RowRecord) -> str:
        """Return how the forms differ if common samples are not found for it, else "".

        It does not matter between data of different names, or if the digest of the data is the same, since then the
        files and the splits are. The name of a file counts without its suffix.
        """
        if self.data_digest == other.data_digest or Path(self.data).stem != Path(other.data).stem:
            return ""
        mine, theirs = ({_values(form) for form in record.forms} for record in (self, other))
        if not mine or not theirs or mine & theirs:
            return ""
        return f"{', '.join(self.forms)}, here {', '.join(other.forms)}"


def merge_records(records: Iterable[RowRecord]) -> dict[str, RowRecord]:
    """Return records by the digest of their data; those of one digest are merged."""
    found: dict[str, RowRecord] = {}
    for record in records:
        known = found.get(record.data_digest)
        found[record.data_digest] = record if known is None else known.merged(record)
    return found


def form_of(dataset: Dataset) -> str:
    """Return the form of the samples: `3x32x32`, the number of columns of a table, 1 for texts."""
    if dataset.text is not None:
        return "1"
    raw = dataset.train.raw if isinstance(dataset.train, ArraySplit) else None
    form = "x".join(map(str, dataset.shape)) if raw is None else str(len(raw.columns))
    return form if dataset.crop is None else f"{form} of a crop of {dataset.crop}"


def _values(form: str) -> tuple[int, str]:
    """Return the number of values of a sample and its crop: a flat image has the key of the image."""
    shape, _, crop = form.partition(" ")
    return math.prod(map(int, shape.split("x"))), crop


def record_rows(dataset: Dataset) -> RowRecord:
    """Record the samples of each split, except of streams of more than `MOST_STREAMED`."""
    splits: dict[str, Split] = {name: getattr(dataset, name) for name in SPLITS}
    kept = {name: split for name, split in splits.items() if is_recorded(split)}
    reason = f"streams of more than {MOST_STREAMED:,} samples are not recorded" if len(kept) < 3 else ""
    keys = {name: np.unique(row_keys(split)) for name, split in kept.items()}
    return RowRecord(dataset.title, dataset.digest, keys, reason, (form_of(dataset),))


def is_recorded(split: Split) -> bool:
    """Return whether the samples of a split are recorded."""
    return not isinstance(split, StreamSplit | StreamTextSplit) or len(split) <= MOST_STREAMED


def row_keys(split: Split) -> Keys:
    """Return the key of each sample, in the order of the split, (N,).

    The rows of a scaled table are those before scaling, which depends on the training split. Numbers below 2^23
    count in float32 precision. Texts are those before they became token ids, see `text_key`.
    """
    if isinstance(split, TextSplit | StreamTextSplit):
        parts = [_hashed(text_key(text).encode() for text in split.texts)]
    elif isinstance(split, StreamSplit):
        parts = [_hashed(_contents(images)) for images in split.decoded()]
    else:
        assert isinstance(split, ArraySplit)
        blocks = range(0, len(split), _BLOCK)
        if split.raw is not None:
            parts = [_hashed(_cells(split.raw, start, min(start + _BLOCK, len(split)))) for start in blocks]
        else:
            parts = [_hashed(_contents(split.images[start : start + _BLOCK])) for start in blocks]
    return np.concatenate([np.zeros(0, _KEY), *parts])


def common_rows(keys: Keys, known: Keys) -> Rows:
    """Return the numbers of the samples whose key is among the known keys, in ascending order."""
    return np.flatnonzero(np.isin(keys, known))


def _hashed(contents: Iterator[bytes]) -> Keys:
    digests = [hashlib.blake2b(content, digest_size=_KEY.itemsize).digest() for content in contents]
    return np.frombuffer(b"".join(digests), _KEY)


def _contents(values: NDArray[Any]) -> Iterator[bytes]:
    """Yield the bytes of each sample: 8-bit values if all are multiples of 1/255, else float32.

    Numbers from 2^23 on, such as a time or an identifier, count in their own precision: float32 would round them to
    whole numbers, or coarser.
    """
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    if flat.dtype == np.uint8:
        yield from (b"8" + row.tobytes() for row in flat)
        return
    floats = flat.astype(np.float32) + np.float32(0)  # -0.0 becomes 0.0
    floats[np.isnan(floats)] = np.nan  # one of the many NaNs
    is_rounded = (np.abs(flat) >= _WHOLE) & (floats != flat)
    exact = np.where(is_rounded, flat, 0).astype(np.float64)
    levels = np.rint(255 * floats)
    near = np.abs(255 * floats - levels) < _ROUNDING  # False for NaN
    eight_bit = (near & (levels >= 0) & (levels <= 255)).all(1)
    pixels = np.where(eight_bit[:, None], levels, 0).astype(np.uint8)
    for row, large, as_pixels, is_eight_bit in zip(floats, exact, pixels, eight_bit, strict=True):
        if is_eight_bit:
            yield b"8" + as_pixels.tobytes()
        else:
            yield b"d" + row.tobytes() + large.tobytes() if large.any() else b"f" + row.tobytes()


def _natural(name: str) -> tuple[list[str | int], str]:
    """Return a sorting key in which x2 is before x10, as in an array of the same columns."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def _cells(raw: RawRows, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes of each row of a table; its columns are sorted by name, and x2 is before x10."""
    columns = [raw.columns[name][start:stop] for name in sorted(raw.columns, key=_natural)]
    numbers = [cells for cells in columns if cells.dtype != object]
    texts = [cells.tolist() for cells in columns if cells.dtype == object]
    with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32 becomes infinite
        contents = _contents(np.stack(numbers, 1) if numbers else np.zeros((stop - start, 0)))
        for number, content in enumerate(contents):
            yield content + json.dumps([column[number] for column in texts]).encode() if texts else content
