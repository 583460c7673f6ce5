"""Printed results about models: evaluations, predictions, versions, decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from advtrain.errors import UserError
from advtrain.evaluation import Evaluation, Paired, Report, SampleResults
from advtrain.registry import (
    Chain,
    Decision,
    figures_of,
    interval_of,
    number_of,
    promotion_of,
    replay,
    signatures_of,
    when,
)
from advtrain.runs.lineage import ancestor_rows, named_in_tag
from advtrain.runs.storage import shared_place
from pipelines.cli.console import console, table, write_json
from pipelines.cli.reports import FAILED, STOPPED, print_report
from pipelines.evaluate import EvaluationResult
from pipelines.models import ModelSummary
from pipelines.predict import NUM_RECORDS, PredictionResult, ShadowResult
from pipelines.promote import PromotionResult
from tuning.text import duration

MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "-"}
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


def show_evaluation(result: EvaluationResult, json_file: Path | None = None) -> int:
    """Print a report, and the comparison with another model; return the exit code."""
    found, report = result.found, result.report
    write_json(json_file, report.model_dump(mode="json"))
    print_report(report, [])
    if isinstance(report, Report):
        worst = min(report.per_class, key=lambda c: c.robust.value)
        console.print(f"worst class: {worst.name}, robust {worst.robust}")
    known = " (from the cache)" if found.all_known else ""
    console.print(f"{duration(result.seconds)}{known}")
    if found.folder is not None:
        console.print(f"report: {shared_place(found.folder / 'report' / 'report.html')}")
    if result.rival is not None:
        print_report(result.rival.report, [])
        _print_comparison(found, result.rival)
    return 0


def _print_comparison(found: Evaluation, rival: Evaluation) -> None:
    """Print the paired comparison of two models: clean and robust accuracy."""
    if not isinstance(found.samples, SampleResults) or not isinstance(rival.samples, SampleResults):
        raise UserError("--against is for classifiers, but a model is a regression")
    one, other = found.report.model, rival.report.model
    console.print(f"{other} against {one}, on the same samples (McNemar's exact test):")
    for kind in ("clean", "robust"):
        paired = Paired.of(getattr(found.samples, kind), getattr(rival.samples, kind))
        console.print(f"  {kind} accuracy {paired}")


def show_predictions(result: PredictionResult, json_file: Path | None = None) -> int:
    """Print the first predictions and a summary; return the exit code."""
    values = {
        "model": result.model.uri,
        "samples": result.total,
        "seconds": result.seconds,
        "counts": result.counts,
        "out": result.out,
        "records": result.records,
    }
    write_json(json_file, values)
    if result.out is None:
        classes = result.model.class_names is not None
        names = ["input", "label", "name", "probability"] if classes else ["input", "prediction"]
        cells = [
            [f"{v:.4f}" if isinstance(v := record[n], float) else str(v) for n in names]
            for record in result.records
        ]
        more = f", the first {NUM_RECORDS} of {result.total:,} (--out writes all)"
        title = f"{result.model.uri}{more if result.total > len(cells) else ''}"
        table(title, names, cells, fold=True)
    summary = ", ".join(f"{name}: {count:,}" for name, count in sorted(result.counts.items()))
    rate = f"{result.total:,} samples, {result.total / result.seconds:,.0f} a second"
    console.print(f"{result.model.uri}: {rate}. {summary}".rstrip())
    if result.out is not None:
        console.print(f"written to {result.out}")
    return 0


def show_shadow(result: ShadowResult, inputs: Path, json_file: Path | None = None) -> int:
    """Print the comparison of champion and challenger; return the exit code."""
    values = {
        "models": [served.uri for served in result.models],
        "samples": result.total,
        "ms_per_sample": result.ms_per_sample,
        "agreement": result.agreement.value,
        "disagreements": result.disagreements,
        "accuracy": None if result.accuracy is None else str(result.accuracy),
    }
    write_json(json_file, values)
    rows = [
        [f"{role}: {served.uri}", f"{milliseconds:.3f}"]
        for role, served, milliseconds in zip(
            ("champion", "challenger"), result.models, result.ms_per_sample, strict=True
        )
    ]
    table(f"{result.total:,} samples of {inputs}", ["model", "ms a sample, median over batches"], rows)
    console.print(f"agreement {result.agreement}")
    for champion, challenger, count in result.disagreements:
        console.print(f"  champion {champion}, challenger {challenger}: {count:,} times")
    if result.accuracy is not None:
        console.print(f"accuracy: champion {result.accuracy.first}, challenger {result.accuracy}")
    return 0


def show_promotion(result: PromotionResult, json_file: Path | None = None) -> int:
    """Print a promotion decision; return 0 if the version is, or would be, champion."""
    values = {
        "model": result.name,
        "version": result.version,
        "champion_before": result.champion,
        "status": result.status,
        "message": result.message,
        "failed": result.failed,
        "rules": [finding.model_dump() for finding in result.findings],
    }
    write_json(json_file, values)
    if result.policy and result.findings:
        against = f"champion {result.champion}" if result.champion else "no champion"
        title = f"{result.name} version {result.version} against {against}, policy {result.policy}"
        rows = [[f.rule, MARKS[f.verdict], f.figures, f.threshold] for f in result.findings]
        table(title, ["rule", "verdict", "figures", "threshold"], rows, fold=True)
    if result.status == "dry run":
        verdict = f"refused: {', '.join(result.failed)}" if result.failed else "allowed"
        console.print(f"dry run, nothing was changed; it would be {verdict}")
    elif result.status == "interrupted":
        console.print(f"\nstopped; {result.message}", style="yellow")
        return STOPPED
    elif result.status in ("refused", "lost race"):
        console.print(f"refused: {result.message}", style="red")
    else:
        style = "green" if result.status == "promoted" else ""
        console.print(result.message, style=style)
    return 0 if result.is_champion else FAILED


def show_models(summaries: list[ModelSummary], store: str, json_file: Path | None = None) -> int:
    """Print the versions of registered models; return the exit code."""
    rows = {
        each.name: [version_row(version, aliases, each.chain) for version, aliases in each.versions]
        for each in summaries
    }
    found = {name: [dict(zip(COLUMNS, cells, strict=True)) for cells in each] for name, each in rows.items()}
    write_json(json_file, found)
    if not summaries:
        console.print(f"no model is registered at {store}; `advtrain train digits` registers one")
    for name, cells in rows.items():
        table(name, COLUMNS, cells, fold=True)
    return 0


def version_row(version: Any, aliases: list[str], chain: Chain) -> list[str]:
    """Return the table cells of one version."""
    tags, number = figures_of(version, chain), str(version.version)
    figures = [percent(tags.get(f"advtrain.{kind}_accuracy")) for kind in ("clean", "robust")]
    if (interval := interval_of(tags)) is not None:
        figures[1] += f"  [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"
    promoted_by = promotion_of(chain, number)
    since = f"{when(promoted_by)} by {promoted_by.actor}" if promoted_by is not None else ""
    rest = [tags.get(f"advtrain.{tag}", "-") for tag in ("suite", "threat", "trust")]
    return [number, ", ".join(aliases), *figures, *rest, since]


def show_history(name: str, chain: Chain, *, verify: bool, json_file: Path | None = None) -> int:
    """Print every decision, or with `verify` the state of the audit log; return the exit code."""
    standing, total = replay(chain.decisions), len(chain.decisions)
    values = {
        "model": name,
        "champion": standing.champion,
        "previous": standing.previous,
        "faults": chain.faults,
        "decisions": [decision.model_dump(mode="json") for decision in chain.decisions],
        "registrations": [record.model_dump(mode="json") for record in chain.registrations],
    }
    write_json(json_file, values)
    if verify:
        for fault in chain.faults:
            console.print(fault, style="red")
        if not chain.faults:
            head = f", the last with digest {chain.decisions[-1].digest[:16]}" if total else ""
            number = len(chain.registrations)
            console.print(
                f"the audit log of '{name}' is intact: {total} decisions, {number} registrations{head}"
            )
            console.print(signatures_of(chain.decisions))
        return FAILED if chain.faults else 0
    for number, record in enumerate(chain.records, 1):
        _print_decision(number, record)
    console.print(
        f"champion: {standing.champion or 'none'}; target of a rollback: {standing.previous or 'none'}"
    )
    return 0


def _print_decision(number: int, decision: Decision) -> None:
    before = f", champion before: {decision.champion}" if decision.champion else ""
    policy = decision.policy
    under = f", policy {policy['name']} {policy['version']} ({policy['digest'][:10]})" if policy else ""
    style = {"refused": "red", "allowed": "green", "rolled_back": "yellow"}.get(decision.kind, "")
    console.print(f"{number}. {decision.kind.replace('_', ' ')}: version {decision.version}", style=style)
    console.print(f"   {when(decision)} by {decision.actor}{before}{under}")
    if decision.reason:
        console.print(f"   reason: {decision.reason}")
    if decision.kind == "registered":
        origin = decision.evidence.get("origin") or {}
        for role, model, weights, data in ancestor_rows(named_in_tag(origin.get("ancestors"))):
            console.print(f"   {role}: {model}, weights {weights}, training data {data}")
    for finding in decision.findings:
        if finding.verdict != "skipped":
            line = f"   {finding.verdict:7} {finding.rule}: {finding.figures} ({finding.threshold})"
            console.print(line, style="red" if finding.verdict == "failed" else "dim")


def percent(share: str | None) -> str:
    """Return the share in a tag's text, in percent with two decimals; "-" for None."""
    value = number_of(share)
    return "-" if value is None else f"{100 * value:.2f}"
