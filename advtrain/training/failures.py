"""Attempts of a run: failures, version mismatches and stragglers.

On a cluster workers die, and nodes leave and join. Each worker group is one attempt. Its rank 0 adds a line to the run
folder's attempts.jsonl. The controller of Ray Train writes what ended the previous attempt to interruption.json.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from advtrain.environment import code_digest, library_versions
from advtrain.runs.folder import RunFolder

#: A rank is a straggler if its attacks exceed the median rank's by this factor and by so many seconds per epoch.
STRAGGLER_RATIO, STRAGGLER_S = 1.5, 1.0


def begin_attempt(run: RunFolder, nodes: list[str], alive: list[str], step: int) -> list[str]:
    """Record on rank 0 that an attempt starts at `step`; return messages for the user.

    Args:
        nodes: node of each rank.
        alive: nodes of the cluster that are alive.
    """
    before = run.attempts()
    cause = run.take_interruption() if before else ""
    if gone := sorted(set(before[-1]["nodes"]) - set(alive)) if before and cause else []:
        cause += f"; gone from the cluster: {', '.join(gone)}"
    run.append_attempt({"step": step, "workers": len(nodes), "nodes": nodes, "cause": cause})
    if not before:
        return []
    where = f"resumed from step {step} with {len(nodes)} worker{'s' if len(nodes) > 1 else ''}"
    if len(nodes) != before[-1]["workers"]:
        where += f" instead of {before[-1]['workers']}"
        cause = cause or "the cluster changed"
    return [f"{cause}; {where}"] if cause else []


@dataclass(frozen=True)
class Failure:
    """Failure that ended a rank."""

    kind: Literal["died", "timeout", "connection_lost", "error"]
    message: str  # continues a sentence that starts with the rank


#: Name of advtrain's own source among the versions.
SOURCE = "advtrain's source"
#: Failure kinds, causes before consequences: peers of a dead rank lose their connection to it.
_CAUSES_FIRST = ("died", "error", "connection_lost", "timeout")


def describe_failures(failures: dict[int, Failure], nodes: list[str]) -> str:
    """Return one line about the failure that ended an attempt and caused the others.

    Args:
        failures: failure of each failed rank.
        nodes: the node of each rank.
    """
    rank = min(failures, key=lambda rank: (_CAUSES_FIRST.index(failures[rank].kind), rank))
    place = f" on {nodes[rank]}" if rank < len(nodes) else ""
    return f"rank {rank}{place} {failures[rank].message}"


def versions_here(model: str = "") -> dict[str, str]:
    """Return the versions that must match on all nodes; for `model` see `library_versions`."""
    return library_versions(model) | {SOURCE: code_digest()}


def version_mismatch(expected: dict[str, str], ranks: list[dict[str, str]], nodes: list[str]) -> str:
    """Return how the ranks' versions differ from those of the command; "" if they match.

    Different versions silently give different results, or fail much later.
    """
    differences = [
        f"{name} is {theirs.get(name)} on {nodes[rank]} (rank {rank}), but {version} where the command runs"
        for rank, theirs in enumerate(ranks)
        for name, version in expected.items()
        if theirs.get(name) != version
    ]
    return f"{'; '.join(differences[:4])}; install the same versions on every node" if differences else ""


def straggler(seconds: list[float], nodes: list[str], epoch: int) -> str:
    """Return a message about the rank that the others wait for; "" if there is none.

    Args:
        seconds: time that each rank spent in attacks in this epoch. Attacks do not communicate, so a long time is
            caused by the rank itself. The other ranks wait for it in the next all-reduce.
    """
    typical, slowest = statistics.median_low(seconds), max(seconds)
    if slowest <= STRAGGLER_RATIO * typical or slowest - typical <= STRAGGLER_S:
        return ""
    rank = seconds.index(slowest)
    return (
        f"rank {rank} on {nodes[rank]} is a straggler: its attacks took {slowest:.1f} s in epoch {epoch}, the median "
        f"rank's {typical:.1f} s, and the others wait for it"
    )
