"""Promotion requests: find challenger and champion, collect evidence, draft the decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from advtrain.errors import UserError
from advtrain.evaluation import Report
from advtrain.evaluation.edits import attack_name
from advtrain.promotion.comparison import Case, different, names_of
from advtrain.promotion.consistency import contradictions
from advtrain.promotion.evidence import ChangedError, Evidence, Repetition, read_evidence
from advtrain.promotion.gate import draft_of, failed
from advtrain.promotion.policy import Policy
from advtrain.promotion.rules import changed_finding, judge
from advtrain.registry import (
    CHALLENGER,
    CHAMPION,
    Chain,
    Draft,
    Finding,
    adoptable,
    can_sign,
    find_recorded,
    predates_log,
    public_key,
    read_chain,
    reconcile_aliases,
    replay,
    require_registered,
    require_whole,
    resolve,
    unsigned,
    versions,
)

#: Rules that compare the challenger with the champion.
COMPARING = {
    "judged_alike",
    "robust_not_worse",
    "robust_gain",
    "clean_drop",
    "neighbours",
    "proven_not_worse",
    "signature",
}

#: Evaluates a version again with the settings of a report. Arguments: evidence of the version, report, suite, and the
#: version whose data is used (None: its own). Returns the evidence with the new report.
ReEvaluate = Callable[[Evidence, Any, str, str | None], Evidence]
#: Repeats random work items of a version's evaluation. Arguments: evidence of the version, number of items.
Repeat = Callable[[Evidence, int], Repetition]


@dataclass(frozen=True)
class PromotionRequest:
    """A request to promote a version."""

    version: str | None  # None for the challenger, else the newest version
    policy: Policy
    dry_run: bool = False
    reason: str = ""
    evaluate: bool = False  # evaluate the challenger again if its report has a weaker suite than the policy
    workers: int = 0  # Ray workers of an evaluation


def load_record(client: Any, name: str, *, repair: bool) -> tuple[Chain, list[str]]:
    """Return the audit log of a model, and a note for each alias that was reset.

    Args:
        repair: whether aliases that differ from the log are reset.

    Raises:
        UserError: the model does not exist, or its audit log is damaged.
    """
    require_registered(client, name)
    if repair:
        return reconcile_aliases(client, name, adopt=True)
    chain = read_chain(client, name)
    require_whole(chain, name)
    return chain, []


def require_signed(client: Any, name: str, request: PromotionRequest) -> None:
    """Raise a UserError if the policy demands signatures and one is missing or cannot be made."""
    policy = request.policy
    if policy.signed == "optional":
        return
    key = public_key(policy.public_key)
    if key is None:
        raise UserError(
            f"policy {policy.name} demands signatures: set its public_key, or $ADVTRAIN_PUBLIC_KEY"
        )
    if not request.dry_run and not can_sign(key):
        raise UserError(
            f"policy {policy.name} demands signatures: set $ADVTRAIN_SIGNING_KEY to the private key of its public key"
        )
    chain, alias = read_chain(client, name), (require_registered(client, name).aliases or {}).get(CHAMPION)
    if alias is not None and replay(chain.decisions).champion is None:
        raise UserError(
            f"version {alias} of '{name}' has the alias {CHAMPION} without a signed decision; remove it"
        )
    if found := unsigned(chain.decisions, key):
        raise UserError(
            f"the audit log of '{name}' has decisions that the gate did not make: {'; '.join(found)}"
        )


def find_challenger(client: Any, name: str, wanted: str | None) -> Any:
    """Return the version to promote: the wanted one, else the challenger, else the newest."""
    if wanted is not None:
        return resolve(client, f"models:/{name}/{wanted}")
    aliases = {alias: str(v) for alias, v in (require_registered(client, name).aliases or {}).items()}
    found = versions(client, name)
    if not found:
        raise UserError(f"'{name}' has no versions")
    return resolve(client, f"models:/{name}/{aliases.get(CHALLENGER, found[-1].version)}")


def find_champion(client: Any, name: str, chain: Chain) -> str | None:
    """Return the champion of the audit log; if it has none, an older version with the alias.

    The next promotion records that version in the audit log.
    """
    if champion := replay(chain.decisions).champion:
        return champion
    alias = (require_registered(client, name).aliases or {}).get(CHAMPION)
    if alias is None or not predates_log(chain, str(alias)):
        return None
    adoptable(client, name, str(alias))
    return str(alias)


def _suite(challenger: Evidence, policy: Policy) -> str:
    """Return the suite of a new evaluation; for texts under edits, the search with the policy's budget."""
    report = challenger.report
    is_edited = isinstance(report, Report) and report.edits is not None
    return attack_name(policy.edit_budget) if is_edited else policy.suite


def consider(
    client: Any,
    name: str,
    version: Any,
    champion: str | None,
    chain: Chain,
    request: PromotionRequest,
    re_evaluate: ReEvaluate,
    repeat: Repeat,
) -> tuple[Draft, list[Finding]]:
    """Collect the evidence, apply the rules, and return the draft decision and findings."""
    policy, number = request.policy, str(version.version)
    other = None
    try:
        challenger = read_evidence(client, version, chain)
        if champion is not None and (found := find_recorded(client, name, champion, chain)) is not None:
            other = read_evidence(client, found, chain, champion=True)
    except ChangedError as error:
        findings = [changed_finding(str(error))]
        evidence = {"rules": [finding.model_dump() for finding in findings]}
        draft = Draft("refused", number, champion, version.run_id, request.reason, policy.record(), evidence)
        return draft, findings
    if isinstance(challenger.report, Report) and challenger.outcomes is not None:
        challenger = replace(
            challenger, contradictions=contradictions(challenger.report, challenger.outcomes)
        )
    if policy.repeat_units and challenger.outcomes is not None and not challenger.pickles:
        challenger = replace(challenger, repetition=repeat(challenger, policy.repeat_units))
    if request.evaluate and "suite" in failed(judge(Case(policy, challenger, None))):
        challenger = re_evaluate(challenger, challenger.report, _suite(challenger, policy), None)
    findings = judge(case := Case(policy, challenger, other))
    # Evaluate the champion again if its settings differ and only the comparison with it fails.
    if other is not None and set(failed(findings)) <= COMPARING and different(challenger, other):
        if isinstance(challenger.report, Report) and challenger.form == other.form:
            suite = ",".join(names_of(challenger.report))
            other = re_evaluate(other, challenger.report, suite, challenger.version)
        findings = judge(case := Case(policy, challenger, other))
    return draft_of(case, findings, champion, version.run_id, request.reason), findings
