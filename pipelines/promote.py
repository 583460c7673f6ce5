"""Promotion of a challenger to champion under a policy, and rollback."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from advtrain.data.unseen import retokenized
from advtrain.errors import UserError
from advtrain.evaluation import EvalSpec, Report, SampleResults, Workers, evaluate
from advtrain.events import Message, Progress, evaluation_progress, ignore
from advtrain.promotion import (
    ChangedError,
    Evidence,
    Finding,
    LostRaceError,
    Outcomes,
    PromotionRequest,
    Repetition,
    changed_finding,
    consider,
    failed,
    find_challenger,
    find_champion,
    load_record,
    move_champion,
    put_on_record,
    read_evidence,
    repeat,
    require_signed,
)
from advtrain.recipe.edits import EditThreatConfig
from advtrain.registry import Chain, Draft, find_recorded, load_registered, read_chain, replay
from advtrain.threat import ThreatModel
from advtrain.tracking.store import open_client, store_errors
from pipelines.workspace import Workspace, load_dataset, training_threat, with_synonyms

__all__ = ["PromotionRequest", "PromotionResult", "promote", "rollback"]

_MOVED = "make its former path a link to it: a registered model keeps the path of its recipe"


@dataclass(frozen=True)
class PromotionResult:
    """Decision on one version."""

    name: str
    version: str
    champion: str | None  # before the decision
    status: Literal["promoted", "refused", "already champion", "dry run", "lost race", "interrupted"]
    message: str = ""
    findings: list[Finding] = field(default_factory=list)
    policy: str = ""

    @property
    def failed(self) -> list[str]:
        """Names of the rules that failed."""
        return failed(self.findings)

    @property
    def is_champion(self) -> bool:
        """True if the version is champion now, or would be without a dry run."""
        return self.status in ("promoted", "already champion") or self.status == "dry run" and not self.failed


def promote(
    name: str, workspace: Workspace, request: PromotionRequest, *, progress: Progress = ignore
) -> PromotionResult:
    """Promote a version if every rule of the policy passes, and log the decision.

    Args:
        name: name of the registered model.
        workspace: locations of tracking store, data and Ray.
        request: version and policy.
        progress: called with each event.

    Raises:
        UserError: unknown model or version, or a damaged audit log.
    """
    client = open_client(workspace.tracking_uri, must_exist=True)
    with store_errors(workspace.tracking_uri):
        require_signed(
            client, name, request
        )  # before a decision that the gate did not make can move an alias
        chain = _record(client, name, progress, repair=not request.dry_run)
        version = find_challenger(client, name, request.version)
        champion, number = find_champion(client, name, chain), str(version.version)
    policy = f"{request.policy.name} {request.policy.version}"
    if number == champion:
        message = f"version {number} of '{name}' is champion already{_since(chain)}"
        return PromotionResult(name, number, champion, "already champion", message)
    if not request.dry_run:
        draft = Draft("asked", number, champion, version.run_id, request.reason, request.policy.record())
        put_on_record(client, name, draft)
    findings: list[Finding] = []
    try:
        draft, findings = consider(
            client,
            name,
            version,
            champion,
            chain,
            request,
            _re_evaluation(name, workspace, request, progress),
            _repetition(name, workspace, progress),
        )
        result = PromotionResult(name, number, champion, "dry run", "", findings, policy)
        return result if request.dry_run else _conclude(client, result, draft)
    except KeyboardInterrupt:
        decided = replay(read_chain(client, name).decisions).champion == number
        message = (
            f"version {number} is champion in the audit log; the next command updates the aliases"
            if decided
            else "nothing was decided"
        )
        return PromotionResult(name, number, champion, "interrupted", message, findings, policy)


def _conclude(client: Any, result: PromotionResult, draft: Draft) -> PromotionResult:
    """Log the decision, and make the version champion if every rule passed."""
    if result.failed:
        put_on_record(client, result.name, draft)
        return replace(result, status="refused", message=", ".join(result.failed))
    try:
        move_champion(client, result.name, draft)
    except LostRaceError as error:
        return _lost_race(client, result, draft, error)
    return replace(result, status="promoted", message=f"models:/{result.name}/{draft.version} is champion")


def _lost_race(client: Any, result: PromotionResult, draft: Draft, error: LostRaceError) -> PromotionResult:
    lost = f"overtaken: version {error.winner.version} was made champion by {error.winner.actor}"
    reason = f"{draft.reason} ({lost})".strip()
    put_on_record(client, result.name, replace(draft, kind="refused", reason=reason))
    return replace(result, status="lost race", message=str(error))


def rollback(
    name: str, workspace: Workspace, *, to: str | None, reason: str, progress: Progress = ignore
) -> PromotionResult:
    """Make a former champion champion again, if its files are unchanged.

    Args:
        to: version of a former champion; None: the one before the current champion.
        reason: reason for the audit log; must not be empty.
    """
    if not reason.strip():
        raise UserError("a rollback needs a --reason for the audit log")
    client = open_client(workspace.tracking_uri, must_exist=True)
    with store_errors(workspace.tracking_uri):
        chain = _record(client, name, progress, repair=True)
        standing = replay(chain.decisions)
        before = reversed(standing.champion_history[:-1])
        former = (v for v in before if find_recorded(client, name, v, chain) is not None)
        target = to or next(former, None)
    others = ", ".join(sorted(set(standing.past_champions) - {standing.champion or ""}, key=int)) or "none"
    if target is None:
        raise UserError(
            f"'{name}' has no champion before the current one (former ones: {others}); name one with --to"
        )
    if target == standing.champion:
        raise UserError(f"version {target} of '{name}' is champion{_since(chain)}")
    if target not in standing.past_champions:
        raise UserError(
            f"version {target} of '{name}' never was champion (former champions: {others}); "
            f"`advtrain promote {name} --version {target}` tries to promote it"
        )
    version = find_recorded(client, name, target, chain)
    if version is None:
        raise UserError(
            f"version {target} of '{name}' was deleted from the registry, or another one has its number"
        )
    draft = Draft("rolled_back", target, standing.champion, version.run_id, reason)
    result = PromotionResult(name, target, standing.champion, "refused")
    try:
        evidence = read_evidence(client, version, chain, champion=True)
    except ChangedError as error:
        finding = changed_finding(str(error))
        kept: dict[str, Any] = {"rules": [finding.model_dump()]}
        put_on_record(client, name, replace(draft, kind="refused", evidence=kept))
        return replace(result, message=str(error), findings=[finding])
    kept = {"challenger": evidence.summary(), "files_digest": evidence.files_digest}
    try:
        move_champion(client, name, draft := replace(draft, evidence=kept))
    except LostRaceError as error:
        return _lost_race(client, result, draft, error)
    message = f"models:/{name}/{target} is champion again and replaces version {standing.champion}"
    return replace(result, status="promoted", message=message)


def _record(client: Any, name: str, progress: Progress, *, repair: bool) -> Chain:
    chain, notes = load_record(client, name, repair=repair)
    for note in notes:
        progress(Message(f"note: {note}", "note"))
    return chain


def _since(chain: Chain) -> str:
    promoted_by = replay(chain.decisions).promoted_by
    return "" if promoted_by is None else f", since {promoted_by.time} by {promoted_by.actor}"


def _repetition(name: str, workspace: Workspace, progress: Progress) -> Any:
    """Return a function that repeats random work items of a version's evaluation."""

    def again(evidence: Evidence, units: int) -> Repetition:
        try:
            uri = f"models:/{name}/{evidence.version}"
            source, recipe, digest, accepts, _ = load_registered(uri, workspace.tracking_uri)
            dataset = load_dataset(
                recipe,
                workspace,
                digest,
                moved=_MOVED,
                kept=accepts.text,
                with_table=False,
                progress=progress,
            )
            if (
                dataset.digest != evidence.report.data_digest
            ):  # else a challenger could bring easier data along
                return Repetition(0, 0, "its recipe names other data than its report")
            assert isinstance(evidence.report, Report)
            assert evidence.outcomes is not None
            edits = None if evidence.report.edits is None else evidence.report.edits.settings
            dataset = with_synonyms(dataset, edits, workspace)
            return repeat(
                source, dataset, evidence.report, evidence.outcomes, units, recipe.evaluation.batch_size
            )
        except UserError as error:  # also an error of the report, such as a table that is missing
            return Repetition(0, 0, f"cannot be repeated here: {error}")

    return again


def _re_evaluation(name: str, workspace: Workspace, request: PromotionRequest, progress: Progress) -> Any:
    """Return the function that evaluates a version again, see `promotion.request.ReEvaluate`."""

    def re_evaluate(evidence: Evidence, like: Any, suite: str, data_of: str | None) -> Evidence:
        uri = f"models:/{name}/{evidence.version}"
        progress(Message(f"evaluating version {evidence.version} again at {like.threat} with {suite} ..."))
        source, recipe, digest, accepts, _ = load_registered(uri, workspace.tracking_uri)
        data_recipe, text = recipe, accepts.text
        if data_of is not None:  # the report's data, not the version's own
            like_uri = f"models:/{name}/{data_of}"
            _, data_recipe, digest, like_accepts, _ = load_registered(like_uri, workspace.tracking_uri)
            text = like_accepts.text
        dataset = load_dataset(
            data_recipe, workspace, digest, moved=_MOVED, kept=text, with_table=False, progress=progress
        )
        dataset = retokenized(dataset, accepts.text)  # each model takes the ids of its own tokenizer
        threat = _threat_of(like, suite)
        if isinstance(threat, EditThreatConfig):
            dataset = with_synonyms(dataset, threat, workspace)
            if dataset.synonyms is not None and dataset.synonyms.digest != like.edits.table_digest:
                raise UserError(f"the table '{threat.table}' is not the one of the report of '{like.model}'")
        spec = EvalSpec(
            source,
            dataset.test,
            dataset,
            suite,
            threat,
            name=uri,
            seed=like.seed,
            batch_size=recipe.evaluation.batch_size,
            full=True,
            training_threat=training_threat(recipe),
        )
        found = evaluate(
            spec,
            workers=Workers(request.workers, workspace.address),
            cache=workspace.runs / "evaluations",
            progress=evaluation_progress(progress),
        )
        assert isinstance(found.samples, SampleResults)
        return replace(evidence, report=found.report, outcomes=Outcomes.of(found.samples), judged_anew=True)

    return re_evaluate


def _threat_of(like: Report, suite: str) -> ThreatModel | EditThreatConfig:
    """Return the threat model of a report; of edits, with the budget that `suite` names."""
    if like.edits is None:
        return ThreatModel(like.norm, like.eps)  # type: ignore[arg-type]
    return like.edits.settings.model_copy(update={"budget": int(suite.rpartition("-")[2])})
