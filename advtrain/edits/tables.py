"""Tables of substitutions: the words that may replace a word."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from advtrain.errors import UserError
from advtrain.user_paths import user_path

#: File of the table `counterfitted` below the data root (Mrksic et al. 2016, as published by Jia et al. 2019).
COUNTERFITTED = "text/synonyms/counterfitted_neighbors.json"
#: Files of WordNet's database, in the order in which a folder is read.
_WORDNET = ("data.noun", "data.verb", "data.adj", "data.adv")
#: Start of a line of such a file: offset, number of the lexicographer's file, kind, number of words in hexadecimal.
_SYNSET = re.compile(r"\d{8} \d\d [nvasr] ([0-9a-f]{2}) ")


def normalize(word: str) -> str:
    """Return a word in lower case and with straight apostrophes, as tables have it."""
    return word.lower().replace("\u2019", "'")


@dataclass(frozen=True)
class Table:
    """Substitutions of words, see `build`. No word is a substitution of itself.

    Args:
        name: what the recipe calls it, for reports.
        words: normalized word -> its substitutions, as they are written in the file.
    """

    name: str
    words: Mapping[str, tuple[str, ...]] = field(repr=False)

    @classmethod
    def build(cls, name: str, words: Mapping[str, Iterable[str]]) -> Table:
        """Return a table without empty entries, repetitions and words that replace themselves."""
        merged: dict[str, dict[str, None]] = {}
        for word, others in words.items():
            key = normalize(word)
            kept = merged.setdefault(key, {})
            kept.update((other, None) for other in others if normalize(other) != key)
        return cls(name, {word: tuple(others) for word, others in merged.items() if others})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the substitutions, for any kind of file and order of its keys."""
        text = json.dumps(dict(self.words), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash((self.name, self.digest))

    def __len__(self) -> int:
        return len(self.words)

    def __reduce__(self) -> tuple[object, ...]:
        return Table, (self.name, dict(self.words))


def load_table(name: str, root: Path, setting: str = "evaluation.threat.table") -> Table:
    """Load the table `counterfitted`, a JSON file, or WordNet's database.

    Args:
        name: `counterfitted`; or the path of a file {word: [words]} with the suffix .json; or the path of a file of
            WordNet's database, such as data.noun, or of the folder `dict` with all four. A path is absolute, relative
            to the working folder, or relative to the data root.
        root: data root.
        setting: path of the setting that names the table, for errors.

    Returns:
        The table. Words of WordNet are substitutions of each other if a synset has both. Its entries of several words
        are left out, since a text has no place for them.

    Raises:
        UserError: there is no such file, it can't be read, it has another format, or it has no substitution.
    """
    if name == "counterfitted":
        path = root / COUNTERFITTED
        if not path.is_file():
            raise UserError(
                f"the table counterfitted is not in '{path}'; set the folder that contains {COUNTERFITTED} with "
                "--data-root"
            )
    else:
        given = user_path(name, setting)
        path = next((place for place in (given, root / given) if place.exists()), given)
        if not path.exists():
            raise UserError(
                f"{setting}: '{name}' does not exist; write counterfitted, or the path of a .json file "
                "{word: [words]} or of WordNet's database"
            )
    words = _wordnet(path) if path.is_dir() or path.suffix != ".json" else _json(path)
    table = Table.build(name, words)
    if not table.words:
        raise UserError(f"'{path}': the table has no substitution")
    return table


def _json(path: Path) -> dict[str, list[str]]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from error
    except OSError as error:
        raise UserError(f"'{path}' can't be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise UserError(f"'{path}' must hold an object {{word: [words]}}, not a {type(found).__name__}")
    for word, others in found.items():
        if not isinstance(others, list) or not all(isinstance(o, str) and o.strip() for o in others):
            raise UserError(
                f"'{path}': the substitutions of '{word}' must be a list of words (got {others!r:.60})"
            )
    return found


def _wordnet(path: Path) -> dict[str, list[str]]:
    """Return the words of each synset of WordNet's database (wndb(5WN))."""
    files = [path / name for name in _WORDNET if (path / name).is_file()] if path.is_dir() else [path]
    if not files:
        raise UserError(f"'{path}' has no file of WordNet's database: {', '.join(_WORDNET)}")
    words: dict[str, list[str]] = {}
    for file in files:
        known = False
        try:
            lines = file.read_text("utf-8", "replace").splitlines()
        except OSError as error:
            raise UserError(f"'{file}' can't be read: {error.strerror}") from error
        for line in lines:
            if found := _SYNSET.match(line):
                known = True
                fields = line[found.end() :].split(" ")[: 2 * int(found[1], 16) : 2]
                synset = [re.sub(r"\(\w+\)$", "", word) for word in fields if "_" not in word]
                for word in synset:
                    words.setdefault(word, []).extend(synset)
        if not known:
            raise UserError(
                f"'{file}' is neither a .json file nor a file of WordNet's database; its lines are no synsets"
            )
    return words
