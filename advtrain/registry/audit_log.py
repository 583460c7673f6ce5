"""The record of every decision about a registered model: an append-only chain that any number of writers can share.

MLflow moves an alias without asking where it stood. What it does atomically, on SQLite as on a server, is to number a
new model version: so the decisions about `digits` are the versions of a registered model `digits.decisions`, each with
its record as a tag, and their numbers put them in one order that every reader sees. A record names the digest of the
record that its writer saw last. It counts if that one is still the last when it gets its number; else another writer
came first, and it is void. That is a compare-and-set without a lock: a writer that dies leaves nothing to clean up.

The aliases only follow the record (`aliases.py`).
"""

from __future__ import annotations

import hashlib
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from advtrain.errors import UserError
from advtrain.tracking.store import user

Kind = Literal["registered", "first", "adopted", "asked", "allowed", "refused", "rolled_back"]
#: Kinds that make their version champion.
MOVES = ("first", "adopted", "allowed", "rolled_back")

SUFFIX = ".decisions"
RECORD_TAG, DIGEST_TAG = "advtrain.record", "advtrain.record_digest"
#: Of the model itself: how many records there were and the digest of the last, so that none can vanish from the end.
ANCHOR_TAG = "advtrain.decisions"
#: Attempts to append while nobody else comes first: MLflow gives up numbering after three collisions.
ATTEMPTS = 12


class Decision(BaseModel):
    """One record. `digest` is over its text as it is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    model: str
    version: str
    champion: str | None
    """the champion before"""
    actor: str
    time: str
    """UTC, ISO 8601"""
    reason: str = ""
    policy: dict[str, Any] | None = None
    evidence: dict[str, Any] = {}
    sequence: int
    previous: str
    """digest of the record before, SHA-256"""
    nonce: str = ""

    @property
    def text(self) -> str:
        """As it is stored."""
        return self.model_dump_json()

    @property
    def digest(self) -> str:
        """SHA-256, 64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Draft:
    """What a writer wants to put on record."""

    kind: Kind
    version: str
    champion: str | None
    run_id: str | None  # whose report is the evidence
    reason: str = ""
    policy: dict[str, Any] | None = None
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """The records that count, in their order, and whatever is wrong with them."""

    decisions: list[Decision]
    faults: list[str]

    @property
    def head(self) -> str:
        """How many there are, and the digest of the last."""
        return f"{len(self.decisions)} {self.decisions[-1].digest}" if self.decisions else "0 -"


class ConflictError(Exception):
    """Another record came first; the reader has to look again before it writes."""


def log_name(name: str) -> str:
    """Return the registered model that holds the decisions about `name`."""
    return name + SUFFIX


def read_chain(client: Any, name: str) -> Chain:
    """Read all records about a model, whole or not: see `faults`."""
    anchor = _anchor(client, name)  # first: it may be older than what is read then, and not newer
    entries = _entries(client, name)
    numbers = [number for number, _, _ in entries]
    missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
    faults = [f"record {number} is missing" for number in missing]
    decisions: list[Decision] = []
    last = _genesis(name)
    seen = {last}
    for number, text, digest in entries:
        decision = _parse(text)
        if decision is None or decision.model != name or hashlib.sha256(text.encode()).hexdigest() != digest:
            faults.append(f"record {number} was altered: its text does not have the digest {digest[:12]}")
        elif decision.previous == last:
            if wrong := _contradiction(decision, decisions):
                faults.append(f"record {number} cannot be ours: {wrong}")
            decisions.append(decision)
            last = digest
        elif decision.previous not in seen:  # one that lost a race follows a record that is there
            faults.append(
                f"record {number} was altered or moved: it follows {decision.previous[:12]}, which is not before it"
            )
        seen.add(digest)
    if anchor is not None and not _holds(anchor, decisions):
        faults.append(f"records are missing from the end: there were {anchor.partition(' ')[0]} at least")
    return Chain(decisions, faults)


@dataclass(frozen=True)
class Standing:
    """What the decisions come to."""

    champion_history: tuple[
        str, ...
    ] = ()  # champions in their order, the present one last; a rollback shortens it
    promoted_by: Decision | None = None  # the record that made the present one champion
    past_champions: tuple[str, ...] = ()  # every version that ever was

    @property
    def champion(self) -> str | None:
        """The present one."""
        return self.champion_history[-1] if self.champion_history else None

    @property
    def previous(self) -> str | None:
        """The one that a rollback leads to."""
        return self.champion_history[-2] if len(self.champion_history) > 1 else None


def replay(decisions: Sequence[Decision]) -> Standing:
    """Return what the decisions come to, one after another."""
    line: tuple[str, ...] = ()
    promoted_by, past_champions = None, []
    for decision in decisions:
        if decision.kind not in MOVES:
            continue
        version = decision.version
        if decision.kind == "rolled_back" and version in line:
            line = line[: line.index(version) + 1]
        elif not line or line[-1] != version:
            line = (*(v for v in line if v != version), version)
        promoted_by = decision
        past_champions.append(version)
    return Standing(line, promoted_by, tuple(past_champions))


def registration(chain: Chain, version: str) -> dict[str, Any]:
    """Return what was put on record of a version's files and origin; nothing for one from before there was a record."""
    for decision in reversed(chain.decisions):
        if decision.version == version and decision.evidence.get("files_digest"):
            return decision.evidence
    return {}


def _contradiction(decision: Decision, before: list[Decision]) -> str:
    """Return why a record that is well chained was not written by this code; empty if it may have been."""
    # Only what moves the champion needs to know where it stands: most records do not.
    standing = replay(before) if decision.kind in MOVES else Standing()
    if decision.sequence != len(before) + 1:
        return f"it counts as number {decision.sequence} of {len(before) + 1}"
    if decision.kind in MOVES and decision.champion != standing.champion:
        return f"it moves champion {decision.champion}, and {standing.champion} was"
    if decision.kind == "allowed" and any(
        r.get("verdict") == "failed" for r in decision.evidence.get("rules", [])
    ):
        return "it allows what a rule refused"
    if decision.kind == "rolled_back" and decision.version not in standing.past_champions:
        return f"it goes back to version {decision.version}, which never was champion"
    try:
        datetime.fromisoformat(decision.time)
    except ValueError:
        return f"its time is '{decision.time}'"
    return ""


def append(client: Any, name: str, draft: Draft, chain: Chain) -> Decision:
    """Put a record behind the last one of `chain`.

    Raises:
        ConflictError: another record came first.
        UserError: the store does not take it.
    """
    last = chain.decisions[-1].digest if chain.decisions else _genesis(name)
    decision = Decision(
        kind=draft.kind,
        model=name,
        version=draft.version,
        champion=draft.champion,
        actor=user(),
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        reason=draft.reason,
        policy=draft.policy,
        evidence=draft.evidence,
        sequence=len(chain.decisions) + 1,
        previous=last,
        nonce=secrets.token_hex(8),
    )
    error: Exception | None = None
    for attempt in range(ATTEMPTS):
        try:
            _write(client, name, decision, draft.run_id)
        except Exception as raised:  # noqa: BLE001 (it may have arrived all the same: the chain tells)
            error = raised
            time.sleep(random.uniform(0, 0.1 * (attempt + 1)))  # noqa: S311
        present = read_chain(client, name).decisions
        if any(other.digest == decision.digest for other in present):
            return decision
        if (present[-1].digest if present else _genesis(name)) != last:
            raise ConflictError
    raise UserError(f"the decision about '{name}' cannot be put on record: {error}")


def require_whole(chain: Chain, name: str) -> None:
    """Raise a UserError if a record was altered or is missing."""
    if chain.faults:
        raise UserError(
            f"the record of decisions about '{name}' is not whole: {'; '.join(chain.faults)}; nothing is decided on "
            f"it: restore the registered model '{log_name(name)}' from a backup"
        )


def _genesis(name: str) -> str:
    return hashlib.sha256(f"decisions about {name}".encode()).hexdigest()


def _parse(text: str) -> Decision | None:
    try:
        return Decision.model_validate_json(text)
    except ValidationError:
        return None


def _entries(client: Any, name: str) -> list[tuple[int, str, str]]:
    """Return (number, text, digest) of every record that the store holds, in the order of their numbers."""
    found, token = [], None
    while True:
        page = client.search_model_versions(
            named(log_name(name)), max_results=1000, order_by=["version_number ASC"], page_token=token
        )
        found += [(int(v.version), v.tags.get(RECORD_TAG, ""), v.tags.get(DIGEST_TAG, "")) for v in page]
        token = page.token
        if not token:
            return sorted(found)


def _write(client: Any, name: str, decision: Decision, run_id: str | None) -> None:
    tags = {RECORD_TAG: decision.text, DIGEST_TAG: decision.digest}
    if decision.sequence == 1:
        create_name(
            client,
            log_name(name),
            f"Decisions about the model {name}, each a record that is not to be changed.",
        )
    description = (
        f"{decision.kind}: version {decision.version}, by {decision.actor}. {decision.reason}".strip()
    )
    # Its source is the evidence: the report of the version that it is about.
    source = f"runs:/{run_id}/report" if run_id else f"models:/{name}/{decision.version}"
    client.create_model_version(
        log_name(name), source, run_id=run_id, tags=tags, description=description[:1000]
    )


def named(name: str) -> str:
    """Return the filter that finds a registered model's versions."""
    quote = '"' if "'" in name else "'"
    return f"name = {quote}{name}{quote}"


def require_model(name: str) -> None:
    """Raise a UserError if the name is one that holds decisions."""
    if name.endswith(SUFFIX):
        raise UserError(
            f"'{name}' holds decisions, and no models: names that end in {SUFFIX} are kept for that"
        )


def create_name(client: Any, name: str, description: str | None = None) -> None:
    """Make a registered model if it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _anchor(client: Any, name: str) -> str | None:
    tag = client.get_registered_model(name).tags.get(ANCHOR_TAG)
    return None if tag is None else str(tag)


def _holds(anchor: str, decisions: list[Decision]) -> bool:
    count, _, digest = anchor.partition(" ")
    if not count.isdigit() or int(count) > len(decisions):
        return False
    return count == "0" or decisions[int(count) - 1].digest == digest
