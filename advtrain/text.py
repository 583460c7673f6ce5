"""Text that is safe to print: names and reasons come from files, stores and other people."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

#: Directions of writing, which can hide or reorder what a line shows, and the separators of lines and paragraphs.
_HIDDEN = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")


def readable(text: str) -> str:
    r"""Return text that any encoding, file and table can hold.

    Python keeps a byte of a file name that is not UTF-8 as a lone surrogate. Such a byte becomes ``\xNN``.
    """
    return re.sub(
        "[\ud800-\udfff]",
        lambda c: f"\\x{ord(c[0]) - 0xDC00:02x}" if "\udc80" <= c[0] <= "\udcff" else f"\\u{ord(c[0]):04x}",
        text,
    )


def printable(text: str) -> str:
    """Return the text without control characters, which could change what a terminal shows.

    Line breaks and tabs stay. Bytes of file names that are not UTF-8 become readable.
    """
    text = readable(text)
    return "".join(c for c in text if c in "\n\t" or not (unicodedata.category(c) == "Cc" or c in _HIDDEN))


def one_line(text: str) -> str:
    """Return the printable text on one line."""
    return " ".join(printable(text).split())


def reason(error: BaseException) -> str:
    """Return the kind of an error and the start of its text, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def listed(names: Sequence[str], most: int) -> str:
    """Return the first `most` names with commas, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
