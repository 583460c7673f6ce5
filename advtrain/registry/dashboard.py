"""Registry dashboard: one HTML page with champions, challengers, versions and decisions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from advtrain.evaluation.html import document, html_table
from advtrain.registry.audit_log import Chain, Decision, read_chain
from advtrain.registry.summary import figures_of, interval_of, promotion_of, versions_with_aliases, when

_STYLE = """
a { color: var(--blue); } a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 3px solid var(--blue);
  outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; list-style: none; padding: 0; }
section { margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
details { background: var(--card); border-radius: .4rem; padding: .5rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; } details table { font-size: .85rem; }
details td { white-space: normal; text-align: left; } details th { text-align: left; }
.allowed, .first, .adopted { color: var(--good); } .refused { color: var(--bad); }
.rolled_back { color: var(--warn); } .asked { color: var(--dim); }
.legend span { margin-right: 1.2rem; white-space: nowrap; } .legend i { color: var(--blue); }
details table { min-width: 36rem; }
"""
_SHOWN_ROLES = ("champion", "challenger", "previous")


def build_dashboard(client: Any, names: Sequence[str], store: str, url: str) -> str:
    """Return the dashboard of the given registered models as HTML.

    Args:
        client: client of the MLflow store.
        names: names of the models.
        store: URI of the store, without secrets.
        url: base URL of the links to the MLflow UI.
    """
    return _page(list(names), [_section(client, name, url) for name in names], store, url)


def _page(names: list[str], sections: list[str], store: str, url: str) -> str:
    links = "".join(f"<li><a href='#{escape(name)}'>{escape(name)}</a></li>" for name in names)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    serves = f"server at {escape(url)}"
    if not store.startswith("http"):
        serves = f"start it with <code>mlflow ui --backend-store-uri {escape(store)}</code>; expected at {escape(url)}"
    body = (
        "<a class=skip href='#models'>skip to the models</a><h1>Registered models</h1>"
        f"<p class=dim>Created {now}. The links open the MLflow UI ({serves}).</p>"
        f"<nav aria-label=models><ul>{links}</ul></nav>"
        f"<main id=models>{''.join(sections) or '<p>No model is registered yet.</p>'}</main>"
    )
    return document("Registered models", body, _STYLE)


def _section(client: Any, name: str, url: str) -> str:
    chain = read_chain(client, name)
    shown_versions = versions_with_aliases(client, name, chain)
    tiles = "".join(_tile(role, shown_versions, chain, name, url) for role in _SHOWN_ROLES)
    faults = "".join(f"<p class=failed>The audit log is damaged: {escape(f)}</p>" for f in chain.faults)
    decisions = "".join(_decision(d, name, url) for d in reversed(chain.decisions))
    head = ["version", "aliases", "clean", "robust", "95 % interval", "threat", "suite", "trust", "run"]
    rows = [_row(version, aliases, chain, name, url, client) for version, aliases in reversed(shown_versions)]
    return (
        f"<section id='{escape(name)}' aria-labelledby='h-{escape(name)}'><h2 id='h-{escape(name)}'>"
        f"<a href='{_model(url, name)}'>{escape(name)}</a></h2><div class=tiles>{tiles}</div>{faults}"
        f"<h3>Accuracy by version</h3>{_trend(shown_versions, chain, name, url)}"
        f"<h3>Versions</h3>{html_table(head, rows)}<h3>Decisions, newest first</h3>{decisions or '<p>None.</p>'}"
        "</section>"
    )


def _tile(role: str, shown_versions: list[tuple[Any, list[str]]], chain: Chain, name: str, url: str) -> str:
    version = next((v for v, aliases in shown_versions if role in aliases), None)
    if version is None:
        return f"<div class=tile>{role}<b>none</b></div>"
    tags = figures_of(version, chain)
    robust, clean = (_percent(tags.get(f"advtrain.{kind}_accuracy")) for kind in ("robust", "clean"))
    suite = escape(tags.get("advtrain.suite", "-"))
    trust = tags.get("advtrain.trust", "unchecked")
    promoted_by = promotion_of(chain, str(version.version))
    since = (
        f"<br>since {when(promoted_by)} by {escape(promoted_by.actor)}"
        if promoted_by and role == "champion"
        else ""
    )
    return (
        f"<div class=tile>{role}<b><a href='{_model(url, name)}/versions/{version.version}'>version "
        f"{version.version}</a></b><span class=dim>robust {robust} ({suite}), clean {clean}, "
        f"<span class={escape(trust)}>{escape(trust)}</span>{since}</span></div>"
    )


def _row(version: Any, aliases: list[str], chain: Chain, name: str, url: str, client: Any) -> list[str]:
    known = figures_of(version, chain)
    tags = {key.removeprefix("advtrain."): escape(value) for key, value in known.items()}
    interval = interval_of(known)
    trust = tags.get("trust", "-")
    return [
        f"<a href='{_model(url, name)}/versions/{version.version}'>{version.version}</a>",
        ", ".join(aliases),
        _percent(tags.get("clean_accuracy")),
        _percent(tags.get("robust_accuracy")),
        f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]" if interval is not None else "-",
        tags.get("threat", "-"),
        tags.get("suite", "-"),
        f"<span class={trust}>{trust}</span>",
        _run_link(client, version.run_id, url),
    ]


def _run_link(client: Any, run_id: str | None, url: str) -> str:
    if not run_id:
        return "-"
    try:
        run = client.get_run(run_id)
    except Exception:  # noqa: BLE001 (a deleted run must not cost the page)
        return "unavailable"
    place = f"{url}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
    return f"<a href='{place}'>{escape(run.info.run_name or run_id[:8])}</a>"


def _decision(decision: Decision, name: str, url: str) -> str:
    kind = decision.kind.replace("_", " ")
    failed = [f["rule"] for f in decision.evidence.get("rules", []) if f["verdict"] == "failed"]
    because = f": {', '.join(failed)}" if failed else ""
    said = f" &ldquo;{escape(decision.reason)}&rdquo;" if decision.reason else ""
    rules = [
        [
            f"<span class={f['verdict']}>{f['verdict']}</span>",
            *(escape(f[k]) for k in ("rule", "figures", "threshold")),
        ]
        for f in decision.evidence.get("rules", [])
    ]
    policy = decision.policy
    facts = [
        f"Champion before this decision: {escape(decision.champion or 'none')}.",
        f"Policy {escape(policy['name'])} {policy['version']}, digest {policy['digest'][:12]}."
        if policy
        else "",
        f"Record digest {decision.digest[:12]}.",
    ]
    return (
        f"<details><summary>{decision.sequence}. <b class={decision.kind}>{kind}</b> version {escape(decision.version)}"
        f"{escape(because)}{said} <span class=dim>{when(decision)} by {escape(decision.actor)}</span></summary>"
        f"<p>{' '.join(fact for fact in facts if fact)} "
        f"<a href='{_model(url, name)}/versions/{escape(decision.version)}'>open in MLflow</a></p>"
        + (html_table(["verdict", "rule", "measured", "threshold"], rules) if rules else "")
        + "</details>"
    )


def _trend(shown_versions: list[tuple[Any, list[str]]], chain: Chain, name: str, url: str) -> str:
    """Return an SVG chart of clean and robust accuracy by version, with champions marked."""
    figures = {"advtrain.robust_accuracy", "advtrain.clean_accuracy"}
    shown = [v for v, _ in shown_versions if figures <= v.tags.keys()]
    if not shown:
        return "<p>No version has recorded accuracies.</p>"
    left, right, top, bottom = 52, 620, 14, 250
    step = (right - left) / max(len(shown), 1)

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    marks = "".join(
        f"<line x1={left} x2={right} y1={y(k / 4):.1f} y2={y(k / 4):.1f} stroke='var(--line)'/>"
        f"<text x={left - 6} y={y(k / 4) + 4:.1f} text-anchor=end>{25 * k} %</text>"
        for k in range(5)
    )
    lines: dict[str, list[str]] = {"clean": [], "robust": []}
    dots = ""
    for number, version in enumerate(shown):
        x = left + step * (number + 0.5)
        tags = figures_of(version, chain)
        low, high = interval_of(tags) or (0.0, 0.0)
        dots += f"<line x1={x:.1f} x2={x:.1f} y1={y(low):.1f} y2={y(high):.1f} stroke='var(--blue)' stroke-width=2 />"
        if number % max(1, len(shown) // 12) == 0:
            dots += f"<text x={x:.1f} y={bottom + 18} text-anchor=middle>{version.version}</text>"
        ring = promotion_of(chain, str(version.version)) is not None
        for kind, colour in (("clean", "var(--dim)"), ("robust", "var(--blue)")):
            share = float(tags[f"advtrain.{kind}_accuracy"])
            lines[kind].append(f"{x:.1f},{y(share):.1f}")
            title = f"version {version.version}: {kind} {100 * share:.2f} %"
            circle = (
                f"<circle cx={x:.1f} cy={y(share):.1f} r=4 fill='{colour}'><title>{title}</title></circle>"
            )
            if ring and kind == "robust":
                circle += f"<circle cx={x:.1f} cy={y(share):.1f} r=8 fill=none stroke='var(--good)' stroke-width=2 />"
            place = f"{_model(url, name)}/versions/{version.version}"
            dots += f"<a href='{place}' aria-label='{title}'>{circle}</a>"
    drawn = "".join(
        f"<polyline points='{' '.join(lines[kind])}' fill=none stroke='{colour}' stroke-width=1.5 {dash}/>"
        for kind, colour, dash in (
            ("clean", "var(--dim)", "stroke-dasharray='5 4'"),
            ("robust", "var(--blue)", ""),
        )
    )
    return (
        f"<svg viewBox='0 0 640 280' role=group aria-label='accuracy by version of {escape(name)}'>"
        f"{marks}{drawn}{dots}</svg><p class='dim legend'><span><i>&#9679;</i> robust, with 95 % interval "
        "(blue)</span><span>&#9679; clean (gray, dashed)</span><span>green ring: current or former champion</span></p>"
    )


def _percent(share: str | None) -> str:
    return "-" if share is None else f"{100 * float(share):.2f} %"


def _model(url: str, name: str) -> str:
    return f"{escape(url)}/#/models/{escape(name)}"
