"""Aliases of a registered model: `champion`, `previous` and `challenger`.

`champion` is the version in use, `previous` is the target of a rollback, and `challenger` is the newest version that
waits for promotion. The audit log determines the first two. If an alias differs from the log, after a crash or a manual
change, the next command resets it.
"""

from __future__ import annotations

import time
from typing import Any

from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, Report
from advtrain.registry.audit_log import (
    Chain,
    ConflictError,
    append,
    read_chain,
    registration,
    require_model,
    require_whole,
)
from advtrain.registry.decision import MOVES, Draft, replay
from advtrain.registry.export import FILES_DIGEST_TAG
from advtrain.registry.signing import public_key
from advtrain.registry.stored_log import named
from advtrain.runs.lineage import ANCESTORS_TAG

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
#: Attempts to reconcile if another writer sets the same alias or tag.
ATTEMPTS = 8


def reconcile_aliases(
    client: Any, name: str, *, adopt: bool = False, after: Chain | None = None
) -> tuple[Chain, list[str]]:
    """Reset the aliases to match the audit log; return the log and a note per reset alias.

    If the log contains no champion, the alias champion is removed, unless its version is older than the log.

    Args:
        adopt: whether a champion that is older than the log is added to it.
        after: what the same command read of the log before, see `read_chain`.

    Raises:
        UserError: the audit log is damaged, or with `adopt` the champion cannot be added (see `adoptable`).
    """
    from mlflow.exceptions import MlflowException

    notes: list[str] = []
    for attempt in range(ATTEMPTS):
        try:
            after = read_chain(client, name, after)
            is_current = _reconcile_once(client, name, adopt, notes, after)
        except MlflowException:  # another writer set the same alias or tag first
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.05 * (attempt + 1))
            continue
        if is_current:
            return after, notes
    return read_chain(client, name, after), notes


def _reconcile_once(client: Any, name: str, adopt: bool, notes: list[str], chain: Chain) -> bool:
    """Reconcile the aliases once; return whether they are those of the audit log."""
    require_whole(chain, name)
    model = client.get_registered_model(name)
    aliases = {alias: str(version) for alias, version in (model.aliases or {}).items()}
    standing, has_written = replay(chain.decisions), False
    if standing.champion is None and CHAMPION in aliases and not predates_log(chain, aliases[CHAMPION]):
        notes.append(f"alias {CHAMPION} removed: no decision made version {aliases[CHAMPION]} champion")
        _point(client, name, CHAMPION, None)
        return False
    if standing.champion is None and CHAMPION in aliases and adopt:
        _adopt(client, name, aliases[CHAMPION], chain)
        return False
    if standing.champion is not None:
        for alias, wanted in ((CHAMPION, standing.champion), (PREVIOUS, standing.previous)):
            if aliases.get(alias) == wanted:
                continue
            if wanted is not None and find_recorded(client, name, wanted, chain) is None:
                notes.append(
                    f"version {wanted} of '{name}' is recorded as {alias}, but it was deleted or its number was "
                    f"reused; choose another with `advtrain promote` or `advtrain rollback {name} --to V`"
                )
                continue
            notes.append(
                f"alias {alias} reset from {aliases.get(alias, 'none')} to {wanted or 'none'}, as in the audit log"
            )
            _point(client, name, alias, wanted)
            has_written = True
        if aliases.get(CHALLENGER) == standing.champion:
            _point(client, name, CHALLENGER, None)
            has_written = True
    for tag, head in chain.heads.items():
        if model.tags.get(tag) != head:
            client.set_registered_model_tag(name, tag, head)
            has_written = True
    # What was written is out of date if another writer appended in the meantime.
    return not has_written or read_chain(client, name, chain).heads == chain.heads


def find_recorded(client: Any, name: str, version: str, chain: Chain) -> Any | None:
    """Return a recorded version; None if it was deleted or its number was reused."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    recorded = registration(chain, version).get("files_digest")
    digest = found.tags.get(FILES_DIGEST_TAG)
    kinds = (*MOVES, "registered")
    records = [record for part in chain.about(version) for record in part if record.kind in kinds]
    run_ids = {d.evidence.get("run_id") for d in records} - {None}
    replaced = recorded is not None and digest != recorded and bool(run_ids) and found.run_id not in run_ids
    return None if replaced else found


def predates_log(chain: Chain, version: str) -> bool:
    """Return whether a version may be champion without a decision, as before the audit log."""
    return public_key() is None and not registration(chain, version)


def adoptable(client: Any, name: str, version: str) -> None:
    """Raise a UserError if the version with the alias champion cannot start an audit log."""
    tags = client.get_model_version(name, version).tags
    why = "advtrain did not register it" if "advtrain.data_digest" not in tags else ""
    if tags.get("advtrain.trust") == "broken":
        why = "its robust accuracy failed a masking check"
    if why:
        raise UserError(
            f"version {version} of '{name}' has the alias champion without a recorded decision, and {why}; "
            f"remove the alias first"
        )


def record_registration(client: Any, name: str, version: str, report: AnyReport) -> bool:
    """Record a new version as challenger; return whether a decision made it champion already.

    A version whose report is not `trusted` gets no alias. An older version that a resumed job registers again gets none
    while a newer one waits.
    """
    while True:
        chain, _ = reconcile_aliases(client, name)
        if replay(chain.decisions).champion == version:
            return True
        if registration(chain, version):
            break
        try:
            append(client, name, _registered(client, name, version, report), chain)
        except ConflictError:
            continue
        chain, _ = reconcile_aliases(client, name, after=chain)
        break
    if not isinstance(report, Report) or report.trust == "trusted":
        _challenge(client, name, version, chain)
    return False


def _registered(client: Any, name: str, version: str, report: AnyReport) -> Draft:
    made = client.get_model_version(name, version)
    evidence = {
        "report": report.tags,
        "files_digest": made.tags.get(FILES_DIGEST_TAG),
        "run_id": made.run_id,
        "origin": origin_of(client.get_run(made.run_id), made),
    }
    return Draft("registered", version, None, made.run_id, evidence=evidence)


def origin_of(run: Any, version: Any) -> dict[str, str]:
    """Return a version's git commit, dirty flag, data digest and ancestors; omit unknown values."""
    facts = {
        "commit": run.data.tags.get("mlflow.source.git.commit"),
        "dirty": run.data.tags.get("advtrain.git_dirty"),
        "data_digest": version.tags.get("advtrain.data_digest"),
        "ancestors": version.tags.get(ANCESTORS_TAG),
    }
    return {name: value for name, value in facts.items() if value}


def _challenge(client: Any, name: str, version: str, chain: Chain) -> None:
    """Set the alias `challenger` to the version if it is the newest and was never champion."""
    while True:
        found = client.search_model_versions(named(name), max_results=1, order_by=["version_number DESC"])
        newest = str(found[0].version)
        chain = read_chain(client, name, chain)
        if version != newest or version in replay(chain.decisions).past_champions:
            return
        _point(client, name, CHALLENGER, version)
        again = client.search_model_versions(named(name), max_results=1, order_by=["version_number DESC"])
        if str(again[0].version) == newest:
            return
        version = str(again[0].version)  # the newer registration may have set the alias before this call did


def _adopt(client: Any, name: str, version: str, chain: Chain) -> None:
    adoptable(client, name, version)
    made = client.get_model_version(name, version)
    evidence = {"files_digest": made.tags.get(FILES_DIGEST_TAG), "run_id": made.run_id}
    draft = Draft("adopted", version, None, made.run_id, "champion before the audit log", evidence=evidence)
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
