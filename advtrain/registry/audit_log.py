"""Audit log of a registered model: an append-only hash chain for concurrent writers.

MLflow aliases have no compare-and-set, but version numbers are assigned atomically, on SQLite and on a server. So each
decision about `digits` is a version of the registered model `digits.decisions`, with its record as a tag. The version
numbers give one order for all readers. A record contains the digest of the last record that its writer read. It is
valid only if no other valid record was added in between. Otherwise another writer was faster, and the record is void.
This is a compare-and-set without a lock, so a writer that crashes leaves nothing to clean up.

The aliases follow the log (`aliases.py`).
"""

from __future__ import annotations

import random
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from advtrain.errors import UserError
from advtrain.registry.decision import MOVES, Decision, Draft
from advtrain.registry.signing import PRIVATE_KEY, can_sign, public_key, sign
from advtrain.registry.stored_log import (
    DIGEST_TAG,
    RECORD_TAG,
    REGISTRATIONS,
    SIGNATURE_TAG,
    SUFFIX,
    StoredLog,
    genesis,
)
from advtrain.tracking.store import actor

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
    logs: tuple[StoredLog, StoredLog] | None = field(default=None, repr=False, compare=False)

    @property
    def records(self) -> list[Decision]:
        """Registrations and decisions in the order of their times."""
        return sorted([*self.registrations, *self.decisions], key=lambda record: record.time)

    @property
    def heads(self) -> dict[str, str]:
        """Number of records and digest of the last, by the tag that holds them."""
        parts = {ANCHOR_TAG: self.decisions, REGISTRATIONS_TAG: self.registrations}
        return {tag: f"{len(part)} {part[-1].digest}" for tag, part in parts.items() if part}

    def about(self, version: str) -> tuple[list[Decision], list[Decision]]:
        """Return the registrations of a version, and the decisions about it."""
        registrations, decisions = self._by_version
        return registrations.get(version, []), decisions.get(version, [])

    @cached_property
    def _by_version(self) -> tuple[dict[str, list[Decision]], dict[str, list[Decision]]]:
        found: tuple[dict[str, list[Decision]], dict[str, list[Decision]]] = ({}, {})
        for by_version, part in zip(found, (self.registrations, self.decisions), strict=True):
            for record in part:
                by_version.setdefault(record.version, []).append(record)
        return found


class ConflictError(Exception):
    """Another writer appended first; read the log again before retrying."""


def log_name(name: str, suffix: str = SUFFIX) -> str:
    """Return the name of the registered model that stores the decisions about `name`."""
    return name + suffix


def read_chain(client: Any, name: str, after: Chain | None = None) -> Chain:
    """Read the audit log of a model; a damaged log is returned with its `faults`.

    If $ADVTRAIN_PUBLIC_KEY is set, a decision that moves an alias and is not signed with that key is a fault.

    Args:
        client: client of the store.
        name: name of the model.
        after: what the same command read before; only records that were added since are read and checked. None: the
            whole log is read and checked, which every command must do once: an old record may have been altered.
    """
    # Read first, so that an anchor is never newer than the records.
    tags = client.get_registered_model(name).tags
    logs = after.logs if after is not None else None
    before = logs or (StoredLog(name, REGISTRATIONS), StoredLog(name, SUFFIX))
    registrations, decisions = (log.extended(client) for log in before)
    faults = [f"registrations: {fault}" for fault in registrations.all_faults(tags.get(REGISTRATIONS_TAG))]
    faults += decisions.all_faults(tags.get(ANCHOR_TAG))
    key = public_key()
    faults += [] if key is None else decisions.unsigned(key)
    return Chain(decisions.decisions, faults, registrations.decisions, (registrations, decisions))


def registration(chain: Chain, version: str) -> dict[str, Any]:
    """Return the recorded evidence on a version's files and origin; empty if there is none.

    A decision that moved an alias comes first, because it can be signed. Of registrations the first counts, so whoever
    may register cannot replace what was recorded. Other records, such as a request or a refusal, do not count.
    """
    registrations, decisions = chain.about(version)
    moves = [record for record in reversed(decisions) if record.kind in MOVES]
    before = [record for record in decisions if record.kind == "registered"]  # logs of earlier versions
    for record in [*moves, *registrations, *before]:
        if record.evidence.get("files_digest"):
            return record.evidence
    return {}


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
    last = before[-1].digest if before else genesis(name)
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
        found = read_chain(client, name, chain)
        present = found.registrations if registers else found.decisions
        if any(other.digest == decision.digest for other in present[len(before) :]):
            return decision
        if (present[-1].digest if present else genesis(name)) != last:
            raise ConflictError
    raise UserError(f"the decision about '{name}' cannot be recorded: {error}")


def require_whole(chain: Chain, name: str) -> None:
    """Raise a UserError if a record was altered or is missing."""
    if chain.faults:
        raise UserError(
            f"the audit log of '{name}' is damaged: {'; '.join(chain.faults)}; no decision is possible until "
            f"the registered model '{log_name(name)}' is restored from a backup"
        )


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
