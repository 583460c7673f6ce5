"""Decisions about a registered model, and the state that a sequence of them leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

Kind = Literal["registered", "first", "adopted", "asked", "allowed", "refused", "rolled_back"]
#: Kinds of decision that make their version champion.
MOVES = ("first", "adopted", "allowed", "rolled_back")


class Finding(BaseModel):
    """Result of one rule."""

    model_config = ConfigDict(frozen=True)
    rule: str
    verdict: Literal["passed", "failed", "skipped"]
    figures: str
    threshold: str


class PolicyFacts(BaseModel):
    """Part of a recorded policy that is not a threshold."""

    name: str
    version: int
    digest: str = Field(pattern="^[0-9a-f]{64}$")


Number = Annotated[str, Field(pattern="^[0-9]{1,18}$")]


class Decision(BaseModel):
    """One record of the audit log. `digest` covers its text as stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    model: str
    version: Number
    champion: Number | None
    """champion before the decision"""
    actor: str
    time: str
    """UTC, ISO 8601"""
    reason: str = ""
    policy: dict[str, Any] | None = None
    evidence: dict[str, Any] = {}
    sequence: int
    previous: str
    """SHA-256 digest of the preceding record"""
    nonce: str = ""
    signature: str = Field(default="", exclude=True)
    """signature of the text in base64, which is stored beside it; see signing.py"""

    @field_validator("policy")
    @classmethod
    def _is_a_policy(cls, policy: dict[str, Any] | None) -> dict[str, Any] | None:
        if policy is not None:
            PolicyFacts.model_validate(policy)
        return policy

    @field_validator("evidence")
    @classmethod
    def _has_findings(cls, evidence: dict[str, Any]) -> dict[str, Any]:
        _FINDINGS.validate_python(evidence.get("rules", []))
        return evidence

    @property
    def findings(self) -> list[Finding]:
        """Result of each rule, in the order of the rules."""
        return _FINDINGS.validate_python(self.evidence.get("rules", []))

    @property
    def text(self) -> str:
        """Text of the record as stored, JSON."""
        return self.model_dump_json()

    @property
    def digest(self) -> str:
        """SHA-256 of the text, 64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


_FINDINGS = TypeAdapter(list[Finding])


@dataclass(frozen=True)
class Draft:
    """A decision that is not recorded yet."""

    kind: Kind
    version: str
    champion: str | None
    run_id: str | None  # run with the report that is the evidence
    reason: str = ""
    policy: dict[str, Any] | None = None
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """State of a registered model after a sequence of decisions."""

    champion_history: tuple[str, ...] = ()  # oldest first, current one last; a rollback shortens it
    promoted_by: Decision | None = None  # decision that made the current champion
    past_champions: tuple[str, ...] = ()  # every version that was ever champion

    @property
    def champion(self) -> str | None:
        """Current champion."""
        return self.champion_history[-1] if self.champion_history else None

    @property
    def previous(self) -> str | None:
        """Target of a rollback."""
        return self.champion_history[-2] if len(self.champion_history) > 1 else None


class Replay:
    """Decisions applied one after another."""

    def __init__(self) -> None:
        self._line: dict[str, None] = {}  # champion history, the current champion last
        self._past: list[str] = []
        self._champions: set[str] = set()
        self._promoted_by: Decision | None = None

    def copy(self) -> Replay:
        """Return a copy that other decisions can be applied to."""
        found = Replay()
        found._line, found._past, found._champions = dict(self._line), list(self._past), set(self._champions)
        found._promoted_by = self._promoted_by
        return found

    def apply(self, decision: Decision) -> None:
        """Apply a decision; most do not change the champion."""
        if decision.kind not in MOVES:
            return
        version = decision.version
        if decision.kind == "rolled_back" and version in self._line:
            while self.champion != version:
                self._line.popitem()
        else:
            self._line.pop(version, None)
            self._line[version] = None
        self._promoted_by = decision
        self._past.append(version)
        self._champions.add(version)

    @property
    def champion(self) -> str | None:
        """Current champion."""
        return next(reversed(self._line), None)

    def was_champion(self, version: str) -> bool:
        """Return whether a version is or was champion."""
        return version in self._champions

    def standing(self) -> Standing:
        """Return the state after the decisions."""
        return Standing(tuple(self._line), self._promoted_by, tuple(self._past))


def replay(decisions: Iterable[Decision]) -> Standing:
    """Apply the decisions in order and return the resulting state."""
    found = Replay()
    for decision in decisions:
        found.apply(decision)
    return found.standing()
