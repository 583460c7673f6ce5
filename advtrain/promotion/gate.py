"""From findings to a decision on record: allowed only if the champion is still the one it was compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from advtrain.errors import UserError
from advtrain.promotion.rules import Case, Finding
from advtrain.registry import Chain, ConflictError, Decision, Draft, append, reconcile_aliases, replay


class LostRaceError(UserError):
    """Another decision made another version champion in the meantime."""

    def __init__(self, name: str, winner: Decision) -> None:
        super().__init__(
            f"version {winner.version} of '{name}' was made champion by {winner.actor} at {winner.time} while this was "
            "under way; ask again to be compared with it"
        )
        self.winner = winner


def put_on_record(client: Any, name: str, draft: Draft) -> Decision:
    """Add a decision that moves nothing, wherever the champion stands now."""
    return _record(client, name, draft, lambda chain: None)


def move_champion(client: Any, name: str, draft: Draft) -> Decision:
    """Make the draft's version champion, if `draft.champion` still is; the aliases follow.

    Raises:
        LostRaceError: it no longer is.
    """
    return _record(client, name, draft, lambda chain: _require_champion(name, chain, draft.champion))


def _record(client: Any, name: str, draft: Draft, require: Callable[[Chain], None]) -> Decision:
    """Add a decision to the record as it stands when it gets there, if `require` still takes it."""
    while True:
        chain, _ = reconcile_aliases(client, name)
        require(chain)
        try:
            decision = append(client, name, draft, chain)
        except ConflictError:  # by a refusal, perhaps, which changes nothing
            continue
        reconcile_aliases(client, name)
        return decision


def _require_champion(name: str, chain: Chain, champion: str | None) -> None:
    standing = replay(chain.decisions)
    if standing.champion != champion:
        assert standing.promoted_by is not None
        raise LostRaceError(name, standing.promoted_by)


def failed(findings: list[Finding]) -> list[str]:
    """Return the names of the rules that do not hold."""
    return [finding.rule for finding in findings if finding.verdict == "failed"]


def draft_of(
    case: Case, findings: list[Finding], champion: str | None, run_id: str | None, reason: str
) -> Draft:
    """Return what goes on record: allowed or refused, with all that was looked at."""
    evidence = {
        "rules": [finding.model_dump() for finding in findings],
        "challenger": case.challenger.summary(),
        "champion": case.champion.summary() if case.champion is not None else None,
        "files_digest": case.challenger.files_digest,
    }
    kind: Any = "refused" if failed(findings) else "allowed"
    return Draft(kind, case.challenger.version, champion, run_id, reason, case.policy.record(), evidence)
