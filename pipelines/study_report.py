"""Finished cells -> the study's report: tables with spreads and significance, curves, the Pareto front."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from advtrain.checkpoint import robustness
from advtrain.lookup import UserError
from advtrain.runfolder import write_atomically
from pipelines.study import AXES, Study
from pipelines.study_pictures import draw_curves, draw_front
from pipelines.study_result import Result, Row, label, rows_of

COLUMNS = ["", "clean, %", "robust, %", "vs baseline", "gap, points", "s an epoch", "s to 95 %"]


@dataclass
class StudyReport:
    """What was written: tables for a terminal, figures for MLflow."""

    tables: list[tuple[str, list[str], list[list[str]]]]
    metrics: dict[str, float]


def write_report(study: Study, results: list[Result], folder: Path) -> StudyReport:
    """Write report.md, results.json, curves and fronts; return tables and figures."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    tables, text = [], [f"# Study {study.name}\n\n{study.description}\n"]
    for dataset in study.datasets:
        rows = rows_of(dataset, results)
        if not rows:
            text.append(f"## {dataset}\n\nEvery training failed.\n")
            continue
        first = next(iter(rows.values()))[0].report
        assert first is not None
        judged = f"{first.robust.total:,} test samples, {first.threat}, {first.attacks[0].name}"
        title = f"{dataset}: {judged}, {len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
        table, figures = table_of(study, rows)
        tables.append((title, COLUMNS, table))
        metrics |= {f"{dataset}/{key}": value for key, value in figures.items()}
        draw_curves(rows, folder / f"{dataset}-curves.png")
        draw_front(rows, folder / f"{dataset}-front.png")
        text += [
            f"## {title}\n",
            markdown(table),
            f"![curves]({dataset}-curves.png)",
            f"![front]({dataset}-front.png)\n",
        ]
    text.append(_legend(study))
    failed = [result for result in results if result.failure]
    text += [f"- failed: {result.cell.name}: {result.failure}" for result in failed]
    write_atomically(folder / "report.md", "\n".join(text) + "\n")
    values = [
        {
            **dict(zip(AXES, r.cell.row, strict=True)),
            "seed": r.cell.seed,
            "failure": r.failure,
            "clean_accuracy": r.clean,
            "robust_accuracy": r.robust,
            "train_robust_accuracy": r.train_robust,
            "guard_recoveries": r.recoveries,
        }
        for r in results
    ]
    write_atomically(folder / "results.json", json.dumps(values, indent=1))
    return StudyReport(tables, metrics)


def table_of(study: Study, rows: dict[Row, list[Result]]) -> tuple[list[list[str]], dict[str, float]]:
    """Return the table's cells as text, and its figures by `ROW/FIGURE`."""
    goal = {row: 0.95 * best_validation(row, rows) for row in rows}
    compared = {row: _baseline(study, row) for row in rows}
    pairs = {
        row: p_value(rows[row], rows[base]) for row, base in compared.items() if base in rows and base != row
    }
    adjusted = holm(pairs)
    table: list[list[str]] = []
    figures: dict[str, float] = {}
    for row, cells in rows.items():
        times = [time_to(goal[row], cell.lines) for cell in cells]
        reached = [t for t in times if t is not None]
        versus = _mark(cells, rows.get(compared[row]), adjusted.get(row))
        table.append(
            [
                label(row, rows) + (" (guard)" if any(cell.recoveries for cell in cells) else ""),
                _spread([100 * cell.clean for cell in cells]),
                _spread([100 * cell.robust for cell in cells]),
                "baseline" if compared[row] == row else versus,
                _spread([100 * (cell.train_robust - cell.robust) for cell in cells], sign="+"),
                f"{fmean(line['epoch_seconds'] for cell in cells for line in cell.lines):.1f}",
                f"{median(reached):.1f}" if len(reached) == len(times) else "-",
            ]
        )
        for name in ("clean", "robust"):
            figures[f"{'/'.join(row[1:])}/{name}_accuracy"] = fmean(getattr(cell, name) for cell in cells)
    return table, figures


def _baseline(study: Study, row: Row) -> Row:
    """Return the row that differs from `row` in the baseline's axis alone."""
    ((axis, name),) = study.baseline.items()
    values = list(row)
    values[AXES.index(axis)] = name
    return (values[0], values[1], values[2], values[3])


def best_validation(row: Row, rows: dict[Row, list[Result]]) -> float:
    """Return the best validation robust accuracy that any cell of the table reached on this architecture."""
    cells = [cell for other, found in rows.items() if other[1] == row[1] for cell in found]
    return max(robustness(line) for cell in cells for line in cell.lines)


def time_to(goal: float, lines: list[dict[str, Any]]) -> float | None:
    """Return the training seconds until validation robust accuracy is at `goal`; None if it never is."""
    seconds = 0.0
    for line in lines:
        seconds += float(line["epoch_seconds"])
        if robustness(line) >= goal:
            return seconds
    return None


def p_value(ours: list[Result], baseline: list[Result]) -> float:
    """Return the two-sided p-value of "equally robust": an exact sign test over the test samples.

    A sample speaks for the row in which it stands under more of the seeds that both have. With one seed this is
    McNemar's exact test.

    Raises:
        UserError: the two were judged on different samples.
    """
    from scipy.stats import binomtest

    theirs = {cell.cell.seed: cell.standing for cell in baseline}
    shared = [(cell.standing, theirs[cell.cell.seed]) for cell in ours if cell.cell.seed in theirs]
    if any(len(a) != len(b) for a, b in shared):
        raise UserError("two cells were judged on different samples; they cannot be compared")
    if not shared:
        return 1.0
    difference = sum(a.astype(int) - b.astype(int) for a, b in shared)
    better, worse = int(np.sum(difference > 0)), int(np.sum(difference < 0))
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def holm(values: dict[Row, float]) -> dict[Row, float]:
    """Return p-values adjusted for their number (Holm 1979)."""
    adjusted, least = {}, 0.0
    for rank, (row, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(values) - rank) * p))
        adjusted[row] = least
    return adjusted


def _mark(ours: list[Result], baseline: list[Result] | None, p: float | None) -> str:
    if baseline is None or p is None:
        return "no baseline"
    difference = 100 * (fmean(cell.robust for cell in ours) - fmean(cell.robust for cell in baseline))
    stars = "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else "n.s."
    return f"{difference:+.1f} {stars}"


def _spread(values: list[float], sign: str = "") -> str:
    mean = f"{fmean(values):{sign}.1f}"
    return f"{mean} ± {stdev(values):.1f}" if len(values) > 1 else mean


def markdown(table: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


def _legend(study: Study) -> str:
    ((axis, name),) = study.baseline.items()
    return (
        "Figures are means over seeds, ± their standard deviation, of the checkpoint that was most robust on the "
        f"validation split. *vs baseline*: robust points above the {axis} {name}, with an exact sign test over the "
        "test samples, adjusted for the number of rows (Holm): * p < 0.05, ** p < 0.01, *** p < 0.001, n.s. not "
        f"significant. *gap*: robust accuracy on {study.gap_samples:,} training samples minus that on the test "
        "split. *s to 95 %*: training seconds until validation robust accuracy reached 95 % of the best that any "
        "row reached with the same architecture. Seconds are those of one core that shares the machine with other "
        "trainings. (guard): catastrophic overfitting was noticed and undone.\n"
    )
