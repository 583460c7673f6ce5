"""Curve and gallery of an evaluation under edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from advtrain.evaluation.edits import EditResults
from advtrain.evaluation.html import Html, fill, joined
from advtrain.evaluation.report import CurvePoint, Report
from advtrain.evaluation.statistics import Share
from advtrain.recipe.edits import EditThreatConfig
from advtrain.text import printable

#: Texts of the gallery.
GALLERY_SIZE = 12


def edit_curve(samples: EditResults, config: EditThreatConfig) -> list[CurvePoint]:
    """Return the accuracy of all texts within 0, 1, ..., `at_most` edits."""
    points = []
    for edits in range(config.at_most + 1):
        share = Share.of(samples.clean & samples.robust_within(edits))
        points.append(CurvePoint(eps=float(edits), value=share.value, low=share.low, high=share.high))
    return points


def shortest_edits(samples: EditResults) -> list[dict[str, Any]]:
    """Return broken texts for the gallery: the fewest edits first, then the shortest texts."""
    broken = np.flatnonzero(samples.clean & ~samples.robust)
    rows = sorted(
        broken.tolist(), key=lambda row: (samples.verdicts[row]["broken_at"], len(samples.texts[row]), row)
    )
    return [
        {
            "row": row,
            "label": int(samples.labels[row]),
            "predicted_as": int(samples.adv_predictions[row]),
            "distance": float(samples.verdicts[row]["broken_at"]),
            "text": samples.texts[row],
            "changes": list(samples.verdicts[row]["changes"]),
        }
        for row in rows[:GALLERY_SIZE]
    ]


def edit_gallery(report: Report, failures: Sequence[dict[str, Any]], names: Mapping[int, str]) -> Html:
    """Return the gallery of broken texts as HTML, with the edits marked."""
    cards = []
    for failure in failures:
        known = {-1: "no class"} | dict(names)
        label, taken = (known.get(failure[k], str(failure[k])) for k in ("label", "predicted_as"))
        text, number = marked(failure["text"], failure["changes"]), len(failure["changes"])
        edits = "1 edit" if number == 1 else f"{number} edits"
        caption = fill("<figcaption>{}, predicted as {}, {}</figcaption>", label, taken, edits)
        cards.append(fill("<figure><p>{}</p>{}</figure>", text, caption))
    return fill(
        "<h2>Broken texts</h2><p class=dim>The found texts with the fewest edits. Removed characters are struck out, "
        "new ones are underlined.</p><div class=gallery>{}</div>",
        joined(cards),
    )


def marked(text: str, changes: Sequence[dict[str, Any]]) -> Html:
    """Return a text as HTML, with removed characters in <del> and new ones in <ins>.

    `changes` replace text[start:end], which is `old`, by `new`, in the order of their places.
    """
    parts, position = [], 0
    for change in changes:
        parts.append(_plain(text[position : change["start"]]))
        pairs = (("del", change["old"]), ("ins", change["new"]))
        parts += [Html(f"<{tag}>{_plain(found)}</{tag}>") for tag, found in pairs if found]
        position = change["end"]
    return joined([*parts, _plain(text[position:])])


def _plain(text: str) -> Html:
    """Return escaped text that keeps its blanks at both ends, unlike `fill`."""
    return Html(escape(printable(text)))
