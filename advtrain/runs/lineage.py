"""Lineage of a run: the models whose weights it started from, or that taught it."""

from __future__ import annotations

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
        """Return the ancestor that `as_json` has written."""
        older = tuple(cls.from_json(ancestor) for ancestor in values.get("ancestors", ()))
        return cls(**{**values, "ancestors": older})


def all_ancestors(ancestors: Iterable[Ancestor]) -> Iterator[Ancestor]:
    """Yield the ancestors and, after each, its own ancestors."""
    for ancestor in ancestors:
        yield ancestor
        yield from all_ancestors(ancestor.ancestors)
