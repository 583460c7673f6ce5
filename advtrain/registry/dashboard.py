"""Registry dashboard: one HTML page with champions, challengers, versions and decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from advtrain.evaluation.html import Html, axis_titles, document, fill, html_table, joined
from advtrain.registry.audit_log import Chain, read_chain
from advtrain.registry.decision import Decision
from advtrain.registry.summary import (
    figures_of,
    interval_of,
    number_of,
    promotion_of,
    versions_with_aliases,
    when,
)
from advtrain.registry.versions import versions
from advtrain.runs.lineage import ANCESTORS_TAG, named_in_tag, version_in

_STYLE = """
a { color: var(--blue); } a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 3px solid var(--blue);
  outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; list-style: none; padding: 0; }
section { margin-top: 2.5rem; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
details { background: var(--card); border-radius: .4rem; padding: .5rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; } details table { font-size: .85rem; }
details td { white-space: normal; text-align: left; } details th { text-align: left; }
.allowed, .first, .adopted { color: var(--good); } .refused { color: var(--bad); }
.rolled_back { color: var(--warn); } .asked { color: var(--dim); }
.legend span { display: inline-block; margin-right: 1.2rem; } .legend i { color: var(--blue); }
details table { min-width: 36rem; }
"""
#: Edges of the chart of accuracies, and the colors of its lines.
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 620, 14, 250
_COLOURS = {"clean": "var(--dim)", "robust": "var(--blue)"}
_SHOWN_ROLES = ("champion", "challenger", "previous")


def build_dashboard(client: Any, names: Sequence[str], store: str, url: str) -> str:
    """Return the dashboard of the given registered models as HTML.

    Args:
        client: client of the MLflow store.
        names: names of the models.
        store: URI of the store, without secrets.
        url: base URL of the links to the MLflow UI.
    """
    children = _children(client, names)
    return _page(list(names), [_section(client, name, url, children) for name in names], store, url)


def _children(client: Any, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the versions that started from, or were taught by, each version, by URI."""
    found: dict[str, list[str]] = {}
    for name in names:
        for version in versions(client, name):
            for ancestor in named_in_tag(version.tags.get(ANCESTORS_TAG)):
                found.setdefault(ancestor.reference, []).append(f"models:/{name}/{version.version}")
    return found


def _page(names: list[str], sections: list[Html], store: str, url: str) -> str:
    links = joined(fill("<li><a href='#{}'>{}</a></li>", name, name) for name in names)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    serves = fill("server at {}", url)
    if not store.startswith("http"):
        serves = fill(
            "start it with <code>mlflow ui --backend-store-uri {}</code>; expected at {}", store, url
        )
    body = fill(
        "<a class=skip href='#models'>skip to the models</a><h1>Registered models</h1>"
        "<p class=dim>Created {}. The links open the MLflow UI ({}).</p>"
        "<nav aria-label=models><ul>{}</ul></nav><main id=models>{}</main>",
        now,
        serves,
        links,
        joined(sections) or fill("<p>No model is registered yet.</p>"),
    )
    return document("Registered models", body, _STYLE)


def _section(client: Any, name: str, url: str, children: Mapping[str, list[str]]) -> Html:
    chain = read_chain(client, name)
    shown_versions = versions_with_aliases(client, name, chain)
    head = ["version", "aliases", "clean", "robust", "95 % interval", "threat", "suite", "trust", "run"]
    rows = [_row(version, aliases, chain, name, url, client) for version, aliases in reversed(shown_versions)]
    related = [_related(version, children, url) for version, _ in reversed(shown_versions)]
    if any(related):
        head.append("ancestors and descendants")
        rows = [[*row, cell or "-"] for row, cell in zip(rows, related, strict=True)]
    decisions = [_decision(number, d, name, url) for number, d in enumerate(chain.records, 1)]
    return fill(
        "<section id='{}' aria-labelledby='h-{}'><h2 id='h-{}'><a href='{}'>{}</a></h2><div class=tiles>{}</div>{}"
        "<h3>Accuracy by version</h3>{}<h3>Versions</h3>{}<h3>Decisions, newest first</h3>{}</section>",
        name,
        name,
        name,
        _model(url, name),
        name,
        joined(_tile(role, shown_versions, chain, name, url) for role in _SHOWN_ROLES),
        joined(fill("<p class=failed>The audit log is damaged: {}</p>", fault) for fault in chain.faults),
        _trend(shown_versions, chain, name, url),
        html_table(head, rows),
        joined(decisions[::-1]) or fill("<p>None.</p>"),
    )


def _tile(role: str, shown_versions: list[tuple[Any, list[str]]], chain: Chain, name: str, url: str) -> Html:
    version = next((v for v, aliases in shown_versions if role in aliases), None)
    if version is None:
        return fill("<div class=tile>{}<b>none</b></div>", role)
    tags = figures_of(version, chain)
    robust, clean = (_percent(tags.get(f"advtrain.{kind}_accuracy")) for kind in ("robust", "clean"))
    promoted_by = promotion_of(chain, str(version.version))
    since = (
        fill("<br>since {} by {}", when(promoted_by), promoted_by.actor)
        if promoted_by and role == "champion"
        else ""
    )
    return fill(
        "<div class=tile>{}<b><a href='{}'>version {}</a></b>"
        "<span class=dim>robust {} ({}), clean {}, {}{}</span></div>",
        role,
        _version(url, name, version.version),
        version.version,
        robust,
        tags.get("advtrain.suite", "-"),
        clean,
        _marked(tags.get("advtrain.trust", "unchecked")),
        since,
    )


def _row(version: Any, aliases: list[str], chain: Chain, name: str, url: str, client: Any) -> list[str]:
    known = figures_of(version, chain)
    tags = {key.removeprefix("advtrain."): value for key, value in known.items()}
    interval = interval_of(known)
    return [
        fill("<a href='{}'>{}</a>", _version(url, name, version.version), version.version),
        ", ".join(aliases),
        _percent(tags.get("clean_accuracy")),
        _percent(tags.get("robust_accuracy")),
        f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]" if interval is not None else "-",
        tags.get("threat", "-"),
        tags.get("suite", "-"),
        _marked(tags.get("trust", "-")),
        _run_link(client, version.run_id, url),
    ]


def _related(version: Any, children: Mapping[str, list[str]], url: str) -> Html:
    """Return links to the ancestors and the descendants of a version; empty if there are none."""
    named = named_in_tag(version.tags.get(ANCESTORS_TAG))
    lines = [(f"{ancestor.role}:", ancestor.reference) for ancestor in named]
    lines += [("used by", child) for child in children.get(f"models:/{version.name}/{version.version}", [])]
    return joined(fill("{} {}<br>", what, _reference(reference, url)) for what, reference in lines)


def _reference(reference: str, url: str) -> str:
    """Return a reference to a model, as a link if it is a version of this server."""
    version = version_in(reference)
    return reference if version is None else fill("<a href='{}'>{}</a>", _version(url, *version), reference)


def _run_link(client: Any, run_id: str | None, url: str) -> str:
    if not run_id:
        return "-"
    try:
        run = client.get_run(run_id)
    except Exception:  # noqa: BLE001 (a deleted run must not cost the page)
        return "unavailable"
    place = f"{url}/#/experiments/{run.info.experiment_id}/runs/{run_id}?workflowType=machine_learning"
    return fill("<a href='{}'>{}</a>", place, run.info.run_name or run_id[:8])


def _decision(number: int, decision: Decision, name: str, url: str) -> Html:
    failed = [finding.rule for finding in decision.findings if finding.verdict == "failed"]
    policy = decision.policy
    facts = [
        f"Champion before this decision: {decision.champion or 'none'}.",
        f"Policy {policy['name']} {policy['version']}, digest {str(policy['digest'])[:12]}."
        if policy
        else "",
        f"Record digest {decision.digest[:12]}.",
    ]
    rules = [[_marked(f.verdict), f.rule, f.figures, f.threshold] for f in decision.findings]
    return fill(
        "<details><summary>{}. <b class='{}'>{}</b> version {}{}{} <span class=dim>{} by {}</span></summary>"
        "<p>{} <a href='{}'>open in MLflow</a></p>{}</details>",
        number,
        decision.kind,
        decision.kind.replace("_", " "),
        decision.version,
        f": {', '.join(failed)}" if failed else "",
        fill(" \u201c{}\u201d", decision.reason) if decision.reason else "",
        when(decision),
        decision.actor,
        " ".join(fact for fact in facts if fact),
        _version(url, name, decision.version),
        html_table(["verdict", "rule", "measured", "threshold"], rules) if rules else "",
    )


def _marked(verdict: str) -> Html:
    """Return a verdict or a trust in its color."""
    return fill("<span class='{}'>{}</span>", verdict, verdict)


def _trend(shown_versions: list[tuple[Any, list[str]]], chain: Chain, name: str, url: str) -> Html:
    """Return an SVG chart of clean and robust accuracy by version, with champions marked."""
    tagged = [(version, figures_of(version, chain)) for version, _ in shown_versions]
    shown = [(v, tags) for v, tags in tagged if None not in (_share(tags, "clean"), _share(tags, "robust"))]
    if not shown:
        return fill("<p>No version has recorded accuracies.</p>")
    step = (_RIGHT - _LEFT) / len(shown)
    marks = "".join(
        f"<line x1={_LEFT} x2={_RIGHT} y1={_y(k / 4):.1f} y2={_y(k / 4):.1f} stroke='var(--line)'/>"
        f"<text x={_LEFT - 6} y={_y(k / 4) + 4:.1f} text-anchor=end>{25 * k}</text>"
        for k in range(5)
    )
    lines: dict[str, list[str]] = {"clean": [], "robust": []}
    dots: list[Html] = []
    for number, (version, tags) in enumerate(shown):
        x = _LEFT + step * (number + 0.5)
        for kind in lines:
            lines[kind].append(f"{x:.1f},{_y(_share(tags, kind) or 0.0):.1f}")
        ring = promotion_of(chain, str(version.version)) is not None
        dots.append(_dots(x, version.version, tags, ring, _version(url, name, version.version)))
        if number % max(1, len(shown) // 12) == 0:
            label = fill(
                "<text x={} y={} text-anchor=middle>{}</text>", f"{x:.1f}", _BOTTOM + 18, version.version
            )
            dots.append(label)
    drawn = "".join(
        f"<polyline points='{' '.join(lines[kind])}' fill=none stroke='{_COLOURS[kind]}' stroke-width=1.5 {dash}/>"
        for kind, dash in (("clean", "stroke-dasharray='5 4'"), ("robust", ""))
    )
    return fill(
        "<svg viewBox='0 0 640 296' role=group aria-label='accuracy by version of {}'>{}{}{}{}</svg>"
        "<p class='dim legend'><span><i>&#9679;</i> robust, with 95 % interval (blue)</span>"
        "<span>&#9679; clean (gray, dashed)</span><span>green ring: current or former champion</span></p>",
        name,
        Html(marks),
        axis_titles("version", "accuracy, %", (_LEFT + _RIGHT) / 2, _BOTTOM + 40, 14, (_TOP + _BOTTOM) / 2),
        joined(dots),
        Html(drawn),
    )


def _dots(x: float, number: object, tags: dict[str, str], ring: bool, place: str) -> Html:
    """Return the interval and both accuracies of one version, as links to `place`."""
    low, high = interval_of(tags) or (0.0, 0.0)
    parts = [
        Html(
            f"<line x1={x:.1f} x2={x:.1f} y1={_y(low):.1f} y2={_y(high):.1f} stroke='var(--blue)' stroke-width=2 />"
        )
    ]
    for kind, colour in _COLOURS.items():
        share = _share(tags, kind) or 0.0
        title = f"version {number}: {kind} {100 * share:.2f} %"
        at = f"cx={x:.1f} cy={_y(share):.1f}"
        ringed = Html(
            f"<circle {at} r=8 fill=none stroke='var(--good)' stroke-width=2 />"
            if ring and kind == "robust"
            else ""
        )
        circle = fill("<circle {} r=4 fill='{}'><title>{}</title></circle>", Html(at), colour, title)
        parts.append(fill("<a href='{}' aria-label='{}'>{}{}</a>", place, title, circle, ringed))
    return joined(parts)


def _y(share: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * share


def _share(tags: dict[str, str], kind: str) -> float | None:
    return number_of(tags.get(f"advtrain.{kind}_accuracy"))


def _percent(share: str | None) -> str:
    value = number_of(share)
    return "-" if value is None else f"{100 * value:.2f} %"


def _model(url: str, name: str) -> str:
    return f"{url}/#/models/{quote(name, safe='')}"


def _version(url: str, name: str, version: object) -> str:
    return f"{_model(url, name)}/versions/{version}"
