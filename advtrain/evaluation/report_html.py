"""Report as one self-contained HTML page, without network or scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from types import MappingProxyType
from typing import Any

from advtrain.data.units import unit_note
from advtrain.evaluation.confusion import confusion_section
from advtrain.evaluation.edit_report import edit_gallery
from advtrain.evaluation.html import Html, axis_titles, document, fact_list, fill, html_table, joined
from advtrain.evaluation.regression import AnyReport
from advtrain.evaluation.report import CurvePoint, Report, Samples
from advtrain.evaluation.texts import text_section
from advtrain.evaluation.worst_case import SampleResults
from advtrain.schema import show_number

_NOTHING: Mapping[str, str] = MappingProxyType({})


def build_page(
    report: AnyReport,
    failures: Sequence[dict[str, Any]],
    samples: Samples | None = None,
    class_names: Sequence[str] | None = None,
    about: Mapping[str, str] = _NOTHING,
) -> str:
    """Return the report page as HTML text.

    Args:
        report: report of a classifier or a regression.
        failures: gallery: images of `nearest_failures`, or texts of `text_failures`.
        samples: per-sample results, for the confusion matrices of a classifier.
        class_names: names of all classes; None: those of the report.
        about: further facts for the head of the page, such as date, recipe and objective.
    """
    parts = [fill("<h1>{}</h1><p class=dim>{}</p>", report.model, report.title.partition(": ")[2])]
    parts.append(fact_list({**about, "attacks": _attacks(report), **report.data_facts}))
    if report.caveat:
        parts.append(fill("<p><b>{}</b></p>", report.caveat))
    if isinstance(report, Report) and report.edits is not None:
        parts.append(fill("<p>{} Threat model: {}.</p>", report.edits.bounds, report.edits.description))
    names = {c.label: c.name for c in report.per_class} if isinstance(report, Report) else {}
    names |= dict(enumerate(class_names or []))
    if isinstance(report, Report):
        parts += _classification(report)
        if isinstance(samples, SampleResults):
            parts.append(confusion_section(samples, names))
    else:
        parts.append(html_table(["", "value", "95 % interval"], [_split_row(row) for row in report.rows]))
    if report.features:
        parts += [
            fill("<h2>Radius in the units of the features</h2>"),
            html_table(*report.units()),
            fill("<p class=dim>{}</p>", unit_note(report.norm)),
        ]
    if report.curve:
        accuracy = isinstance(report, Report)
        parts += [
            fill("<h2>{} against {}</h2>", "Accuracy" if accuracy else "Worst-case MAE", report.radius_word),
            _curve(report.curve, report.eps, report.radius_name, accuracy=accuracy),
            fill(
                "<p class=dim>{}, with a 95 % band. Norm: {}. "
                "The dashed line marks the evaluation radius. The attacks of the evaluation are listed above.</p>",
                report.curve_attack,
                report.norm,
            ),
        ]
    if isinstance(report, Report) and failures:
        if report.edits is not None:
            parts.append(edit_gallery(report, failures, names))
        else:
            is_text = "text" in failures[0]
            parts.append(text_section(failures, names) if is_text else _gallery(report, failures, names))
    parts.append(_repeat(report))
    return document(f"{report.model}, {report.threat}", joined(parts))


def _attacks(report: AnyReport) -> str:
    """Return the suite and its attacks, or the one attack."""
    if not isinstance(report, Report):
        return report.attack
    names = ", ".join(attack.name for attack in report.attacks)
    return names if names == report.suite else f"{report.suite}: {names}"


def _classification(report: Report) -> list[Html]:
    tiles = [
        ("clean accuracy", f"{100 * report.clean.value:.2f} %", str(report.clean).partition("  ")[2]),
        ("robust accuracy", f"{100 * report.robust.value:.2f} %", str(report.robust).partition("  ")[2]),
        ("trust", fill("<span class='{}'>{}</span>", report.trust, report.trust), _trust_words(report)),
    ]
    if worst := report.worst_class:
        tiles.insert(2, ("robust accuracy, worst class", f"{100 * worst.robust.value:.2f} %", worst.name))
    cards = joined(
        fill("<div class=tile>{}<b>{}</b><span class=dim>{}</span></div>", name, value, note)
        for name, value, note in tiles
    )
    attacks = [
        [
            a.name,
            f"{a.num_attacked:,}",
            f"{a.num_broken:,}",
            f"{100 * a.robust.value:.2f} %",
            str(a.robust).partition("  ")[2],
        ]
        for a in report.attacks
    ]
    classes = [
        [
            c.name,
            f"{c.clean.total:,}",
            f"{100 * c.clean.value:.1f} %",
            f"{100 * c.robust.value:.1f} %",
            str(c.robust).partition("  ")[2],
            fill("<b class=failed>weak</b>") if report.is_weak(c) else "",
        ]
        for c in report.per_class
    ]
    parts = [
        fill("<div class=tiles>{}</div><h2>Attacks</h2>", cards),
        html_table(["attack", "attacked", "broken", "after attack (cumulative)", "95 % interval"], attacks),
        fill(
            "<p class=dim>A sample counts as robust only if no attack fooled the model on it. Each attack starts from "
            "the clean input and runs on the samples that are still robust. Robust accuracy is an upper bound.</p>"
        ),
    ]
    if report.checks:
        parts.append(fill("<h2>Can the robust accuracy be trusted?</h2>"))
        parts += [
            fill(
                "<div class='check {}'><div><span class=verdict>{}</span> {}</div><p class=dim>{}</p>{}</div>",
                c.verdict,
                c.verdict,
                c.question,
                c.evidence,
                fill("<p>{}</p>", c.advice) if c.advice else "",
            )
            for c in report.checks
        ]
    return [
        *parts,
        fill("<h2>Per class</h2>"),
        html_table(["class", "samples", "clean", "robust", "95 % interval", ""], classes),
        fill("<p class=dim>{} {}</p>", report.weak_rule, report.calibration),
    ]


def _trust_words(report: Report) -> str:
    failed = sum(check.verdict == "failed" for check in report.checks)
    return f"{failed} of {len(report.checks)} checks failed" if report.checks else "masking checks not run"


def _split_row(row: list[str]) -> list[str]:
    value, _, interval = row[1].partition("  ")
    return [row[0], value, interval]


def _curve(points: Sequence[CurvePoint], judged: float, below: str, *, accuracy: bool) -> Html:
    """Return the curve as SVG; the page's style defines its colors. `below` is the title of the x axis."""
    left, right, top, bottom = 72, 620, 14, 270
    scale, beside = (100.0, "accuracy, %") if accuracy else (1.0, "worst-case MAE")
    widest = points[-1].eps or 1.0
    points = [p for p in points if isfinite(p.high)]  # the error of a regression may be unbounded
    highest = 1.0 if accuracy else 1.1 * max((p.high for p in points), default=0.0) or 1.0

    def at(eps: float, value: float) -> str:
        return f"{left + (right - left) * eps / widest:.1f},{bottom - (bottom - top) * value / highest:.1f}"

    band = " ".join([*(at(p.eps, p.high) for p in points), *(at(p.eps, p.low) for p in reversed(points))])
    line = " ".join(at(p.eps, p.value) for p in points)
    marks = ""
    for k in range(5):
        share = k / 4
        y = bottom - (bottom - top) * share
        x = left + (right - left) * share
        marks += (
            f"<line x1={left} x2={right} y1={y:.1f} y2={y:.1f} stroke='var(--line)'/>"
            f"<text x={left - 6} y={y + 4:.1f} text-anchor=end>{scale * highest * share:.3g}</text>"
            f"<text x={x:.1f} y={bottom + 18} text-anchor=middle>{widest * share:.3g}</text>"
        )
    dots = "".join(
        "<circle cx={} cy={} r=3.5 fill='var(--blue)'/>".format(*at(p.eps, p.value).split(","))
        for p in points
    )
    here = at(judged, 0).split(",")[0]
    drawn = Html(  # of numbers alone
        f"<line x1={here} x2={here} y1={top} y2={bottom} stroke='var(--dim)' stroke-dasharray='5 4'/>"
        f"<polygon points='{band}' fill='var(--blue)' opacity=.2 />"
        f"<polyline points='{line}' fill=none stroke='var(--blue)' stroke-width=2 />{dots}"
    )
    titles = axis_titles(below, beside, (left + right) / 2, bottom + 40, 16, (top + bottom) / 2)
    return fill(
        "<svg viewBox='0 0 640 320' role=img aria-label='{} against {}'>{}{}{}</svg>",
        beside,
        below,
        Html(marks),
        titles,
        drawn,
    )


def _gallery(report: Report, failures: Sequence[dict[str, Any]], names: Mapping[int, str]) -> Html:
    cards = []
    for failure in failures:
        label, taken = (names.get(failure[k], str(failure[k])) for k in ("label", "predicted_as"))
        images = joined(
            fill("<img alt='' src='data:image/png;base64,{}'>", data) for data in failure["images"]
        )
        cards.append(
            fill(
                "<figure><div>{}</div><figcaption>{}, predicted as {}, {} norm {}</figcaption></figure>",
                images,
                label,
                taken,
                report.norm,
                f"{failure['distance']:.3g}",
            )
        )
    return fill(
        "<h2>Nearest failures</h2><p class=dim>Clean image, perturbation (scaled to its largest entry; gray: none), "
        "adversarial image. FAB found these smallest perturbations among a subset of the broken samples.</p>"
        "<div class=gallery>{}</div>",
        joined(cards),
    )


def _repeat(report: AnyReport) -> Html:
    facts = {
        "data": f"{report.data_title}, {report.split}, digest {report.data_digest[:12]}",
        "model digest": (report.model_digest or "not computed")[:12],
        "threat model": report.threat
        if report.is_edited
        else f"{report.norm}, eps {show_number(report.eps)}",
        "seed": str(report.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    command = fill("<pre>{}</pre>", report.command) if report.command else ""
    return fill("<h2>How to reproduce</h2>{}{}", command, fact_list(facts))
