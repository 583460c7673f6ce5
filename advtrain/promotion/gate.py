"""Record promotion decisions; reject one if the champion has changed in the meantime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from advtrain.errors import UserError
from advtrain.promotion.comparison import Case
from advtrain.registry import (
    Chain,
    ConflictError,
    Decision,
    Draft,
    Finding,
    append,
    reconcile_aliases,
    replay,
)


class LostRaceError(UserError):
    """Another version became champion in the meantime."""

    def __init__(self, name: str, winner: Decision) -> None:
        super().__init__(
            f"version {winner.version} of '{name}' was made champion by {winner.actor} at {winner.time} in the "
            "meantime; run the promotion again to compare with it"
        )
        self.winner = winner


def put_on_record(client: Any, name: str, draft: Draft) -> Decision:
    """Record a decision that does not change the champion."""
    return _record(client, name, draft, lambda chain: None)


def move_champion(client: Any, name: str, draft: Draft) -> Decision:
    """Record a promotion or rollback: make the draft's version champion.

    The MLflow aliases are then set from the audit log.

    Raises:
        LostRaceError: `draft.champion` is not champion any more; nothing is recorded.
    """
    return _record(client, name, draft, lambda chain: _require_champion(name, chain, draft.champion))


def _record(client: Any, name: str, draft: Draft, require: Callable[[Chain], None]) -> Decision:
    """Append a decision to the current audit log; `require` checks the log before each attempt."""
    while True:
        chain, _ = reconcile_aliases(client, name)
        require(chain)
        try:
            decision = append(client, name, draft, chain)
        except ConflictError:  # retry: the other writer may have left the champion unchanged
            continue
        reconcile_aliases(client, name, after=chain)
        return decision


def _require_champion(name: str, chain: Chain, champion: str | None) -> None:
    standing = replay(chain.decisions)
    if standing.champion != champion:
        assert standing.promoted_by is not None
        raise LostRaceError(name, standing.promoted_by)


def failed(findings: list[Finding]) -> list[str]:
    """Return the names of the rules that failed."""
    return [finding.rule for finding in findings if finding.verdict == "failed"]


def draft_of(
    case: Case, findings: list[Finding], champion: str | None, run_id: str | None, reason: str
) -> Draft:
    """Return the decision to record, allowed or refused, with its evidence."""
    evidence = {
        "rules": [finding.model_dump() for finding in findings],
        "challenger": case.challenger.summary(),
        "champion": case.champion.summary() if case.champion is not None else None,
        "files_digest": case.challenger.files_digest,
    }
    kind: Any = "refused" if failed(findings) else "allowed"
    return Draft(kind, case.challenger.version, champion, run_id, reason, case.policy.record(), evidence)
