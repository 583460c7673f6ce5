"""Records of one audit log as stored: their order, their digests, and what contradicts them."""

from __future__ import annotations

import hashlib
from copy import copy
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from advtrain.registry.decision import MOVES, Decision, Replay
from advtrain.registry.signing import unsigned

#: Logs of a model: decisions, which the gate writes, and registrations, which whoever trains may write.
SUFFIX, REGISTRATIONS = ".decisions", ".registrations"
RECORD_TAG, DIGEST_TAG, SIGNATURE_TAG = "advtrain.record", "advtrain.record_digest", "advtrain.signature"
#: Most records of an answer of the store: of a whole log, and of the records since the last read.
PAGE, NEW_PAGE = 1000, 20


class StoredLog:
    """Checked records of one log, and the state against which the next record is checked.

    Attributes:
        decisions: valid records in order.
        faults: a message for each damage.
    """

    def __init__(self, model: str, suffix: str) -> None:
        self.model, self.suffix = model, suffix
        self.decisions: list[Decision] = []
        self.faults: list[str] = []
        self._number = 0  # of the last record that was read
        self._last = genesis(model)
        self._seen = {self._last}
        self._replay = Replay()
        self._verified: tuple[bytes, int, list[str]] = (
            b"",
            0,
            [],
        )  # see `unsigned`: key, decisions, messages

    def extended(self, client: Any) -> StoredLog:
        """Return a log with the records that were added since the last read; check only those."""
        entries = _entries(client, self.model + self.suffix, self._number)
        if not entries:
            return self
        found = copy(self)
        found.decisions, found.faults = list(self.decisions), list(self.faults)
        found._seen, found._replay = set(self._seen), self._replay.copy()
        numbers = {number for number, *_ in entries}
        missing = [n for n in range(self._number + 1, max(numbers) + 1) if n not in numbers]
        found.faults += [f"record {number} is missing" for number in missing]
        found._number = max(numbers)
        for entry in entries:
            found._check(*entry)
        return found

    def _check(self, number: int, text: str, digest: str, signature: str) -> None:
        """Add a record if it is valid; otherwise add a fault, or nothing if it lost a race."""
        decision = _parse(text, signature)
        if (
            decision is None
            or decision.model != self.model
            or hashlib.sha256(text.encode()).hexdigest() != digest
        ):
            self.faults.append(
                f"record {number} was altered: its text does not match its digest {digest[:12]}"
            )
        elif decision.previous == self._last:
            if wrong := self._contradiction(decision):
                self.faults.append(f"record {number} was not written by advtrain: {wrong}")
            self.decisions.append(decision)
            self._replay.apply(decision)
            self._last = digest
        elif decision.previous not in self._seen:  # a record that lost a race follows an existing one
            self.faults.append(
                f"record {number} was altered or moved: its predecessor {decision.previous[:12]} is not before it"
            )
        self._seen.add(digest)

    def _contradiction(self, decision: Decision) -> str:
        """Return why advtrain cannot have written this record; return "" if it can.

        Such a record has correct digests, but its content contradicts the records before it.
        """
        champion = self._replay.champion
        if self.suffix == REGISTRATIONS and decision.kind != "registered":
            return f"it is a decision, '{decision.kind}', in the log of registrations"
        if decision.sequence != len(self.decisions) + 1:
            return f"its sequence number is {decision.sequence}, expected {len(self.decisions) + 1}"
        if decision.kind in MOVES and decision.champion != champion:
            return f"it replaces champion {decision.champion}, but {champion} was champion"
        if decision.kind == "allowed" and any(finding.verdict == "failed" for finding in decision.findings):
            return "it allows a promotion although a rule failed"
        if decision.kind == "rolled_back" and not self._replay.was_champion(decision.version):
            return f"it rolls back to version {decision.version}, which was never champion"
        try:
            datetime.fromisoformat(decision.time)
        except ValueError:
            return f"its time '{decision.time}' is not ISO 8601"
        return ""

    def all_faults(self, anchor: str | None) -> list[str]:
        """Return the faults, and one more if records are missing from the end.

        Args:
            anchor: number of records and digest of the last, as the registered model has it; None: unknown.
        """
        if anchor is None or self._holds(anchor):
            return self.faults
        there = anchor.partition(" ")[0]
        return [*self.faults, f"records are missing from the end: there were {there} or more"]

    def unsigned(self, key: Ed25519PublicKey) -> list[str]:
        """Return a message for each decision that must be signed and is not; verify each once."""
        raw = key.public_bytes_raw()
        known, count, messages = self._verified
        if known != raw:
            count, messages = 0, []
        messages = [*messages, *unsigned(self.decisions[count:], key)]
        self._verified = raw, len(self.decisions), messages
        return messages

    def _holds(self, anchor: str) -> bool:
        count, _, digest = anchor.partition(" ")
        if not count.isdigit() or int(count) > len(self.decisions):
            return False
        return count == "0" or self.decisions[int(count) - 1].digest == digest


def genesis(name: str) -> str:
    """Return the digest that precedes the first record of each log of a model."""
    return hashlib.sha256(f"decisions about {name}".encode()).hexdigest()


def named(name: str) -> str:
    """Return the MLflow filter for the versions of a registered model."""
    quote = '"' if "'" in name else "'"
    return f"name = {quote}{name}{quote}"


def _parse(text: str, signature: str) -> Decision | None:
    try:
        decision = Decision.model_validate_json(text)
    except ValidationError:
        return None
    return None if decision.signature else decision.model_copy(update={"signature": signature})


def _entries(client: Any, log: str, after: int) -> list[tuple[int, str, str, str]]:
    """Return (number, text, digest, signature) of every record with a number above `after`, sorted."""
    found: dict[int, tuple[int, str, str, str]] = {}
    size, order = (PAGE, "ASC") if after == 0 else (NEW_PAGE, "DESC")
    token = None
    while True:
        page = client.search_model_versions(
            named(log), max_results=size, order_by=[f"version_number {order}"], page_token=token
        )
        for v in page:
            tags = (v.tags.get(tag, "") for tag in (RECORD_TAG, DIGEST_TAG, SIGNATURE_TAG))
            text, digest, signature = tags
            found[int(v.version)] = (int(v.version), text, digest, signature)
        token = page.token
        if not token or (after and min(found) <= after):
            return [found[number] for number in sorted(found) if number > after]
