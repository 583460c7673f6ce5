"""challenger -> gate -> champion, or the reason why not; and back again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from advtrain.errors import UserError, nearest
from advtrain.evaluation import EvalSpec, Evaluation, Report, SampleResults, Workers, evaluate
from advtrain.promotion import (
    Case,
    ChangedError,
    Evidence,
    Finding,
    LostRaceError,
    Outcomes,
    Policy,
    changed_finding,
    different,
    draft_of,
    failed,
    judge,
    move_champion,
    names_of,
    put_on_record,
    read_evidence,
)
from advtrain.registry import (
    CHALLENGER,
    CHAMPION,
    Chain,
    Draft,
    adoptable,
    find_recorded,
    load_registered,
    read_chain,
    reconcile_aliases,
    registered_model,
    registered_names,
    replay,
    require_model,
    require_whole,
    resolve,
    versions,
)
from advtrain.threat import ThreatModel
from advtrain.tracking.store import open_client, store_errors
from pipelines.console import console, evaluation_view, table
from pipelines.train import FAILED, STOPPED
from pipelines.workspace import Workspace, load_dataset, training_threat

#: Rules whose answer depends on the champion.
COMPARING = {"judged_alike", "robust_not_worse", "robust_gain", "clean_drop", "neighbours", "signature"}
MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "-"}


@dataclass(frozen=True)
class PromotionRequest:
    """What was asked for."""

    version: str | None
    policy: Policy
    dry_run: bool
    reason: str
    evaluate: bool  # the challenger anew, if its own report does not do
    workers: int


def promote(name: str, workspace: Workspace, request: PromotionRequest) -> int:
    """Ask the gate; return the exit code: 0 if the version is champion now, or in a dry run would be."""
    client = open_client(workspace.tracking_uri, must_exist=True)
    with store_errors(workspace.tracking_uri):
        chain = _chain(client, name, repair=not request.dry_run)
        version = _challenger(client, name, request.version)
        champion, number = _champion(client, name, chain), str(version.version)
    if number == champion:
        console.print(f"version {number} of '{name}' is champion already{_since(chain)}")
        return 0
    if not request.dry_run:
        draft = Draft("asked", number, champion, version.run_id, request.reason, request.policy.record())
        put_on_record(client, name, draft)
    try:
        return _decide(client, name, version, champion, chain, workspace, request)
    except KeyboardInterrupt:
        decided = replay(read_chain(client, name).decisions).champion == number
        told = (
            f"version {number} is champion on record, and the aliases follow"
            if decided
            else "nothing was decided"
        )
        console.print(f"\nstopped; {told}", style="yellow")
        return STOPPED


def _decide(
    client: Any,
    name: str,
    version: Any,
    champion: str | None,
    chain: Chain,
    workspace: Workspace,
    request: PromotionRequest,
) -> int:
    draft, findings = _consider(client, name, version, champion, chain, workspace, request)
    against = f"champion {champion}" if champion else "no champion"
    rows = [[f.rule, MARKS[f.verdict], f.figures, f.threshold] for f in findings]
    table(
        f"{name} version {version.version} against {against}, policy {request.policy.name} {request.policy.version}",
        ["rule", "verdict", "figures", "threshold"],
        rows,
        fold=True,
    )
    return _conclude(client, name, draft, failed(findings), request.dry_run)


def _conclude(client: Any, name: str, draft: Draft, missed: list[str], dry_run: bool) -> int:
    if dry_run:
        verdict = f"refused: {', '.join(missed)}" if missed else "allowed"
        console.print(f"dry run, nothing was changed; it would be {verdict}")
        return FAILED if missed else 0
    if missed:
        put_on_record(client, name, draft)
        console.print(f"refused: {', '.join(missed)}", style="red")
        return FAILED
    try:
        move_champion(client, name, draft)
    except LostRaceError as error:
        return _overtaken(client, name, draft, error)
    console.print(f"models:/{name}/{draft.version} is champion", style="green")
    return 0


def _overtaken(client: Any, name: str, draft: Draft, error: LostRaceError) -> int:
    lost = f"overtaken: version {error.winner.version} was made champion by {error.winner.actor}"
    put_on_record(client, name, replace(draft, kind="refused", reason=f"{draft.reason} ({lost})".strip()))
    console.print(f"refused: {error}", style="red", markup=False)
    return FAILED


def rollback(name: str, workspace: Workspace, *, to: str | None, reason: str) -> int:
    """Make a former champion champion again, if its files are what was registered; return the exit code."""
    if not reason.strip():
        raise UserError("a rollback needs a --reason for the record")
    client = open_client(workspace.tracking_uri, must_exist=True)
    with store_errors(workspace.tracking_uri):
        chain = _chain(client, name, repair=True)
        standing = replay(chain.decisions)
        former = [
            v
            for v in reversed(standing.champion_history[:-1])
            if find_recorded(client, name, v, chain) is not None
        ]
    target = to or (former[0] if former else None)
    others = ", ".join(sorted(set(standing.past_champions) - {standing.champion or ""}, key=int)) or "none"
    if target is None:
        raise UserError(
            f"'{name}' has no champion before the present one to go back to (former ones: {others}); --to names one"
        )
    if target == standing.champion:
        raise UserError(f"version {target} of '{name}' is champion{_since(chain)}")
    if target not in standing.past_champions:
        raise UserError(
            f"version {target} of '{name}' never was champion (former ones: {others}); "
            f"`advtrain promote {name} --version {target}` asks the gate"
        )
    version = find_recorded(client, name, target, chain)
    if version is None:
        raise UserError(
            f"version {target} of '{name}' is gone from the registry, or another one has its number"
        )
    draft = Draft("rolled_back", target, standing.champion, version.run_id, reason)
    try:
        evidence = read_evidence(client, version, chain, champion=True)
    except ChangedError as error:
        finding = changed_finding(str(error))
        put_on_record(
            client, name, replace(draft, kind="refused", evidence={"rules": [finding.model_dump()]})
        )
        console.print(f"refused: {error}", style="red")
        return FAILED
    kept = {"challenger": evidence.summary(), "files_digest": evidence.files_digest}
    try:
        move_champion(client, name, replace(draft, evidence=kept))
    except LostRaceError as error:
        return _overtaken(client, name, draft, error)
    console.print(
        f"models:/{name}/{target} is champion again, in the place of {standing.champion}", style="green"
    )
    return 0


def _chain(client: Any, name: str, *, repair: bool) -> Chain:
    """Return the record of decisions; with `repair`, aliases that a kill or a person left elsewhere are put right."""
    known(client, name)
    if not repair:
        chain = read_chain(client, name)
        require_whole(chain, name)
        return chain
    chain, notes = reconcile_aliases(client, name, adopt=True)
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    return chain


def known(client: Any, name: str) -> Any:
    """Return the registered model of that name.

    Raises:
        UserError: there is none.
    """
    require_model(name)
    model = registered_model(client, name)
    if model is None:
        raise UserError(f"no registered model '{name}'{nearest(name, registered_names(client))}")
    return model


def _challenger(client: Any, name: str, wanted: str | None) -> Any:
    """Return the version that is to be promoted: the one named, else the challenger, else the newest."""
    if wanted is not None:
        return resolve(client, f"models:/{name}/{wanted}")
    aliases = {alias: str(v) for alias, v in (known(client, name).aliases or {}).items()}
    found = versions(client, name)
    if not found:
        raise UserError(f"'{name}' has no versions")
    return resolve(client, f"models:/{name}/{aliases.get(CHALLENGER, found[-1].version)}")


def _champion(client: Any, name: str, chain: Chain) -> str | None:
    """Return the champion: by the record, or in a dry run by the alias that a promotion would put on record."""
    champion = replay(chain.decisions).champion
    if champion is None and (alias := (known(client, name).aliases or {}).get(CHAMPION)):
        champion = str(alias)
        adoptable(client, name, champion)
    return champion


def _since(chain: Chain) -> str:
    promoted_by = replay(chain.decisions).promoted_by
    return "" if promoted_by is None else f", since {promoted_by.time} by {promoted_by.actor}"


def _consider(
    client: Any,
    name: str,
    version: Any,
    champion: str | None,
    chain: Chain,
    workspace: Workspace,
    request: PromotionRequest,
) -> tuple[Draft, list[Finding]]:
    """Collect the evidence, ask the rules, and return what shall go on record."""
    policy, number = request.policy, str(version.version)
    other = None
    try:
        challenger = read_evidence(client, version, chain)
        if champion is not None and (reigning := find_recorded(client, name, champion, chain)) is not None:
            other = read_evidence(client, reigning, chain, champion=True)
    except ChangedError as error:
        findings = [changed_finding(str(error))]
        evidence = {"rules": [finding.model_dump() for finding in findings]}
        draft = Draft("refused", number, champion, version.run_id, request.reason, policy.record(), evidence)
        return draft, findings
    if request.evaluate and "suite" in failed(judge(Case(policy, challenger, None))):
        challenger = _judged_anew(
            name, challenger, challenger.report, policy.suite, workspace, request.workers
        )
    findings = judge(case := Case(policy, challenger, other))
    # Where they were judged otherwise, and nothing but what compares them stands in the way: the champion anew.
    if other is not None and set(failed(findings)) <= COMPARING and different(challenger, other):
        if isinstance(challenger.report, Report) and challenger.form == other.form:
            suite = ",".join(names_of(challenger.report))
            other = _judged_anew(
                name, other, challenger.report, suite, workspace, request.workers, challenger.version
            )
        findings = judge(case := Case(policy, challenger, other))
    return draft_of(case, findings, champion, version.run_id, request.reason), findings


def _judged_anew(
    name: str,
    evidence: Evidence,
    like: Any,
    suite: str,
    workspace: Workspace,
    workers: int,
    data_of: str | None = None,
) -> Evidence:
    """Judge a version as the report `like` was made, on the data of the version `data_of`, by default its own."""
    uri = f"models:/{name}/{evidence.version}"
    console.print(f"judging version {evidence.version} anew at {like.threat} with {suite} ...")
    source, recipe, digest = load_registered(uri, workspace.tracking_uri)
    data_recipe = recipe
    if data_of is not None:  # the data are those of the report, whatever the version itself was trained on
        _, data_recipe, digest = load_registered(f"models:/{name}/{data_of}", workspace.tracking_uri)
    dataset = load_dataset(data_recipe, workspace, digest)
    with evaluation_view() as progress:
        found: Evaluation = evaluate(
            EvalSpec(
                source,
                dataset.test,
                dataset,
                suite,
                ThreatModel(like.norm, like.eps),
                name=uri,
                seed=like.seed,
                batch_size=recipe.evaluation.batch_size,
                full=True,
                training_threat=training_threat(recipe),
            ),
            workers=Workers(workers, workspace.address),
            cache=workspace.runs / "evaluations",
            progress=progress,
        )
    assert isinstance(found.samples, SampleResults)
    return replace(evidence, report=found.report, outcomes=Outcomes.of(found.samples), judged_anew=True)
