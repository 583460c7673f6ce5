"""Audit log of a registered model: an append-only hash chain for concurrent writers.

MLflow aliases have no compare-and-set, but version numbers are assigned atomically, on SQLite and on a server. So each
decision about `digits` is a version of the registered model `digits.decisions`, with its record as a tag. The version
numbers give one order for all readers. A record contains the digest of the last record that its writer read. It is
valid only if no other valid record was added in between. Otherwise another writer was faster, and the record is void.
This is a compare-and-set without a lock, so a writer that crashes leaves nothing to clean up.

The aliases follow the log (`aliases.py`).
"""

from __future__ import annotations

import hashlib
import random
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from advtrain.errors import UserError
from advtrain.registry.decision import MOVES, Decision, Draft, Standing, replay
from advtrain.registry.signing import PRIVATE_KEY, can_sign, public_key, sign, unsigned
from advtrain.tracking.store import actor

#: Logs of a model: decisions, which the gate writes, and registrations, which whoever trains may write.
SUFFIX, REGISTRATIONS = ".decisions", ".registrations"
RECORD_TAG, DIGEST_TAG, SIGNATURE_TAG = "advtrain.record", "advtrain.record_digest", "advtrain.signature"
#: Tag of the model: number of records and digest of the last, to detect records deleted from the end.
ANCHOR_TAG, REGISTRATIONS_TAG = "advtrain.decisions", "advtrain.registrations"
#: Attempts to append a record. MLflow itself gives up after three collisions of version numbers.
ATTEMPTS = 12


@dataclass(frozen=True)
class Chain:
    """Audit log as read: valid records in order, and a message for each damage."""

    decisions: list[Decision]
    faults: list[str]
    registrations: list[Decision] = field(default_factory=list)

    @property
    def records(self) -> list[Decision]:
        """Registrations and decisions in the order of their times."""
        return sorted([*self.registrations, *self.decisions], key=lambda record: record.time)

    @property
    def heads(self) -> dict[str, str]:
        """Number of records and digest of the last, by the tag that holds them."""
        parts = {ANCHOR_TAG: self.decisions, REGISTRATIONS_TAG: self.registrations}
        return {tag: f"{len(part)} {part[-1].digest}" for tag, part in parts.items() if part}


class ConflictError(Exception):
    """Another writer appended first; read the log again before retrying."""


def log_name(name: str, suffix: str = SUFFIX) -> str:
    """Return the name of the registered model that stores the decisions about `name`."""
    return name + suffix


def read_chain(client: Any, name: str) -> Chain:
    """Read the audit log of a model; a damaged log is returned with its `faults`.

    If $ADVTRAIN_PUBLIC_KEY is set, a decision that moves an alias and is not signed with that key is a fault.
    """
    # Read first, so that an anchor is never newer than the records.
    tags = client.get_registered_model(name).tags
    registrations, first = _read(client, name, REGISTRATIONS, tags.get(REGISTRATIONS_TAG))
    decisions, second = _read(client, name, SUFFIX, tags.get(ANCHOR_TAG))
    key = public_key()
    third = [] if key is None else unsigned(decisions, key)
    return Chain(decisions, [f"registrations: {fault}" for fault in first] + second + third, registrations)


def _read(client: Any, name: str, suffix: str, anchor: str | None) -> tuple[list[Decision], list[str]]:
    """Return the valid records of one log, and a message for each damage."""
    entries = _entries(client, log_name(name, suffix))
    numbers = [number for number, *_ in entries]
    missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
    faults = [f"record {number} is missing" for number in missing]
    decisions: list[Decision] = []
    last = _genesis(name)
    seen = {last}
    for number, text, digest, signature in entries:
        decision = _parse(text, signature)
        if decision is None or decision.model != name or hashlib.sha256(text.encode()).hexdigest() != digest:
            faults.append(f"record {number} was altered: its text does not match its digest {digest[:12]}")
        elif decision.previous == last:
            if wrong := _contradiction(decision, decisions, suffix):
                faults.append(f"record {number} was not written by advtrain: {wrong}")
            decisions.append(decision)
            last = digest
        elif decision.previous not in seen:  # a record that lost a race follows an existing one
            faults.append(
                f"record {number} was altered or moved: its predecessor {decision.previous[:12]} is not before it"
            )
        seen.add(digest)
    if anchor is not None and not _holds(anchor, decisions):
        faults.append(f"records are missing from the end: there were {anchor.partition(' ')[0]} or more")
    return decisions, faults


def registration(chain: Chain, version: str) -> dict[str, Any]:
    """Return the recorded evidence on a version's files and origin; empty if there is none.

    A decision that moved an alias comes first, because it can be signed. Of registrations the first counts, so whoever
    may register cannot replace what was recorded. Other records, such as a request or a refusal, do not count.
    """
    moves = [record for record in reversed(chain.decisions) if record.kind in MOVES]
    before = [record for record in chain.decisions if record.kind == "registered"]  # logs of earlier versions
    for record in [*moves, *chain.registrations, *before]:
        if record.version == version and record.evidence.get("files_digest"):
            return record.evidence
    return {}


def _contradiction(decision: Decision, before: list[Decision], suffix: str) -> str:
    """Return why advtrain cannot have written this record; return "" if it can.

    Such a record has correct digests, but its content contradicts the records before it.
    """
    # Replay only for records that change the champion: most do not.
    standing = replay(before) if decision.kind in MOVES else Standing()
    if suffix == REGISTRATIONS and decision.kind != "registered":
        return f"it is a decision, '{decision.kind}', in the log of registrations"
    if decision.sequence != len(before) + 1:
        return f"its sequence number is {decision.sequence}, expected {len(before) + 1}"
    if decision.kind in MOVES and decision.champion != standing.champion:
        return f"it replaces champion {decision.champion}, but {standing.champion} was champion"
    if decision.kind == "allowed" and any(finding.verdict == "failed" for finding in decision.findings):
        return "it allows a promotion although a rule failed"
    if decision.kind == "rolled_back" and decision.version not in standing.past_champions:
        return f"it rolls back to version {decision.version}, which was never champion"
    try:
        datetime.fromisoformat(decision.time)
    except ValueError:
        return f"its time '{decision.time}' is not ISO 8601"
    return ""


def append(client: Any, name: str, draft: Draft, chain: Chain) -> Decision:
    """Append a record after the last one of its log in `chain`, signed if this process can.

    Raises:
        ConflictError: another writer appended first.
        UserError: the store rejects the record, or $ADVTRAIN_PUBLIC_KEY demands a signature that cannot be made.
    """
    registers = draft.kind == "registered"
    if draft.kind in MOVES and not can_sign(public_key()):
        raise UserError(
            f"a decision that moves an alias must be signed: set ${PRIVATE_KEY} to the private key that belongs to the "
            "public key"
        )
    before = chain.registrations if registers else chain.decisions
    last = before[-1].digest if before else _genesis(name)
    decision = Decision(
        kind=draft.kind,
        model=name,
        version=draft.version,
        champion=draft.champion,
        actor=actor(client.tracking_uri),
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        reason=draft.reason,
        policy=draft.policy,
        evidence=draft.evidence,
        sequence=len(before) + 1,
        previous=last,
        nonce=secrets.token_hex(8),
    )
    error: Exception | None = None
    for attempt in range(ATTEMPTS):
        try:
            _write(client, name, decision, draft.run_id)
        except Exception as raised:  # noqa: BLE001 (the record may be stored despite the error)
            error = raised
            time.sleep(random.uniform(0, 0.1 * (attempt + 1)))  # noqa: S311
        found = read_chain(client, name)
        present = found.registrations if registers else found.decisions
        if any(other.digest == decision.digest for other in present):
            return decision
        if (present[-1].digest if present else _genesis(name)) != last:
            raise ConflictError
    raise UserError(f"the decision about '{name}' cannot be recorded: {error}")


def require_whole(chain: Chain, name: str) -> None:
    """Raise a UserError if a record was altered or is missing."""
    if chain.faults:
        raise UserError(
            f"the audit log of '{name}' is damaged: {'; '.join(chain.faults)}; no decision is possible until "
            f"the registered model '{log_name(name)}' is restored from a backup"
        )


def _genesis(name: str) -> str:
    return hashlib.sha256(f"decisions about {name}".encode()).hexdigest()


def _parse(text: str, signature: str) -> Decision | None:
    try:
        decision = Decision.model_validate_json(text)
    except ValidationError:
        return None
    return None if decision.signature else decision.model_copy(update={"signature": signature})


def _entries(client: Any, log: str) -> list[tuple[int, str, str, str]]:
    """Return (number, text, digest, signature) of every stored record, sorted by number."""
    found, token = [], None
    while True:
        page = client.search_model_versions(
            named(log), max_results=1000, order_by=["version_number ASC"], page_token=token
        )
        found += [
            (int(v.version), *(v.tags.get(tag, "") for tag in (RECORD_TAG, DIGEST_TAG, SIGNATURE_TAG)))
            for v in page
        ]
        token = page.token
        if not token:
            return sorted(found)


def _write(client: Any, name: str, decision: Decision, run_id: str | None) -> None:
    tags = {RECORD_TAG: decision.text, DIGEST_TAG: decision.digest}
    if signature := sign(decision.text):
        tags[SIGNATURE_TAG] = signature
    log = log_name(name, REGISTRATIONS if decision.kind == "registered" else SUFFIX)
    if decision.sequence == 1:
        what = "registrations" if decision.kind == "registered" else "decisions"
        create_name(client, log, f"Audit log of the model {name}: its {what}. Do not change or delete it.")
    description = (
        f"{decision.kind}: version {decision.version}, by {decision.actor}. {decision.reason}".strip()
    )
    # The source of the log entry is its evidence: the report of the version.
    source = f"runs:/{run_id}/report" if run_id else f"models:/{name}/{decision.version}"
    client.create_model_version(log, source, run_id=run_id, tags=tags, description=description[:1000])


def named(name: str) -> str:
    """Return the MLflow filter for the versions of a registered model."""
    quote = '"' if "'" in name else "'"
    return f"name = {quote}{name}{quote}"


def require_model(name: str) -> None:
    """Raise a UserError if the name is reserved for an audit log."""
    if is_log(name):
        raise UserError(
            f"'{name}' holds decisions, not models; names that end in {SUFFIX} or {REGISTRATIONS} are reserved for "
            "audit logs"
        )


def is_log(name: str) -> bool:
    """Return whether a registered model stores an audit log."""
    return name.endswith((SUFFIX, REGISTRATIONS))


def create_model(client: Any, name: str, what: str) -> None:
    """Create a registered model if it does not exist, described by `what` and its logs."""
    create_name(client, name, f"{what} Audit logs: {name}{SUFFIX}, {name}{REGISTRATIONS}.")


def create_name(client: Any, name: str, description: str | None = None) -> None:
    """Create a registered model if it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _holds(anchor: str, decisions: list[Decision]) -> bool:
    count, _, digest = anchor.partition(" ")
    if not count.isdigit() or int(count) > len(decisions):
        return False
    return count == "0" or decisions[int(count) - 1].digest == digest
