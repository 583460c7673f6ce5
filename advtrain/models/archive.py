"""Strict reader of pt2 archives: from an untrusted file to a module that can only compute.

`torch.export.load` unpickles records, evaluates strings as Python expressions, and compiles names of the graph into
source code. A crafted archive uses each of these to run code. So the records are read here, each is checked against
the format that `torch.export.save` writes, and a fresh archive is made of the checked parts. Torch reads only that one.
`graph.py` checks the graph.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from advtrain.errors import UserError
from advtrain.models.graph import RefusedError, checked_program, without_mutation

_MODEL = "models/model.json"
_CONFIGS = {
    "data/weights/model_weights_config.json": "weight_",
    "data/constants/model_constants_config.json": "tensor_",
}
#: Records that torch writes and this reader replaces: version marks and the pickled example input.
_REPLACED = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
_EXAMPLE = "data/sample_inputs/model.pt"
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_[0-9]{1,9}")
#: Bytes of one element by the number of its type in the archive (`ScalarType` of torch's export schema).
_ELEMENT_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 12: 1, 13: 2}
#: Bytes of the record that ends a zip archive without a comment.
_END_RECORD = 22
#: Largest record that is parsed as JSON, in bytes.
_MOST_TEXT = 256 * 2**20
#: Lock: torch.export.load must not run in two threads at once.
_READING = threading.Lock()


def refusal(content: bytes) -> str:
    """Return why `load_archive` refuses a pt2 archive before torch reads it; "" if it does not."""
    try:
        _fresh(content)
    except RefusedError as error:
        return str(error)
    return ""


def load_archive(content: bytes) -> nn.Module:
    """Return the module of a pt2 archive, without running code that the archive brings.

    Args:
        content: bytes of a file that `torch.export.save` wrote for a module with one input and one output.

    Raises:
        UserError: the archive has anything else in it, or its graph changes its own weights or buffers.
    """
    try:
        fresh = _fresh(content)
        with _READING, weights_only(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unable to load package")
            return without_mutation(torch.export.load(io.BytesIO(fresh))).module()
    except RefusedError as error:
        raise UserError(f"the pt2 archive is not loaded: {error}") from error
    except Exception as error:
        raise UserError(f"the pt2 archive cannot be loaded: {error}") from error


def _fresh(content: bytes) -> bytes:
    """Check every record and return a new archive of the checked parts."""
    records = _records(content)
    known = {_MODEL, _EXAMPLE, *_CONFIGS, *_REPLACED}
    for name in records:
        if name not in known and not _TENSOR.fullmatch(name):
            raise RefusedError(f"record '{name}' does not belong to an exported model")
    if missing := sorted({_MODEL, *_CONFIGS} - records.keys()):
        raise RefusedError(f"record '{missing[0]}' is missing")
    if records.get("byteorder", b"little") != b"little":
        raise RefusedError("its tensors are not little-endian")
    if not _weights_alone(records.get(_EXAMPLE, b"")):  # MLflow's own loader would run it
        raise RefusedError(f"record '{_EXAMPLE}' holds Python objects, which could run any code")
    written = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(written)
    writer.set_min_version(6)
    for config, prefix in _CONFIGS.items():
        folder = config.rpartition("/")[0]
        values = _checked_config(_json(records, config), config, folder, prefix, records)
        for path in {entry["path_name"]: None for entry in values["config"].values()}:
            _write(writer, f"{folder}/{path}", records[f"{folder}/{path}"])
        _write(writer, config, json.dumps(values).encode())
    _write(writer, _MODEL, json.dumps(checked_program(_json(records, _MODEL))).encode())
    _write(writer, _EXAMPLE, b"")
    _write(writer, "archive_format", b"pt2")
    _write(writer, "archive_version", b"0")
    writer.write_end_of_file()
    return written.getvalue()


def _records(content: bytes) -> dict[str, bytes]:
    """Return the records by name, without the archive's root folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            ends = content[-_END_RECORD:].startswith(b"PK\x05\x06")
            if not entries or min(entry.header_offset for entry in entries) != 0 or not ends:
                raise RefusedError("there are bytes before or after the archive")
            root = entries[0].filename.partition("/")[0]
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,200}", root):
                raise RefusedError(f"its root folder is '{root}'")
            seen: set[str] = set()
            records = {}
            for entry in entries:
                name = entry.filename
                if name.lower() in seen:
                    raise RefusedError(f"record '{name}' occurs twice, or in another case")
                seen.add(name.lower())
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise RefusedError(f"record '{name}' is compressed")
                if not name.startswith(f"{root}/") or entry.orig_filename != name:
                    raise RefusedError(f"record '{name}' is outside the folder '{root}'")
                records[name.removeprefix(f"{root}/")] = archive.read(entry)
            return records
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise RefusedError(f"it is no intact archive ({error})") from error


def _json(records: dict[str, bytes], name: str) -> Any:
    if len(records[name]) > _MOST_TEXT:
        raise RefusedError(f"record '{name}' is larger than {_MOST_TEXT:,} bytes")
    try:
        return json.loads(records[name])
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"record '{name}' is not JSON ({error})") from error


def _checked_config(
    values: Any, config: str, folder: str, prefix: str, records: dict[str, bytes]
) -> dict[str, Any]:
    """Return the description of the tensors in `folder`; all are raw numbers within their record."""
    try:
        (entries,) = values.values()
        for name, entry in entries.items():
            path, meta = entry["path_name"], entry["tensor_meta"]
            if entry["use_pickle"] is not False or not re.fullmatch(prefix + r"[0-9]{1,9}", path):
                raise RefusedError(f"tensor '{name}' is not stored as raw numbers but as Python objects")
            needed = math.prod(size["as_int"] for size in meta["sizes"]) * _ELEMENT_BYTES[meta["dtype"]]
            strides = [stride["as_int"] for stride in meta["strides"]]
            if min([meta["storage_offset"]["as_int"], *strides, *(s["as_int"] for s in meta["sizes"])]) < 0:
                raise RefusedError(f"tensor '{name}' has a negative size or stride")
            # Tensors with stride 0 repeat their numbers; a small record must not grow without bound.
            if needed > max(len(records[f"{folder}/{path}"]), 2**20 if 0 in strides else 0):
                raise RefusedError(f"tensor '{name}' is larger than its record '{path}'")
        return {"config": entries}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"record '{config}' does not describe tensors ({error!r})") from error


def _weights_alone(record: bytes) -> bool:
    try:
        return not record or torch.load(io.BytesIO(record), map_location="cpu", weights_only=True) is not None
    except Exception:  # noqa: BLE001 (torch raises many kinds: whatever it is, it is no example of tensors)
        return False


def _write(writer: Any, name: str, content: bytes) -> None:
    writer.write_record(name, content, len(content))


@contextmanager
def weights_only() -> Iterator[None]:
    """Make every `torch.load` refuse Python objects, also one that asks for them."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
