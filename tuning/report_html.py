"""Report of a campaign as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from advtrain.evaluation.html import Html, document, fact_list, fill, html_table, joined
from tuning.choice import budget_rows, score_name, space_rows
from tuning.selection import Candidate
from tuning.trials import Ledger

_STYLE = """
figure img { image-rendering: auto; background: #fff; } figure { margin: 1rem 0; }
li { margin: .3rem 0; }
"""
#: Captions of the figures by file name, in the order of the page.
_CAPTIONS = {
    "front": "Objectives of all trials, and the Pareto front",
    "history": "Score of each trial and best score so far",
    "slices": "Score against each searched path",
    "parallel": "Searched values of every trial; a line is a trial",
    "importances": "Share of the score's variation for each path",
    "budget": "Epochs of each trial",
}

#: Title, columns and rows.
Table = tuple[str, list[str], list[list[str]]]


def build_page(
    ledger: Ledger,
    choices: Sequence[tuple[str, list[str]]],
    tables: Sequence[Table],
    remarks: Sequence[str],
    best: Candidate | None,
    figures: Sequence[Path],
) -> str:
    """Return the page as HTML text.

    Args:
        choices: title and reasons of each winner.
        tables: tables of the report.
        remarks: findings and next steps.
        best: best trial; None: no trial may win.
        figures: PNG files.
    """
    parts = [
        fill("<h1>Campaign {}</h1><p class=dim>{}</p>", ledger.name, ledger.campaign.description),
        fact_list(_facts(ledger)),
    ]
    for title, reasons in choices:
        parts.append(fill("<h2>{}</h2><ol>{}</ol>", title, joined(fill("<li>{}</li>", r) for r in reasons)))
    if not choices:
        parts.append(fill("<h2>No winner</h2><p>No trial may win, or the campaign registers none.</p>"))
    parts += [fill("<h2>{}</h2>{}", _capital(title), html_table(head, rows)) for title, head, rows in tables]
    head = ["path", "distribution", "best trial"]
    parts.append(fill("<h2>Search space</h2>{}", html_table(head, space_rows(ledger, best))))
    parts.append(fill("<h2>Budget</h2>{}", html_table(["", "used", "limit"], budget_rows(ledger))))
    parts.append(
        fill("<h2>Findings and next steps</h2><ul>{}</ul>", joined(fill("<li>{}</li>", r) for r in remarks))
    )
    order = list(_CAPTIONS)
    ordered = sorted(figures, key=lambda path: order.index(path.stem) if path.stem in order else len(order))
    parts.append(fill("<h2>Figures</h2>{}", joined(_figure(path) for path in ordered)))
    return document(f"Campaign {ledger.name}", joined(parts), _STYLE)


def _facts(ledger: Ledger) -> dict[str, str]:
    campaign, base = ledger.campaign, ledger.plan.base
    return {
        "recipe": base.name,
        "objectives": ", ".join(f"{name} {wanted}" for name, wanted in campaign.objectives.items()),
        "score": score_name(ledger),
        "threat model": str(base.evaluation.threat_model),
        "search": f"{campaign.search.algorithm}, seed {campaign.search.seed}",
        "scheduler": str(campaign.ended_by.kind),
        "confirmation": "none"
        if campaign.confirm is None
        else f"the best {campaign.confirm.top} trials, with {campaign.confirm.seeds} further seeds each",
        "resume": f"advtrain tune --resume {ledger.name}",
    }


def _capital(title: str) -> str:
    return title[:1].upper() + title[1:]


def _figure(path: Path) -> Html:
    caption = _CAPTIONS.get(path.stem, path.stem)
    data = base64.b64encode(path.read_bytes()).decode()
    return fill(
        "<figure><img alt='{}' src='data:image/png;base64,{}'><figcaption>{}</figcaption></figure>",
        caption,
        data,
        caption,
    )
