"""Lineage of a run: the models whose weights it started from, or that taught it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Role = Literal["start", "teacher"]


@dataclass(frozen=True)
class Ancestor:
    """Model that a run started from, or that taught it."""

    role: Role
    reference: str  # as in the recipe, with an alias resolved to its version: models:/mnist/3
    digest: str  # SHA-256 of the weights, in hexadecimal
    run: str | None = None  # run that trained it; None: unknown
    data_digest: str | None = None  # digest of its data; None: unknown
    ancestors: tuple[Ancestor, ...] = ()  # its own ancestors

    def as_json(self) -> dict[str, Any]:
        """Return plain values, as in run.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ancestor:
        """Return the ancestor that `as_json` has written.

        Raises:
            TypeError: the values are not those of an ancestor.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"an ancestor is an object, not {values!r}")
        for key, value in values.items():
            optional = key in ("run", "data_digest") and value is None
            if key != "ancestors" and not optional and not isinstance(value, str):
                raise TypeError(f"{key} of an ancestor is text, not {value!r}")
        older = tuple(cls.from_json(ancestor) for ancestor in values.get("ancestors", ()))
        return cls(**{**values, "ancestors": older})


def all_ancestors(ancestors: Iterable[Ancestor]) -> Iterator[Ancestor]:
    """Yield the ancestors and, after each, its own ancestors."""
    for ancestor in ancestors:
        yield ancestor
        yield from all_ancestors(ancestor.ancestors)


def ancestors_in(facts: Mapping[str, Any]) -> tuple[Ancestor, ...]:
    """Return the ancestors in the entries of a run.json."""
    return tuple(map(Ancestor.from_json, facts.get("ancestors", ())))


#: Tag of an MLflow run and of a version that names its ancestors.
ANCESTORS_TAG = "advtrain.ancestors"


def ancestors_tag(ancestors: Iterable[Ancestor]) -> dict[str, str]:
    """Return the tag with role, reference and digests of the ancestors; none without ancestors."""
    keys = ("role", "reference", "digest", "data_digest")
    values = [{key: getattr(ancestor, key) for key in keys} for ancestor in ancestors]
    return {ANCESTORS_TAG: json.dumps(values)} if values else {}


def named_in_tag(text: str | None) -> list[Ancestor]:
    """Return the ancestors that a tag names; none if somebody has set it to other text."""
    try:
        return [Ancestor.from_json(values) for values in json.loads(text or "[]")]
    except (TypeError, ValueError, RecursionError):
        return []


def version_in(reference: str) -> tuple[str, str] | None:
    """Return name and number of the registered version that a reference names, or None."""
    found = re.fullmatch(r"models:/([^/]+)/([0-9]+)", reference)
    return None if found is None else (found[1], found[2])


def ancestor_rows(ancestors: Iterable[Ancestor], of: str = "") -> Iterator[list[str]]:
    """Yield a table row for each ancestor and, after it, its own: role, model, weights, data."""
    for ancestor in ancestors:
        data = "unknown" if ancestor.data_digest is None else ancestor.data_digest[:12]
        yield [f"{ancestor.role}{of}", ancestor.reference, ancestor.digest[:12], data]
        yield from ancestor_rows(ancestor.ancestors, f" of {ancestor.reference}")
