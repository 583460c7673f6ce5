"""Figures of a campaign: history, slices, parallel coordinates, importances, front, budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from advtrain.evaluation.figures import new_figure
from tuning.campaign import OBJECTIVES
from tuning.choice import score_name
from tuning.selection import Candidate
from tuning.space import Distribution
from tuning.trials import Ledger, Trial

#: Colors that color-blind readers can distinguish, and that differ in lightness.
COLOURS = {"finished": "#0072b2", "stopped": "#e69f00", "failed": "#d55e00", "running": "#999999"}


def draw_all(
    ledger: Ledger, found: list[Candidate], winners: list[str], importances: dict[str, float], folder: Path
) -> None:
    """Delete old figures, then write each figure that the campaign has data for."""
    for path in folder.glob("*.png"):
        path.unlink()
    measured = [(t, line) for t in ledger.searched if (line := t.best()) is not None]
    if not measured:
        return
    _draw_history(ledger, measured, folder / "history.png")
    _draw_slices(ledger, measured, folder / "slices.png")
    _draw_budget(ledger, folder / "budget.png")
    if len(ledger.plan.space) > 1:
        _draw_parallel(ledger, measured, folder / "parallel.png")
    if importances:
        _draw_importances(importances, len(found), folder / "importances.png")
    if len(ledger.campaign.objectives) > 1:
        _draw_front(ledger, measured, found, winners, folder / "front.png")


Measured = list[tuple[Trial, dict[str, Any]]]


def _draw_history(ledger: Ledger, measured: Measured, path: Path) -> None:
    """Draw each trial's score against its number, and the best score so far."""
    figure, panel = new_figure(7.0, 4.0)
    scores = [ledger.campaign.score(line) for _, line in measured]
    for status, colour in COLOURS.items():
        chosen = [n for n, (trial, _) in enumerate(measured) if trial.status == status]
        if chosen:
            xs = [measured[n][0].number for n in chosen]
            panel.scatter(xs, [scores[n] for n in chosen], s=22, color=colour, label=_status(status))
    valid = [(t.number, s) for (t, _), s in zip(measured, scores, strict=True) if not t.disqualified()]
    if valid:
        numbers, bests = zip(*valid, strict=True)
        panel.step(
            numbers, np.maximum.accumulate(bests), where="post", color="0.4", linewidth=1, label="best so far"
        )
    panel.set_xlabel("trial")
    panel.set_ylabel(_score_name(ledger), fontsize=8)
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _draw_slices(ledger: Ledger, measured: Measured, path: Path) -> None:
    """Draw the score against the value of each path, with later trials darker."""
    from matplotlib.ticker import NullFormatter

    space = ledger.plan.space
    columns = min(3, len(space))
    rows = -(-len(space) // columns)
    figure, panels = new_figure(3.4 * columns, 3.0 * rows, rows, columns)
    flat = list(np.atleast_1d(np.asarray(panels)).flat)
    scores = [ledger.campaign.score(line) for _, line in measured]
    numbers = [trial.number for trial, _ in measured]
    for panel, (name, distribution) in zip(flat, space.items(), strict=False):
        raws = [ledger.point(trial)[name] for trial, _ in measured]
        ticks, (low, high) = distribution.choice, distribution.bounds
        xs = [ticks.index(raw) for raw in raws] if ticks is not None else raws
        panel.scatter(xs, scores, c=numbers, cmap="viridis_r", s=18)
        if ticks is not None:
            panel.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        elif distribution.log:
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter("{x:.0e}" if high / low < 10 else NullFormatter())
        panel.set_xlabel(distribution.label(name), fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in flat[len(space) :]:
        panel.set_axis_off()
    figure.supylabel(_score_name(ledger), fontsize=8)
    figure.savefig(path, dpi=120)


def _draw_parallel(ledger: Ledger, measured: Measured, path: Path) -> None:
    """Draw one line per trial through its values, with the best trials dark and on top."""
    space = ledger.plan.space
    figure, panel = new_figure(max(7.0, 1.7 * (len(space) + 1)), 4.2)
    scores = np.array([ledger.campaign.score(line) for _, line in measured])
    span = float(np.ptp(scores)) or 1.0
    shares = (scores - scores.min()) / span
    for n in np.argsort(scores):
        point = ledger.point(measured[n][0])
        heights = [_height(distribution, point[name]) for name, distribution in space.items()]
        panel.plot([*heights, shares[n]], color=_shade(shares[n]), linewidth=1 + shares[n], alpha=0.85)
    names = [*(distribution.label(name) for name, distribution in space.items()), _score_name(ledger)]
    panel.set_xticks(range(len(names)), names, fontsize=7, rotation=12)
    panel.set_yticks([])
    for x, (low, high) in enumerate(
        [*map(_ends, space.values()), (f"{scores.min():.3g}", f"{scores.max():.3g}")]
    ):
        panel.axvline(x, color="0.6", linewidth=0.8, zorder=0)
        panel.annotate(low, (x, -0.03), ha="center", va="top", fontsize=7, annotation_clip=False)
        panel.annotate(high, (x, 1.02), ha="center", va="bottom", fontsize=7, annotation_clip=False)
    panel.set_ylim(-0.1, 1.1)
    for side in panel.spines.values():
        side.set_visible(False)
    figure.savefig(path, dpi=120)


def _height(distribution: Distribution, raw: Any) -> float:
    if distribution.choice is not None:
        return distribution.choice.index(raw) / (len(distribution.choice) - 1)
    return distribution.to_unit(raw)


def _ends(distribution: Distribution) -> tuple[str, str]:
    ends = distribution.extremes()
    low, high = ends[0], ends[-1]
    return (str(low), str(high)) if distribution.choice is not None else (f"{low:.3g}", f"{high:.3g}")


def _shade(share: float) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis_r"](0.1 + 0.9 * float(share))


def _draw_importances(importances: dict[str, float], count: int, path: Path) -> None:
    """Draw each path's share of the score's variation."""
    figure, panel = new_figure(6.4, 1.2 + 0.35 * len(importances))
    names = list(importances)[::-1]
    bars = panel.barh(names, [100 * importances[name] for name in names], color=COLOURS["finished"])
    panel.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    panel.set_xlabel(f"share of the score's variation, % (fANOVA, {count} trials, a rough guide)", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.margins(x=0.12)
    figure.savefig(path, dpi=120)


def _draw_front(
    ledger: Ledger, measured: Measured, found: list[Candidate], winners: list[str], path: Path
) -> None:
    """Draw the first two objectives against each other, with the Pareto front and the winners."""
    first, second = list(ledger.campaign.objectives)[:2]
    scale = 100.0 if first.endswith("accuracy") else 1.0
    figure, panel = new_figure(6.0, 5.0)
    out = [line for trial, line in measured if trial.disqualified()]
    if out:
        panel.scatter(
            [scale * x[second] for x in out],
            [scale * x[first] for x in out],
            s=22,
            color="0.7",
            label="disqualified",
        )
    points = [(scale * c.figures[second], scale * c.figures[first]) for c in found]
    if points:
        panel.scatter(*zip(*points, strict=True), s=22, color=COLOURS["finished"], label="trials")
    front = sorted(point for c, point in zip(found, points, strict=True) if c.on_front)
    if front:
        panel.plot(*zip(*front, strict=True), color="0.4", linewidth=1, zorder=0, label="Pareto front")
    for candidate, point in zip(found, points, strict=True):
        if candidate.trial.label in winners:
            panel.annotate(f"{candidate.trial.label}  ", point, fontsize=8, ha="right", va="center")
            panel.scatter(*point, s=70, facecolor="none", edgecolor="black")
    unit = ", %" if scale == 100 else ""
    panel.set(
        xlabel=f"validation {second.replace('_', ' ')}{unit}",
        ylabel=f"validation {first.replace('_', ' ')}{unit}",
    )
    if front:
        _look_at(panel, front, points, scale)
    if not OBJECTIVES[first]:
        panel.invert_xaxis()
        panel.invert_yaxis()
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _look_at(
    panel: Any, front: list[tuple[float, float]], points: list[tuple[float, float]], scale: float
) -> None:
    """Zoom in on the Pareto front, with a margin of 15 percentage points.

    The title states how many trials lie outside. Regression errors are shown in full.
    """
    if scale == 1.0:
        return
    xs, ys = (np.array(values) for values in zip(*front, strict=True))
    left, low = xs.min() - 15, ys.min() - 15
    outside = sum(x < left or y < low for x, y in points)
    if outside:
        panel.set(xlim=(left, xs.max() + 1), ylim=(low, ys.max() + 1))
        panel.set_title(f"{outside} trials lie outside, below or to the left", fontsize=8)


def _draw_budget(ledger: Ledger, path: Path) -> None:
    """Draw the number of epochs that each trial trained."""
    figure, panel = new_figure(7.0, 3.0)
    for status, colour in COLOURS.items():
        chosen = [trial for trial in ledger.searched if trial.status == status]
        if chosen:
            epochs = [len(trial.run.metrics()) for trial in chosen]
            panel.bar([trial.number for trial in chosen], epochs, color=colour, label=_status(status))
    total = sum(len(trial.run.metrics()) for trial in ledger.trials)
    wall = ledger.facts()["spent"].get("wall", 0.0)
    panel.set(xlabel="trial", ylabel="epochs", title=f"{total} epochs in {wall:,.0f} s")
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _status(status: str) -> str:
    return {"finished": "trained to the end", "stopped": "ended early"}.get(status, status)


def _score_name(ledger: Ledger) -> str:
    return f"validation {score_name(ledger)}"
