"""Summary of a registered model: versions with aliases, accuracies and promotions."""

from __future__ import annotations

from datetime import datetime
from math import isfinite
from typing import Any

from advtrain.registry.aliases import CHAMPION, PREVIOUS
from advtrain.registry.audit_log import Chain
from advtrain.registry.decision import MOVES, Decision, replay
from advtrain.registry.versions import require_registered, versions


def versions_with_aliases(client: Any, name: str, chain: Chain) -> list[tuple[Any, list[str]]]:
    """Return (version, aliases), oldest first; champion and previous come from the audit log."""
    standing = replay(chain.decisions)
    aliases = dict(require_registered(client, name).aliases or {})
    if standing.champion is not None:
        aliases |= {CHAMPION: standing.champion, PREVIOUS: standing.previous}
    held: dict[str, list[str]] = {}
    for alias, number in aliases.items():
        held.setdefault(str(number), []).append(alias)
    return [(version, sorted(held.get(str(version.version), []))) for version in versions(client, name)]


def figures_of(version: Any, chain: Chain) -> dict[str, str]:
    """Return a version's tags, with the accuracies of a re-evaluation at its promotion if any."""
    tags = dict(version.tags)
    promoted_by = promotion_of(chain, str(version.version))
    judged = {} if promoted_by is None else promoted_by.evidence.get("challenger") or {}
    if judged.get("judged_anew"):
        found = judged["figures"]
        low, high = found["robust_accuracy_low"], found["robust_accuracy_high"]
        tags |= {f"advtrain.{kind}_accuracy": str(found[f"{kind}_accuracy"]) for kind in ("clean", "robust")}
        tags |= {"advtrain.robust_interval": f"[{low}, {high}]", "advtrain.suite": "re-evaluated"}
    return tags


def interval_of(tags: dict[str, str]) -> tuple[float, float] | None:
    """Return the 95 % interval of the robust accuracy; None if there is none."""
    parts = tags.get("advtrain.robust_interval", "").strip("[]").split(",")
    low, high = (number_of(part) for part in (parts if len(parts) == 2 else ("", "")))
    return None if low is None or high is None else (low, high)


def number_of(text: str | None) -> float | None:
    """Return the finite number in a tag; None if there is none.

    Anyone with write access can set tags to other text.
    """
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if isfinite(value) else None


def promotion_of(chain: Chain, version: str) -> Decision | None:
    """Return the latest decision that made a version champion; None if there is none."""
    _, decisions = chain.about(version)
    return next((d for d in reversed(decisions) if d.kind in MOVES), None)


def when(decision: Decision) -> str:
    """Return the time of a decision as text in UTC, to the second."""
    return datetime.fromisoformat(decision.time).strftime("%Y-%m-%d %H:%M:%S UTC")
