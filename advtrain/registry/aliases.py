"""Who is champion: the aliases follow the record of decisions.

`champion` is the version that serves, `previous` the one that a rollback leads to, `challenger` the newest that asks
to be promoted. The first two are the record's; an alias that says otherwise, after a kill or because a person moved it,
is put right by the next command.
"""

from __future__ import annotations

import time
from typing import Any

from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, Report
from advtrain.registry.audit_log import (
    ANCHOR_TAG,
    Chain,
    ConflictError,
    Draft,
    Kind,
    append,
    named,
    read_chain,
    registration,
    replay,
    require_model,
    require_whole,
)
from advtrain.registry.export import FILES_DIGEST_TAG

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
#: Attempts where another writer collides with the same alias.
ATTEMPTS = 8


def reconcile_aliases(client: Any, name: str, *, adopt: bool = False) -> tuple[Chain, list[str]]:
    """Make the aliases say what the record says; return the record, and a line for each alias put right.

    Where the record knows of no champion the aliases are left as they are.

    Args:
        adopt: whether a champion from before there was a record is put on it as it stands.

    Raises:
        UserError: the record is not whole; with `adopt`, a champion that advtrain did not register.
    """
    from mlflow.exceptions import MlflowException

    notes: list[str] = []
    for attempt in range(ATTEMPTS):
        try:
            chain = _reconcile_once(client, name, adopt, notes)
        except MlflowException:  # another writer made the same alias or tag first
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.05 * (attempt + 1))
            continue
        if chain is not None:
            return chain, notes
    return read_chain(client, name), notes


def _reconcile_once(client: Any, name: str, adopt: bool, notes: list[str]) -> Chain | None:
    """Do it once; return None if somebody decided in the meantime, and may have pointed the aliases before this did."""
    chain = read_chain(client, name)
    require_whole(chain, name)
    model = client.get_registered_model(name)
    aliases = {alias: str(version) for alias, version in (model.aliases or {}).items()}
    standing = replay(chain.decisions)
    if standing.champion is None and CHAMPION in aliases and adopt:
        _adopt(client, name, aliases[CHAMPION], chain)
        return None
    if standing.champion is not None:
        for alias, wanted in ((CHAMPION, standing.champion), (PREVIOUS, standing.previous)):
            if aliases.get(alias) == wanted:
                continue
            if wanted is not None and find_recorded(client, name, wanted, chain) is None:
                notes.append(
                    f"version {wanted} of '{name}', {alias} by the record, is gone from the registry or another one "
                    f"has its number; `advtrain promote` and `advtrain rollback {name} --to V` name another"
                )
                continue
            notes.append(
                f"alias {alias} was at {aliases.get(alias, 'no version')}, and is at {wanted or 'none'} again"
            )
            _point(client, name, alias, wanted)
        if aliases.get(CHALLENGER) == standing.champion:
            _point(client, name, CHALLENGER, None)
    if chain.decisions and model.tags.get(ANCHOR_TAG) != chain.head:
        client.set_registered_model_tag(name, ANCHOR_TAG, chain.head)
    return chain if read_chain(client, name).head == chain.head else None


def find_recorded(client: Any, name: str, version: str, chain: Chain) -> Any | None:
    """Return a version that is on record; None if it is gone, or if another one has its number since."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    recorded = registration(chain, version).get("files_digest")
    digest = found.tags.get(FILES_DIGEST_TAG)
    run_ids = {d.evidence.get("run_id") for d in chain.decisions if d.version == version} - {None}
    replaced = recorded is not None and digest != recorded and bool(run_ids) and found.run_id not in run_ids
    return None if replaced else found


def adoptable(client: Any, name: str, version: str) -> None:
    """Raise a UserError if the champion by alias is not one that the record may begin with."""
    tags = client.get_model_version(name, version).tags
    why = "advtrain did not register it" if "advtrain.data_digest" not in tags else ""
    if tags.get("advtrain.trust") == "broken":
        why = "its robust accuracy is not to be trusted"
    if why:
        raise UserError(
            f"version {version} of '{name}' has the alias champion, and {why}: no decision made it champion; take the "
            f"alias away to begin"
        )


def record_registration(
    client: Any, name: str, version: str, report: AnyReport, *, vacant: bool = True
) -> bool:
    """Put a new version on record: as champion where there never was one, else as challenger; return whether champion.

    One whose figure is not to be trusted becomes neither; nor does one that was registered again by a resumed job while
    a newer one waits.

    Args:
        vacant: whether it may become champion where there never was one.
    """
    trusted = not isinstance(report, Report) or report.trust == "trusted"
    while True:
        chain, _ = reconcile_aliases(client, name)
        standing = replay(chain.decisions)
        if standing.champion == version:
            return True
        held = CHAMPION in (client.get_registered_model(name).aliases or {})
        first = vacant and trusted and standing.champion is None and not held
        if not first and registration(chain, version):
            break
        try:
            append(
                client,
                name,
                _registered(client, name, version, report, "first" if first else "registered"),
                chain,
            )
        except ConflictError:
            continue
        reconcile_aliases(client, name)
        if first:
            return True
        break
    if trusted:
        _challenge(client, name, version)
    return False


def _registered(client: Any, name: str, version: str, report: AnyReport, kind: Kind) -> Draft:
    made = client.get_model_version(name, version)
    evidence = {
        "report": report.tags,
        "files_digest": made.tags.get(FILES_DIGEST_TAG),
        "run_id": made.run_id,
        "origin": origin_of(client.get_run(made.run_id), made),
    }
    reason = "the first to be registered" if kind == "first" else ""
    return Draft(kind, version, None, made.run_id, reason, evidence=evidence)


def origin_of(run: Any, version: Any) -> dict[str, str]:
    """Return the commit, whether anything was uncommitted, and the data's digest; what is not known is missing."""
    facts = {
        "commit": run.data.tags.get("mlflow.source.git.commit"),
        "dirty": run.data.tags.get("advtrain.git_dirty"),
        "data_digest": version.tags.get("advtrain.data_digest"),
    }
    return {name: value for name, value in facts.items() if value}


def _challenge(client: Any, name: str, version: str) -> None:
    """Let `challenger` be the version, if it is the newest and never was champion."""
    while True:
        found = client.search_model_versions(named(name), max_results=1, order_by=["version_number DESC"])
        newest = str(found[0].version)
        if version != newest or version in replay(read_chain(client, name).decisions).past_champions:
            return
        _point(client, name, CHALLENGER, version)
        again = client.search_model_versions(named(name), max_results=1, order_by=["version_number DESC"])
        if str(again[0].version) == newest:
            return
        version = str(again[0].version)  # its own registration may have pointed the alias before this did


def _adopt(client: Any, name: str, version: str, chain: Chain) -> None:
    adoptable(client, name, version)
    made = client.get_model_version(name, version)
    evidence = {"files_digest": made.tags.get(FILES_DIGEST_TAG), "run_id": made.run_id}
    draft = Draft("adopted", version, None, made.run_id, "champion when the record began", evidence=evidence)
    try:
        append(client, name, draft, chain)
    except ConflictError:
        return


def _point(client: Any, name: str, alias: str, version: str | None) -> None:
    require_model(name)
    if version is None:
        client.delete_registered_model_alias(name, alias)
    else:
        client.set_registered_model_alias(name, alias, version)
