"""Figures of a study: robust accuracy per epoch, and clean against robust accuracy."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from advtrain.evaluation.figures import new_figure
from tuning.study.results import Result, Row, label

#: Line styles to combine with the ten colors, so that more than ten rows can be distinguished.
STYLES = ("-", "--", ":")


def draw_curves(rows: dict[Row, list[Result]], path: Path) -> None:
    """Draw validation robust accuracy per epoch, mean over seeds; one panel per architecture."""
    figure, panels = _panels(rows, 4.6)
    for panel, drawn in panels:
        for number, row in enumerate(drawn):
            lines = [[(x["epoch"], x.get("val_robust_accuracy")) for x in c.lines] for c in rows[row]]
            epochs = [e for e, v in min(lines, key=len) if v is not None]
            values = [[v for _, v in line if v is not None][: len(epochs)] for line in lines]
            panel.plot(
                epochs,
                100 * np.mean(values, axis=0),
                color=f"C{number % 10}",
                linestyle=STYLES[number // 10 % 3],
                label=label(row, drawn),
            )
        panel.set(xlabel="epoch", ylabel="validation robust accuracy, %")
        panel.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)


def draw_front(rows: dict[Row, list[Result]], path: Path) -> None:
    """Draw clean against robust test accuracy, with Pareto fronts; one panel per architecture."""
    figure, panels = _panels(rows, 5.6)
    for panel, drawn in panels:
        points = {
            row: (100 * fmean(c.clean for c in rows[row]), 100 * fmean(c.robust for c in rows[row]))
            for row in drawn
        }
        best = sorted(pareto(list(points.values())))
        panel.plot([x for x, _ in best], [y for _, y in best], color="0.6", linewidth=1, zorder=1)
        for row, place in _label_places(points).items():
            edge = "black" if points[row] in best else "none"
            panel.scatter(*points[row], color="C0", edgecolor=edge, zorder=2)
            line = {"arrowstyle": "-", "color": "0.75", "linewidth": 0.5}
            panel.annotate(
                f"  {label(row, drawn)}", points[row], place, fontsize=7, va="center", arrowprops=line
            )
        panel.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
        panel.margins(x=0.15)
    figure.suptitle("test split; lines join the Pareto fronts", fontsize=10)
    figure.savefig(path, dpi=120)


def _panels(rows: dict[Row, list[Result]], height: float) -> tuple[Any, list[tuple[Any, list[Row]]]]:
    """Return a figure and, for each architecture, its panel and its rows."""
    architectures = sorted({row[1] for row in rows})
    figure, axes = new_figure(6.4 * len(architectures), height, 1, len(architectures))
    panels = []
    for panel, architecture in zip(np.atleast_1d(np.asarray(axes)).flat, architectures, strict=True):
        panel.set_title(architecture)
        panel.grid(alpha=0.3)
        panels.append((panel, [row for row in rows if row[1] == architecture]))
    return figure, panels


def _label_places(points: dict[Row, tuple[float, float]]) -> dict[Row, tuple[float, float]]:
    """Return each point's label position: next to it, or lower to avoid other labels."""
    width, height = (max(v) - min(v) or 1.0 for v in zip(*points.values(), strict=True))
    places: dict[Row, tuple[float, float]] = {}
    for row, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        while any(abs(x - a) < 0.25 * width and abs(y - b) < 0.024 * height for a, b in places.values()):
            y -= 0.005 * height
        places[row] = (x, y)
    return places


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats in one coordinate without losing in the other."""
    return [p for p in points if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)]
