"""The report as one HTML page that needs nothing else: no network, no script; narrow windows and dark mode included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import isfinite
from typing import Any

from advtrain.evaluation.errors import AnyReport
from advtrain.evaluation.report import CurvePoint, Report
from advtrain.lookup import show_number

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #5d666f; --line: #d5dade; --back: #fff; --card: #f5f7f8;
  --blue: #1f6feb; --good: #1a7f37; --bad: #c62828; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ea; --dim: #9aa4ad; --line: #3a4148; --back: #16191c;
  --card: #20252a; --blue: #6ea8fe; --good: #57c46f; --bad: #ff7b72; --warn: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.2rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); }
p { margin: .4rem 0; } .dim { color: var(--dim); } code { overflow-wrap: anywhere; font-size: .9em; }
pre { background: var(--card); padding: .7rem; overflow-x: auto; border-radius: .4rem; font-size: .85rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: var(--dim); }
.passed, .trusted { color: var(--good); } .failed, .broken { color: var(--bad); }
.warning { color: var(--warn); } .skipped, .unchecked { color: var(--dim); }
.check { border-left: 4px solid currentColor; padding: .1rem 0 .1rem .8rem; margin: .9rem 0; }
.check * { color: var(--ink); } .check .verdict { color: inherit; font-weight: 600; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem; }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .6rem; }
figure div { display: grid; grid-template-columns: repeat(3, 1fr); gap: .3rem; }
figure img { width: 100%; image-rendering: pixelated; display: block; }
figcaption { font-size: .85rem; margin-top: .4rem; }
svg { width: 100%; height: auto; max-width: 40rem; } svg text { fill: var(--dim); font-size: 12px; }
"""


def build_page(report: AnyReport, failures: Sequence[dict[str, Any]]) -> str:
    """Return the page as text.

    Args:
        failures: the gallery, nearest first: label, taken_for, distance, images (three PNGs in base64).
    """
    parts = [f"<h1>{escape(report.model)}</h1><p class=dim>{escape(report.title.partition(': ')[2])}</p>"]
    if isinstance(report, Report):
        parts += _classification(report)
    else:
        parts.append(_table(["", "value", "95 % interval"], [_split_row(row) for row in report.rows]))
    if report.curve:
        accuracy = isinstance(report, Report)
        parts += [
            f"<h2>{'Accuracy' if accuracy else 'Worst-case MAE'} against epsilon</h2>",
            _curve(report.curve, report.eps, 100.0 if accuracy else 1.0),
            f"<p class=dim>PGD-20 on a stratified draw, with its 95 % band, in {report.norm}; "
            "the dashed line is the radius of this report, whose own attacks are listed above.</p>",
        ]
    if isinstance(report, Report) and failures:
        parts.append(_gallery(report, failures))
    parts.append(_repeat(report))
    title = escape(f"{report.model}, {report.threat}")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _classification(report: Report) -> list[str]:
    tiles = [
        ("clean accuracy", f"{100 * report.clean.value:.2f} %", str(report.clean).partition("  ")[2]),
        ("robust accuracy", f"{100 * report.robust.value:.2f} %", str(report.robust).partition("  ")[2]),
        ("trust", f"<span class={report.trust}>{report.trust}</span>", _trust_words(report)),
    ]
    cards = "".join(
        f"<div class=tile>{name}<b>{value}</b><span class=dim>{note}</span></div>"
        for name, value, note in tiles
    )
    attacks = [
        [
            escape(a.name),
            f"{a.num_attacked:,}",
            f"{a.num_broken:,}",
            f"{100 * a.robust.value:.2f} %",
            str(a.robust).partition("  ")[2],
        ]
        for a in report.attacks
    ]
    classes = [
        [
            escape(c.name),
            f"{c.clean.total:,}",
            f"{100 * c.clean.value:.1f} %",
            f"{100 * c.robust.value:.1f} %",
            str(c.robust).partition("  ")[2],
        ]
        for c in report.per_class
    ]
    parts = [
        f"<div class=tiles>{cards}</div>",
        "<h2>Which attack broke what</h2>",
        _table(["attack", "attacked", "broken", "robust after it", "95 % interval"], attacks),
        "<p class=dim>A sample counts as robust only if no attack fooled the model on it; each attack runs on the "
        "samples that still stand, from the clean input. Robust accuracy is an upper bound.</p>",
    ]
    if report.checks:
        parts.append("<h2>Can this figure be trusted?</h2>")
        parts += [
            f"<div class='check {c.verdict}'><div><span class=verdict>{c.verdict}</span> {escape(c.question)}</div>"
            f"<p class=dim>{escape(c.evidence)}</p>"
            + (f"<p>{escape(c.advice)}</p>" if c.advice else "")
            + "</div>"
            for c in report.checks
        ]
    return [
        *parts,
        "<h2>Per class</h2>",
        _table(["class", "samples", "clean", "robust", "95 % interval"], classes),
        f"<p class=dim>{escape(report.calibration)}</p>",
    ]


def _trust_words(report: Report) -> str:
    failed = sum(check.verdict == "failed" for check in report.checks)
    return f"{failed} of {len(report.checks)} checks failed" if report.checks else "no masking check was made"


def _split_row(row: list[str]) -> list[str]:
    value, _, interval = row[1].partition("  ")
    return [escape(row[0]), value, interval]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{lines}</table></div>"


def _curve(points: Sequence[CurvePoint], judged: float, unit: float) -> str:
    """Draw the curve as SVG, which takes its colours from the page."""
    left, right, top, bottom = 52, 620, 14, 270
    widest = points[-1].eps or 1.0
    points = [p for p in points if isfinite(p.high)]  # of a regression the error may have no bound
    highest = 1.0 if unit == 100 else 1.1 * max((p.high for p in points), default=0.0) or 1.0

    def at(eps: float, value: float) -> str:
        return f"{left + (right - left) * eps / widest:.1f},{bottom - (bottom - top) * value / highest:.1f}"

    band = " ".join([*(at(p.eps, p.high) for p in points), *(at(p.eps, p.low) for p in reversed(points))])
    line = " ".join(at(p.eps, p.value) for p in points)
    marks = ""
    for k in range(5):
        share = k / 4
        y = bottom - (bottom - top) * share
        x = left + (right - left) * share
        label = f"{unit * highest * share:.3g}" + (" %" if unit == 100 else "")
        marks += (
            f"<line x1={left} x2={right} y1={y:.1f} y2={y:.1f} stroke='var(--line)'/>"
            f"<text x={left - 6} y={y + 4:.1f} text-anchor=end>{label}</text>"
            f"<text x={x:.1f} y={bottom + 18} text-anchor=middle>{widest * share:.3g}</text>"
        )
    dots = "".join(
        "<circle cx={} cy={} r=3.5 fill='var(--blue)'/>".format(*at(p.eps, p.value).split(","))
        for p in points
    )
    here = at(judged, 0).split(",")[0]
    return (
        f"<svg viewBox='0 0 640 300' role=img aria-label='accuracy against epsilon'>{marks}"
        f"<line x1={here} x2={here} y1={top} y2={bottom} stroke='var(--dim)' stroke-dasharray='5 4'/>"
        f"<polygon points='{band}' fill='var(--blue)' opacity=.2 />"
        f"<polyline points='{line}' fill=none stroke='var(--blue)' stroke-width=2 />{dots}</svg>"
    )


def _gallery(report: Report, failures: Sequence[dict[str, Any]]) -> str:
    names = {c.label: c.name for c in report.per_class}
    cards = []
    for failure in failures:
        label, taken = (names.get(failure[k], str(failure[k])) for k in ("label", "taken_for"))
        images = "".join(f"<img alt='' src='data:image/png;base64,{data}'>" for data in failure["images"])
        cards.append(
            f"<figure><div>{images}</div><figcaption>{escape(label)}, taken for {escape(taken)}, at {report.norm} "
            f"{failure['distance']:.3g}</figcaption></figure>"
        )
    return (
        "<h2>The nearest failures</h2><p class=dim>Clean, the change (grey: none; scaled to its largest entry), "
        "adversarial: the samples that the smallest changes fool, as FAB found them among some that fell.</p>"
        f"<div class=gallery>{''.join(cards)}</div>"
    )


def _repeat(report: AnyReport) -> str:
    facts = {
        "data": f"{report.data}, {report.split}, digest {report.data_digest[:12]}",
        "model digest": (report.model_digest or "not taken")[:12],
        "threat model": f"{report.norm}, eps {show_number(report.eps)}",
        "seed": str(report.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    rows = "".join(f"<p><span class=dim>{name}:</span> {escape(value)}</p>" for name, value in facts.items())
    command = f"<pre>{escape(report.command)}</pre>" if report.command else ""
    return f"<h2>How to repeat it</h2>{command}{rows}"
