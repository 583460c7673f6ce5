"""A registered model at a glance: versions with aliases and figures, and when each was promoted."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from advtrain.registry.aliases import CHAMPION, PREVIOUS
from advtrain.registry.audit_log import MOVES, Chain, Decision, replay
from advtrain.registry.versions import require_registered, versions


def versions_with_aliases(client: Any, name: str, chain: Chain) -> list[tuple[Any, list[str]]]:
    """Return each version of a model with its aliases, the oldest first; champion and previous are the record's."""
    standing = replay(chain.decisions)
    aliases = dict(require_registered(client, name).aliases or {})
    if standing.champion is not None:
        aliases |= {CHAMPION: standing.champion, PREVIOUS: standing.previous}
    held: dict[str, list[str]] = {}
    for alias, number in aliases.items():
        held.setdefault(str(number), []).append(alias)
    return [(version, sorted(held.get(str(version.version), []))) for version in versions(client, name)]


def figures_of(version: Any, chain: Chain) -> dict[str, str]:
    """Return a version's tags, with the figures that it was promoted on where it was judged anew for that."""
    tags = dict(version.tags)
    promoted_by = promotion_of(chain, str(version.version))
    judged = {} if promoted_by is None else promoted_by.evidence.get("challenger") or {}
    if judged.get("judged_anew"):
        found = judged["figures"]
        low, high = found["robust_accuracy_low"], found["robust_accuracy_high"]
        tags |= {f"advtrain.{kind}_accuracy": str(found[f"{kind}_accuracy"]) for kind in ("clean", "robust")}
        tags |= {"advtrain.robust_interval": f"[{low}, {high}]", "advtrain.suite": "judged anew"}
    return tags


def interval_of(tags: dict[str, str]) -> tuple[float, float] | None:
    """Return the 95 % interval of the robust accuracy; None where it is not known."""
    text = tags.get("advtrain.robust_interval", "")
    if not text:
        return None
    low, high = (float(part) for part in text.strip("[]").split(","))
    return low, high


def promotion_of(chain: Chain, version: str) -> Decision | None:
    """Return the decision by which a version became champion last; None if it never was."""
    found = [d for d in chain.decisions if d.version == version and d.kind in MOVES]
    return found[-1] if found else None


def when(decision: Decision) -> str:
    """Return the time of a decision, to the second, in UTC."""
    return datetime.fromisoformat(decision.time).strftime("%Y-%m-%d %H:%M:%S UTC")
