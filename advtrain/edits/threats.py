"""Threat models of texts: the single edits of a text, and which of them exclude each other.

A threat model of radius k allows up to k edits of the original text. Every edit replaces the characters text[start:end]
by others and occupies a place. The edits of a candidate occupy places that do not overlap, so their order does not
matter and the candidates can be counted exactly (`candidates.py`). All other characters of the text stay.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

from advtrain.edits.stop_words import STOP_WORDS
from advtrain.edits.tables import Table, normalize
from advtrain.errors import UserError

Where = Literal["inner", "anywhere"]
Operation = Literal["substitute", "swap", "delete", "insert"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

#: Letters and digits, with apostrophes and hyphens between them.
WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
#: Fewest letters of a word whose inner letters may change (Pruthi et al. 2019).
MIN_LETTERS = 4


class Edit(NamedTuple):
    """Replacement of text[start:end] by `new`.

    Its place is the interval [low, high] in half characters: character i of the text is at 2 i + 1, and the gap before
    it at 2 i.
    """

    start: int
    end: int
    new: str
    low: int
    high: int


def apply_edits(text: str, edits: Iterable[Edit]) -> str:
    """Apply edits at places that do not overlap, given in any order, to the text."""
    parts, position = [], 0
    for edit in sorted(edits, key=lambda e: (e.low, e.high)):
        parts += [text[position : edit.start], edit.new]
        position = edit.end
    return "".join([*parts, text[position:]])


@dataclass(frozen=True)
class WordEdits:
    """Threat model: up to `at_most` words are replaced by a substitution of the table.

    A word is a run of letters and digits, with apostrophes and hyphens between them. The place of an edit is its word.
    The table is searched for the word in lower case, with the apostrophe '. If the first letter of a word is a capital,
    that of its substitution is one, too. If a word of at least two letters is in capitals, its substitution is in
    capitals.

    Args:
        table: substitutions.
        at_most: radius, at least 0.
        protect: words that stay, in any case and with either apostrophe.
    """

    table: Table
    at_most: int
    protect: frozenset[str] = STOP_WORDS

    def __post_init__(self) -> None:
        check_radius(self.at_most)
        object.__setattr__(self, "protect", frozenset(map(normalize, self.protect)))

    def __str__(self) -> str:
        return f"words:{self.at_most}"

    def within(self, at_most: int) -> WordEdits:
        """Return the same threat model with another radius."""
        return replace(self, at_most=at_most)

    def edits(self, text: str) -> list[Edit]:
        """Return all single edits of the text, in order of their places."""
        found = []
        for match in WORD.finditer(text):
            key = normalize(match[0])
            if key in self.protect:
                continue
            start, end = match.span()
            others = self.table.words.get(key, ())
            for new in dict.fromkeys(_cased(other, match[0]) for other in others):
                if new != match[0]:
                    found.append(Edit(start, end, new, 2 * start + 1, 2 * end - 1))
        return found


@dataclass(frozen=True)
class CharEdits:
    """Threat model: up to `at_most` edits of characters.

    inner: the word is the place of an edit, so each word has at most one, as in Pruthi et al. 2019. Only words of at
    least four characters change, all of them letters, and their first and last letter stay. An inner letter is replaced
    or deleted, two inner letters are swapped, or a letter is inserted between any two letters.

    anywhere: each character and each gap is a place, as in Charmer (Abad Rocamora et al. 2024). The gaps are those
    between characters, before the first and after the last. A character is replaced or deleted, and one character is
    inserted in a gap. The place of a swap is two characters and the gap between them.

    Args:
        at_most: radius, at least 0.
        where: inner or anywhere.
        alphabet: characters that are put in. "letters": a to z; a replacement has the case of its letter, and an
            inserted letter the case of the letter on its left. Any other string: these characters as they are, without
            repetitions.
        operations: some of substitute, swap, delete, insert.
        protect: words, in any case and with either apostrophe, whose characters and inner gaps stay.
    """

    at_most: int
    where: Where = "inner"
    alphabet: str = "letters"
    operations: tuple[Operation, ...] = OPERATIONS
    protect: frozenset[str] = field(default=STOP_WORDS)

    def __post_init__(self) -> None:
        check_radius(self.at_most)
        object.__setattr__(self, "protect", frozenset(map(normalize, self.protect)))
        if self.alphabet != "letters":
            object.__setattr__(self, "alphabet", "".join(dict.fromkeys(self.alphabet)))
        if self.where not in get_args(Where):
            raise UserError(f"edits of characters are inner or anywhere, not '{self.where}'")
        if not self.operations or (wrong := [o for o in self.operations if o not in OPERATIONS]):
            raise UserError(
                f"edits of characters: unknown operation '{wrong[0]}'; known: {', '.join(OPERATIONS)}"
                if self.operations
                else f"edits of characters need an operation: {', '.join(OPERATIONS)}"
            )
        if not self.alphabet and {"substitute", "insert"} & set(self.operations):
            raise UserError("edits of characters: the alphabet is empty; write letters, or the characters")

    def __str__(self) -> str:
        return f"chars:{self.at_most}"

    def within(self, at_most: int) -> CharEdits:
        """Return the same threat model with another radius."""
        return replace(self, at_most=at_most)

    def edits(self, text: str) -> list[Edit]:
        """Return all single edits of the text, in order of their places."""
        fixed = self._protected(text)
        if self.where == "anywhere":
            found = self._between(text, 0, len(text), range(len(text) + 1), fixed, None)
            return sorted(found, key=lambda edit: (edit.low, edit.high))
        found = []
        for match in WORD.finditer(text):
            start, end = match.span()
            if end - start >= MIN_LETTERS and match[0].isalpha() and 2 * start + 1 not in fixed:
                place = (2 * start + 1, 2 * end - 1)
                found += self._between(text, start + 1, end - 1, range(start + 1, end), frozenset(), place)
        return found

    def _protected(self, text: str) -> frozenset[int]:
        """Return the half characters of protected words, from their first to their last letter."""
        return frozenset(
            half
            for match in WORD.finditer(text)
            if normalize(match[0]) in self.protect
            for half in range(2 * match.start() + 1, 2 * match.end())
        )

    def _between(
        self,
        text: str,
        first: int,
        last: int,
        gaps: range,
        fixed: frozenset[int],
        place: tuple[int, int] | None,
    ) -> list[Edit]:
        """Return the edits of the characters [first, last) and insertions in `gaps`.

        `fixed` are half characters that stay. `place` is the place of all edits; None: each has its own.
        """
        found: list[Edit] = []

        def add(start: int, end: int, new: Iterable[str], low: int, high: int) -> None:
            if fixed.isdisjoint(range(low, high + 1)):
                found.extend(Edit(start, end, c, *(place or (low, high))) for c in new)

        for i in range(first, last):
            own, letter, pair = 2 * i + 1, text[i], text[i : i + 2]
            if "substitute" in self.operations:
                add(i, i + 1, (c for c in self._letters(letter) if c != letter), own, own)
            if "delete" in self.operations:
                add(i, i + 1, [""], own, own)
            if "swap" in self.operations and i + 1 < last and pair[0] != pair[1]:
                add(i, i + 2, [pair[::-1]], own, own + 2)
        for gap in gaps if "insert" in self.operations else ():
            add(gap, gap, self._letters(text[gap - 1 : gap]), 2 * gap, 2 * gap)
        return found

    def _letters(self, model: str) -> str:
        """Return the characters that are put in, in the case of `model`."""
        if self.alphabet != "letters":
            return self.alphabet
        return string.ascii_uppercase if model.isupper() else string.ascii_lowercase


#: A threat model of texts.
EditThreat = WordEdits | CharEdits


def check_radius(at_most: int) -> None:
    """Raise a UserError if a number of edits is no integer of at least 0."""
    if isinstance(at_most, bool) or not isinstance(at_most, int) or at_most < 0:
        raise UserError(f"at_most must be an integer of at least 0 (got {at_most!r})")


def _cased(word: str, model: str) -> str:
    """Return the word with the capitals of the model: all, the first, or as it is written."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word
