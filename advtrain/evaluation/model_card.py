"""Model card in Markdown, built from the report (Mitchell et al. 2019, arXiv 1810.03993)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from advtrain.data.units import unit_note
from advtrain.evaluation.regression import AnyReport
from advtrain.evaluation.report import Report
from advtrain.runs.lineage import Ancestor, ancestor_rows
from advtrain.text import one_line

_NOTHING: Mapping[str, str] = MappingProxyType({})


def build_card(
    report: AnyReport,
    about: Mapping[str, str] = _NOTHING,
    ancestors: Sequence[Ancestor] = (),
    texts: Sequence[Sequence[str]] = (),
) -> str:
    """Return the model card as Markdown text.

    Args:
        report: report of a classifier or a regression.
        about: facts such as date and recipe.
        ancestors: ancestors of the model.
        texts: misclassified texts with label, prediction and confidence.
    """
    lines = [f"# {_cell(report.model)}", "", _cell(report.title.partition(": ")[2]) + ".", ""]
    facts = {**about, **report.data_facts}
    lines += [_cell(f"- {name}: {value}") for name, value in facts.items()] + [""] * bool(facts)
    lines += _table(["", "value [95 % interval]"], report.rows)
    if report.caveat:
        lines += ["", report.caveat]
    if isinstance(report, Report):
        lines += _classifier(report)
    if texts:
        lines += [
            "",
            "## Misclassified texts",
            "",
            "Without attack; the most confident predictions first.",
            "",
        ]
        lines += _table(["text", "label", "predicted as", "confidence"], texts)
    if report.features:
        lines += ["", "## Radius in the units of the features", "", *_table(*report.units())]
        lines += ["", unit_note(report.norm)]
    if ancestors:
        lines += ["", "## Ancestors", ""]
        lines += _table(["role", "model", "weights", "training data"], list(ancestor_rows(ancestors)))
    lines += _reproduction(report)
    return "\n".join(lines) + "\n"


def _reproduction(report: AnyReport) -> list[str]:
    """Return the section on how to repeat the evaluation."""
    lines = ["", "## How to reproduce", ""]
    lines += [f"    {_cell(report.command)}", ""] if report.command else []
    lines += [
        _cell(f"- data: {report.data_title}, {report.split}, digest {report.data_digest}"),
        _cell(f"- model digest: {report.model_digest or 'not computed'}"),
        _cell(
            f"- seed {report.seed}; "
            + ", ".join(f"{name} {version}" for name, version in report.versions.items())
        ),
    ]
    return lines


def _classifier(report: Report) -> list[str]:
    """Return the lines of a classifier: bounds, checks and classes."""
    lines = ["", "Robust accuracy is an upper bound: a stronger attack may lower it."]
    if report.edits is not None:
        lines += ["", _cell(report.edits.bounds), "", _cell(f"Threat model: {report.edits.description}.")]
    if report.checks:
        lines += ["", f"## Trust: {report.trust}", ""]
        rows = [[c.question, c.verdict, " ".join([c.evidence, c.advice]).strip()] for c in report.checks]
        lines += _table(["check", "verdict", "evidence"], rows)
    lines += ["", "## Per class", ""]
    classes = [
        [c.name, str(c.clean), f"{c.robust}{', weak' if report.is_weak(c) else ''}"] for c in report.per_class
    ]
    lines += [
        *_table(["class", "clean", "robust"], classes),
        "",
        _cell(f"{report.weak_rule} {report.calibration}"),
    ]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    """Return text for one cell or heading: names may hold line breaks, bars, tags and control characters."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")
