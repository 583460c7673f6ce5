"""Report of a study: tables with spread and significance, training curves, Pareto fronts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev, variance
from typing import Any

import numpy as np
from scipy.stats import binom
from scipy.stats import t as t_distribution

from advtrain.documents import dump_json
from advtrain.errors import UserError
from advtrain.runs.checkpoint import robustness
from advtrain.runs.folder import write_atomically
from tuning.study.figures import draw_curves, draw_front
from tuning.study.grid import AXES, Study
from tuning.study.results import Result, Row, label, rows_of
from tuning.text import markdown

COLUMNS = ["", "clean, %", "robust, %", "vs baseline", "gap, points", "s an epoch", "s to 95 %"]


@dataclass
class StudyReport:
    """Content of a report: tables for the terminal, metrics for MLflow."""

    tables: list[tuple[str, list[str], list[list[str]]]]
    metrics: dict[str, float]


def write_report(study: Study, results: list[Result], folder: Path) -> StudyReport:
    """Write report.md, results.json, curves and fronts; return tables and metrics."""
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
        attacks = " + ".join(attack.name for attack in first.attacks)
        judged = f"{first.robust.total:,} test samples, {first.threat}, {attacks}"
        count = len({cell.cell.seed for cells in rows.values() for cell in cells})
        title = f"{dataset}: {judged}, {count} seed{'s' if count > 1 else ''}"
        table, figures = table_of(study, rows)
        tables.append((title, COLUMNS, table))
        metrics |= {f"{dataset}/{key}": value for key, value in figures.items()}
        draw_curves(rows, folder / f"{dataset}-curves.png")
        draw_front(rows, folder / f"{dataset}-front.png")
        text += [
            f"## {title}\n",
            markdown(COLUMNS, table),
            f"![curves]({dataset}-curves.png)",
            f"![front]({dataset}-front.png)\n",
        ]
    text.append(_legend(study))
    text += [f"- trained first, {result}" for result in results if result.cell.is_source]
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
    write_atomically(folder / "results.json", dump_json(values, indent=1))
    return StudyReport(tables, metrics)


def table_of(study: Study, rows: dict[Row, list[Result]]) -> tuple[list[list[str]], dict[str, float]]:
    """Return the table's cells as text, and its metrics by `ROW/METRIC`."""
    goal = {row: 0.95 * best_validation(row, rows) for row in rows}
    compared = {row: _baseline(study, row) for row in rows}
    pairs = {
        row: shared
        for row, base in compared.items()
        if base in rows and base != row and (shared := shared_seeds(rows[row], rows[base]))
    }
    over_seeds = {row: p_seeds(shared, rows) for row, shared in pairs.items()}
    # A difference must be significant over samples and over seeds, so the larger p-value counts.
    adjusted = holm({row: max(p_samples(shared), over_seeds[row] or 0.0) for row, shared in pairs.items()})
    table: list[list[str]] = []
    figures: dict[str, float] = {}
    for row, cells in rows.items():
        times = [time_to(goal[row], cell.lines) for cell in cells]
        reached = [t for t in times if t is not None]
        gain = fmean(a.robust - b.robust for a, b in pairs[row]) if row in pairs else None
        versus = _mark(gain, adjusted.get(row), one_seed=over_seeds.get(row) is None)
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
    """Return the baseline row: it differs from `row` only in the baseline's axis."""
    ((axis, name),) = study.baseline.items()
    values = list(row)
    values[AXES.index(axis)] = name
    return (values[0], values[1], values[2], values[3])


def best_validation(row: Row, rows: dict[Row, list[Result]]) -> float:
    """Return the best validation robust accuracy of all cells with the architecture of `row`."""
    cells = [cell for other, found in rows.items() if other[1] == row[1] for cell in found]
    return max(robustness(line) for cell in cells for line in cell.lines)


def time_to(goal: float, lines: list[dict[str, Any]]) -> float | None:
    """Return the training seconds until validation robust accuracy reaches `goal`, or None."""
    seconds = 0.0
    for line in lines:
        seconds += float(line["epoch_seconds"])
        if robustness(line) >= goal:
            return seconds
    return None


def shared_seeds(ours: list[Result], baseline: list[Result]) -> list[tuple[Result, Result]]:
    """Return the pairs of cells with the same seed.

    Raises:
        UserError: two cells were evaluated on different samples.
    """
    theirs = {cell.cell.seed: cell for cell in baseline}
    pairs = [(cell, theirs[cell.cell.seed]) for cell in ours if cell.cell.seed in theirs]
    if any(len(a.standing) != len(b.standing) for a, b in pairs):
        raise UserError("two cells were evaluated on different samples; they cannot be compared")
    return pairs


def p_samples(pairs: list[tuple[Result, Result]]) -> float:
    """Return the p-value of an exact sign-flip test over the test samples.

    The null hypothesis is that the networks are equally robust. d_i is the number of seeds on which sample i is
    robust under one row, minus that number under the other row. Under the null hypothesis d_i is as likely as -d_i,
    so the distribution of their sum is a convolution. With one seed this is McNemar's exact test.
    """
    difference = np.abs(sum(a.standing.astype(int) - b.standing.astype(int) for a, b in pairs))
    observed = abs(sum(int(a.standing.sum()) - int(b.standing.sum()) for a, b in pairs))
    weights = np.ones(1)  # probabilities of the sums -n, -n + 1, ..., n
    for size in range(1, len(pairs) + 1):
        count = int(np.sum(difference == size))
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        weights = np.convolve(weights, steps)
    middle = len(weights) // 2
    return float(min(1.0, weights[np.abs(np.arange(len(weights)) - middle) >= observed].sum()))


def p_seeds(pairs: list[tuple[Result, Result]], rows: dict[Row, list[Result]]) -> float | None:
    """Return the p-value of a t-test over the seeds; None if no row has two seeds.

    The null hypothesis is that the methods are equally robust. The variance over seeds is pooled over all rows with
    the same architecture, as in an analysis of variance, because two or three seeds of one row say little about it.
    """
    same = [
        cells for row, cells in rows.items() if row[1] == pairs[0][0].cell.architecture and len(cells) > 1
    ]
    freedom = sum(len(cells) - 1 for cells in same)
    if not freedom:
        return None
    spread = sum((len(cells) - 1) * variance([c.robust for c in cells]) for cells in same) / freedom
    gap = abs(fmean(a.robust - b.robust for a, b in pairs))
    if spread == 0:
        return 1.0 if gap == 0 else 0.0
    return float(2 * t_distribution.sf(gap / (spread * 2 / len(pairs)) ** 0.5, freedom))


def holm(values: dict[Row, float]) -> dict[Row, float]:
    """Return the p-values adjusted for multiple tests (Holm 1979)."""
    adjusted, least = {}, 0.0
    for rank, (row, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(values) - rank) * p))
        adjusted[row] = least
    return adjusted


def _mark(gain: float | None, p: float | None, *, one_seed: bool) -> str:
    """Format the robust accuracy gain over the baseline, in points, with significance stars.

    Stars are in parentheses if there is only one seed.
    """
    if gain is None or p is None:
        return "no baseline"
    stars = "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else "n.s."
    return f"{100 * gain:+.1f} {f'({stars})' if one_seed else stars}"


def _spread(values: list[float], sign: str = "") -> str:
    mean = f"{fmean(values):{sign}.1f}"
    return f"{mean} ± {stdev(values):.1f}" if len(values) > 1 else mean


def _legend(study: Study) -> str:
    ((axis, name),) = study.baseline.items()
    return (
        "Values are means over seeds ± their standard deviation, for the checkpoint that was most robust on the "
        f"validation split. *vs baseline*: gain in robust accuracy over the {axis} {name}, in points, on the seeds "
        "that both have. Stars require both an exact sign-flip test over the test samples and a t-test over the "
        "seeds (variance pooled over the rows of an architecture), adjusted for the number of rows (Holm): "
        "* p < 0.05, ** p < 0.01, *** p < 0.001, n.s. not significant. With one seed stars are in parentheses: "
        f"they compare two networks, not two methods. *gap*: robust accuracy on {study.gap_samples:,} training "
        "samples minus that on the test split. *s an epoch*: seconds of training, without validation, on one "
        "core or GPU while other trainings run. *s to 95 %*: seconds of training until validation robust accuracy "
        "reached 95 % of the best value of any row with the same architecture. (guard): catastrophic overfitting "
        "was detected and undone; the undone time counts.\n"
    )
