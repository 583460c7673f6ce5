"""Records with a digest, so that a flipped bit in a file of a run is noticed.

The digest of a line covers the line before it as well, so lines cannot be dropped, doubled or reordered. Whoever can
write the files can also write new digests: they show damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from advtrain.documents import MOST_JSON, dump_json, finite, parse_json
from advtrain.errors import UserError

_KEY = "digest"


def sealed(values: dict[str, Any], previous: str = "") -> dict[str, Any]:
    """Return the values with their digest; `previous` is the digest of the record before."""
    return {**values, _KEY: _digest(values, previous)}


def sealed_json(values: dict[str, Any], previous: str = "", indent: int | None = 1) -> str:
    """Return the JSON text of the values with their digest; NaN and infinity become null."""
    return dump_json(sealed(finite(values), previous), indent)


def unsealed(values: Any, previous: str = "") -> dict[str, Any]:
    """Return the values without their digest. Records of earlier versions have none.

    Raises:
        ValueError: the values are no object, or their digest differs.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")  # noqa: TRY004 (of the file)
    found: dict[str, Any] = dict(values)
    if (digest := found.pop(_KEY, None)) is not None and digest != _digest(found, previous):
        raise ValueError("its digest differs from its content")
    return found


def sealed_all(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records with their digests, each covering the one before."""
    found: list[dict[str, Any]] = []
    for record in records:
        found.append(sealed(record, found[-1][_KEY] if found else ""))
    return found


def unsealed_all(records: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the records without their digests.

    Raises:
        ValueError: a record is no object, its digest differs, or it has none although one before it has.
    """
    found: list[dict[str, Any]] = []
    previous, started = "", False
    for number, record in enumerate(records, 1):
        has_digest = isinstance(record, dict) and _KEY in record
        try:
            if started and not has_digest:
                raise ValueError("its digest is missing")
            found.append(unsealed(record, previous))
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
        previous, started = _digest(found[-1], previous), started or has_digest
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON lines file without a truncated last line; [] if missing.

    Raises:
        UserError: a line is damaged, or the file is no text.
    """
    try:
        if path.stat().st_size > MOST_JSON:
            raise UserError(f"'{path}' is larger than {MOST_JSON:,} bytes")
        *lines, rest = path.read_text().split("\n")
        if _is_more_than_a_record(rest):
            raise ValueError("its last line does not end")
        return unsealed_all(parse_json(line) for line in lines)
    except OSError:
        return []
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}") from error


def _is_more_than_a_record(text: str) -> bool:
    """Return whether text goes on after a whole record, which a write that was cut short never does."""
    try:
        return json.JSONDecoder().raw_decode(text)[1] < len(text)
    except (ValueError, RecursionError):
        return False


def next_line(path: Path, record: dict[str, Any]) -> str:
    """Return the line that appends a record to a JSON lines file."""
    previous = ""
    if path.exists() and (lines := path.read_text().split("\n")[:-1]):
        previous = str(parse_json(lines[-1]).get(_KEY, ""))
    return sealed_json(record, previous, None) + "\n"


def _digest(values: dict[str, Any], previous: str) -> str:
    """Return 32 hexadecimal digits over the values as JSON stores them."""
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.sha256(f"{previous} {text}".encode()).hexdigest()[:32]
