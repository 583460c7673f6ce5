"""Text that is safe to print: names and reasons come from files, stores and other people."""

from __future__ import annotations

import unicodedata

#: Directions of writing, which can hide or reorder what a line shows, and the separators of lines and paragraphs.
_HIDDEN = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")


def printable(text: str) -> str:
    """Return the text without control characters, which could change what a terminal shows.

    Line breaks and tabs stay.
    """
    return "".join(c for c in text if c in "\n\t" or not (unicodedata.category(c) == "Cc" or c in _HIDDEN))


def one_line(text: str) -> str:
    """Return the printable text on one line."""
    return " ".join(printable(text).split())
