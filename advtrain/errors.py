"""Error class for users, and suggestions for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Error that the user can fix; the message states what is wrong, where, and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known name, else a list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"


def find(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`, or raise a UserError that suggests the closest name."""
    if name in table:
        return table[name]
    raise UserError(f"unknown {what} '{name}'{nearest(name, table)}")
