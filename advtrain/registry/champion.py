"""Who is champion: what the record of decisions says, and the aliases that follow it.

`champion` is the version that serves, `previous` the one that a rollback leads to, `challenger` the newest that asks
to be promoted. The first two are the record's; an alias that says otherwise, after a kill or because a person moved it,
is put right by the next command.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from advtrain.evaluation import AnyReport, Report
from advtrain.registry.archive import FILES_DIGEST_TAG
from advtrain.registry.decisions import (
    ANCHOR_TAG,
    MOVES,
    Chain,
    Decision,
    Draft,
    OvertakenError,
    append,
    read_chain,
    require_whole,
)

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"


@dataclass(frozen=True)
class Standing:
    """What the decisions come to."""

    champion: str | None = None
    previous: str | None = None
    crowned: Decision | None = None  # the record that made it champion
    reigns: tuple[str, ...] = ()  # every version that ever was


def replay(chain: Chain) -> Standing:
    """Return what the decisions come to, one after another."""
    line: list[str] = []  # champions, the present one last; a rollback shortens it
    crowned, reigns = None, []
    for decision in chain.decisions:
        if decision.kind not in MOVES:
            continue
        version = decision.version
        if decision.kind == "rolled_back" and version in line:
            line = line[: line.index(version) + 1]
        elif not line or line[-1] != version:
            line = [*(v for v in line if v != version), version]
        crowned = decision
        reigns.append(version)
    return Standing(line[-1] if line else None, line[-2] if len(line) > 1 else None, crowned, tuple(reigns))


def settle(client: Any, name: str) -> tuple[Chain, list[str]]:
    """Make the aliases say what the record says; return the record, and a line for each alias put right.

    A champion from before there was a record is put on it as it stands.

    Raises:
        UserError: the record is not whole, or its champion is gone from the registry.
    """
    notes: list[str] = []
    while True:
        chain = read_chain(client, name)
        require_whole(chain, name)
        model = client.get_registered_model(name)
        aliases = {alias: str(version) for alias, version in (model.aliases or {}).items()}
        if not chain.decisions and CHAMPION in aliases:
            _adopt(client, name, aliases[CHAMPION], chain)
            continue
        standing = replay(chain)
        for alias, wanted in ((CHAMPION, standing.champion), (PREVIOUS, standing.previous)):
            if aliases.get(alias) != wanted:
                notes.append(_put_right(client, name, alias, aliases.get(alias), wanted))
        if standing.champion is not None and aliases.get(CHALLENGER) == standing.champion:
            _point(client, name, CHALLENGER, None)
        if chain.decisions and model.tags.get(ANCHOR_TAG) != chain.head:
            client.set_registered_model_tag(name, ANCHOR_TAG, chain.head)
        # Somebody may have decided since the record was read, and pointed the aliases before this did.
        if read_chain(client, name).head == chain.head:
            return chain, notes


def _take_vacant(client: Any, name: str, draft: Draft) -> bool:
    """Make the draft's version champion if there never was one; return whether it is champion."""
    while True:
        chain, _ = settle(client, name)
        standing = replay(chain)
        if standing.champion is not None:
            return standing.champion == draft.version
        try:
            append(client, name, draft, chain)
        except OvertakenError:
            continue
        settle(client, name)
        return True


def seat(client: Any, name: str, version: str, report: AnyReport) -> bool:
    """Make a new version champion where there never was one, else challenger; return whether it is champion.

    One whose figure is not to be trusted becomes neither; nor does one that was registered again by a resumed job while
    a newer one waits.
    """
    if isinstance(report, Report) and report.trust == "broken":
        return False
    made = client.get_model_version(name, version)
    evidence = {"report": report.tags, "files_digest": made.tags.get(FILES_DIGEST_TAG)}
    draft = Draft("first", version, None, made.run_id, "the first to be registered", evidence=evidence)
    if _take_vacant(client, name, draft):
        return True
    newest = max(int(v.version) for v in client.search_model_versions(f"name = '{name}'", max_results=1000))
    if int(version) == newest and version not in replay(read_chain(client, name)).reigns:
        _point(client, name, CHALLENGER, version)
    return False


def _adopt(client: Any, name: str, version: str, chain: Chain) -> None:
    run_id = client.get_model_version(name, version).run_id
    reason = "champion when the record began"
    try:
        append(client, name, Draft("adopted", version, None, run_id, reason), chain)
    except OvertakenError:
        return


def _put_right(client: Any, name: str, alias: str, was: str | None, wanted: str | None) -> str:
    from mlflow.exceptions import MlflowException

    try:
        _point(client, name, alias, wanted)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return (
            f"version {wanted} of '{name}', {alias} by the record, is gone from the registry; "
            f"`advtrain rollback {name} --to V --reason TEXT` names another"
        )
    return f"alias {alias} was at {was or 'no version'}, and is at {wanted or 'none'} again"


def _point(client: Any, name: str, alias: str, version: str | None) -> None:
    if version is None:
        client.delete_registered_model_alias(name, alias)
    else:
        client.set_registered_model_alias(name, alias, version)
