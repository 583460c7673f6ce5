"""What a person sees of the registry: versions with their figures, and every decision with its evidence."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from advtrain.registry import (
    CHAMPION,
    MOVES,
    PREVIOUS,
    Chain,
    Decision,
    read_chain,
    reconcile_aliases,
    registered_names,
    replay,
    versions,
)
from advtrain.tracking.store import open_client, store_errors
from pipelines.console import console, table
from pipelines.promote import known
from pipelines.train import FAILED
from pipelines.workspace import Workspace

COLUMNS = [
    "version",
    "aliases",
    "clean, %",
    "robust, %  [95 % interval]",
    "suite",
    "threat",
    "trust",
    "made champion",
]


def models(name: str | None, workspace: Workspace) -> int:
    """Print the versions of one model, or of all."""
    client = open_client(workspace.tracking_uri, must_exist=True)
    with store_errors(workspace.tracking_uri):
        names = registered_names(client)
    if name is not None:
        known(client, name)
        names = [name]
    if not names:
        console.print(
            f"no model is registered at {workspace.tracking_uri}; `advtrain train digits` makes one"
        )
    for each in names:
        chain = _settled(client, each)
        table(
            each,
            COLUMNS,
            [row(version, aliases, chain) for version, aliases in seats(client, each, chain)],
            fold=True,
        )
    return 0


def seats(client: Any, name: str, chain: Chain) -> list[tuple[Any, list[str]]]:
    """Return each version of a model with its aliases, the oldest first; champion and previous are the record's."""
    standing = replay(chain.decisions)
    aliases = dict(known(client, name).aliases or {})
    if standing.champion is not None:
        aliases |= {CHAMPION: standing.champion, PREVIOUS: standing.previous}
    held: dict[str, list[str]] = {}
    for alias, number in aliases.items():
        held.setdefault(str(number), []).append(alias)
    return [(version, sorted(held.get(str(version.version), []))) for version in versions(client, name)]


def row(version: Any, aliases: list[str], chain: Chain) -> list[str]:
    """Return a version's line."""
    tags, number = figures_of(version, chain), str(version.version)
    figures = [_percent(tags.get(f"advtrain.{kind}_accuracy")) for kind in ("clean", "robust")]
    if (interval := interval_of(tags)) is not None:
        figures[1] += f"  [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"
    promoted_by = promotion_of(chain, number)
    since = f"{when(promoted_by)} by {promoted_by.actor}" if promoted_by is not None else ""
    rest = [tags.get(f"advtrain.{tag}", "-") for tag in ("suite", "threat", "trust")]
    return [number, ", ".join(aliases), *figures, *rest, since]


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


def history(name: str, workspace: Workspace, *, verify: bool) -> int:
    """Print the decisions; with `verify` only whether their record is whole."""
    client = open_client(workspace.tracking_uri, must_exist=True)
    known(client, name)
    chain = read_chain(client, name) if verify else _settled(client, name)
    if verify:
        for fault in chain.faults:
            console.print(fault, style="red")
        total = len(chain.decisions)
        if not chain.faults:
            head = f", the last with digest {chain.decisions[-1].digest[:16]}" if total else ""
            console.print(f"the record of '{name}' is whole: {total} decisions{head}")
        return FAILED if chain.faults else 0
    for decision in chain.decisions:
        _print_decision(decision)
    standing = replay(chain.decisions)
    console.print(
        f"champion: {standing.champion or 'none'}; a rollback leads to: {standing.previous or 'none'}"
    )
    return 0


def _print_decision(decision: Decision) -> None:
    before = f", champion before: {decision.champion}" if decision.champion else ""
    policy = decision.policy
    under = f", policy {policy['name']} {policy['version']} ({policy['digest'][:10]})" if policy else ""
    style = {"refused": "red", "allowed": "green", "rolled_back": "yellow"}.get(decision.kind, "")
    console.print(
        f"{decision.sequence}. {decision.kind.replace('_', ' ')}: version {decision.version}", style=style
    )
    console.print(f"   {when(decision)} by {decision.actor}{before}{under}", markup=False)
    if decision.reason:
        console.print(f"   reason: {decision.reason}", markup=False)
    for finding in decision.evidence.get("rules", []):
        if finding["verdict"] != "skipped":
            line = (
                f"   {finding['verdict']:7} {finding['rule']}: {finding['figures']} ({finding['threshold']})"
            )
            console.print(line, markup=False, style="red" if finding["verdict"] == "failed" else "dim")


def when(decision: Decision) -> str:
    """Return the time of a decision, to the second, in UTC."""
    return datetime.fromisoformat(decision.time).strftime("%Y-%m-%d %H:%M:%S UTC")


def _settled(client: Any, name: str) -> Chain:
    """Put aliases right, and return the record. One that is not whole is shown as far as it goes."""
    chain = read_chain(client, name)
    if chain.faults:
        console.print(f"the record of '{name}' is not whole: {'; '.join(chain.faults)}", style="red")
        return chain
    chain, notes = reconcile_aliases(client, name)
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    return chain


def _percent(share: str | None) -> str:
    return "-" if share is None else f"{100 * float(share):.2f}"
