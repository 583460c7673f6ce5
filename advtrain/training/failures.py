"""The attempts of a run: what each began with, what ended the one before, which rank holds the others up.

A run on a cluster is interrupted: workers die, nodes leave and join. Each worker group is one attempt. Its rank 0
adds a line to the run folder's attempts.jsonl; what ended the attempt before is in interruption.json, which the
controller of Ray Train writes when it notices.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from advtrain.environment import code_digest, library_versions
from advtrain.runs.folder import RunFolder

#: A rank is a straggler if its attacks take so much longer than the median rank's, in share and in seconds an epoch.
STRAGGLER_RATIO, STRAGGLER_S = 1.5, 1.0


def begin_attempt(run: RunFolder, nodes: list[str], alive: list[str], step: int) -> list[str]:
    """Note down, on rank 0, that an attempt begins at `step`; return what the user should know about it.

    Args:
        nodes: of each rank.
        alive: of the cluster.
    """
    before = run.attempts()
    cause = run.take_interruption() if before else ""
    if gone := sorted(set(before[-1]["nodes"]) - set(alive)) if before and cause else []:
        cause += f"; gone from the cluster: {', '.join(gone)}"
    run.append_attempt({"step": step, "workers": len(nodes), "nodes": nodes, "cause": cause})
    if not before:
        return []
    where = f"went on from step {step} with {len(nodes)} worker{'s' if len(nodes) > 1 else ''}"
    if len(nodes) != before[-1]["workers"]:
        where += f", {before[-1]['workers']} before"
        cause = cause or "the cluster changed"
    return [f"{cause}; {where}"] if cause else []


@dataclass(frozen=True)
class Failure:
    """What ended a rank."""

    kind: Literal["died", "timeout", "connection_lost", "error"]
    message: str  # the end of a sentence that begins with the rank


#: Kinds from the cause to its consequences: a rank that died makes its peers lose it.
_CAUSES_FIRST = ("died", "error", "connection_lost", "timeout")


def describe_failures(failures: dict[int, Failure], nodes: list[str]) -> str:
    """Return one line on what ended an attempt: the failure that caused the others.

    Args:
        failures: by rank.
        nodes: the node of each rank.
    """
    rank = min(failures, key=lambda rank: (_CAUSES_FIRST.index(failures[rank].kind), rank))
    place = f" on {nodes[rank]}" if rank < len(nodes) else ""
    return f"rank {rank}{place} {failures[rank].message}"


def versions_here() -> dict[str, str]:
    """Return what must be the same on all ranks: Python, the libraries, this library's own source."""
    return library_versions() | {"advtrain's source": code_digest()}


def version_mismatch(expected: dict[str, str], ranks: list[dict[str, str]], nodes: list[str]) -> str:
    """Return how ranks' libraries differ from those of the command that started them; "" if they do not.

    Other versions give other results without a word, or fail much later.
    """
    differences = [
        f"{name} is {theirs.get(name)} on {nodes[rank]} (rank {rank}), but {version} where the command runs"
        for rank, theirs in enumerate(ranks)
        for name, version in expected.items()
        if theirs.get(name) != version
    ]
    return f"{'; '.join(differences[:4])}; install the same on every node" if differences else ""


def straggler(seconds: list[float], nodes: list[str], epoch: int) -> str:
    """Return a remark on the rank that the others wait for; "" if there is none.

    Args:
        seconds: of each rank, spent in attacks in this epoch. Attacks do not communicate, so a long time is caused by
            the rank itself. The other ranks wait for it in the next all-reduce.
    """
    typical, slowest = statistics.median_low(seconds), max(seconds)
    if slowest <= STRAGGLER_RATIO * typical or slowest - typical <= STRAGGLER_S:
        return ""
    rank = seconds.index(slowest)
    return (
        f"rank {rank} on {nodes[rank]} is a straggler: its attacks took {slowest:.1f} s in epoch {epoch}, the median "
        f"rank's {typical:.1f} s, and the others wait for it"
    )
