"""The report's statistics against worked examples; the tables and pictures that come of made-up results."""

from __future__ import annotations

import json
from math import comb

import numpy as np
import pytest

from advtrain.evaluation import Share
from advtrain.evaluation.report import AttackFigure, Report
from advtrain.lookup import UserError
from pipelines.study import Cell, cells, load_study
from pipelines.study_pictures import pareto
from pipelines.study_report import holm, p_value, time_to, write_report
from pipelines.study_result import Result
from tests.unit.pipelines.test_study import write


def result(cell: Cell, standing, clean=0.9, seconds=(1.0, 2.0), curve=(0.2, 0.6)) -> Result:
    standing = np.array(standing, bool)
    share = Share.of(standing)
    report = Report(
        model="m", norm="linf", eps=0.1, data="digits", split="test", data_digest="d", seed=0, versions={},
        clean_accuracy=clean, robust_accuracy=share.value, clean=share, robust=share, per_class=[],
        attacks=[AttackFigure(name="pgd-10", robust=share, num_attacked=1, num_broken=0, seconds=1.0)],
    )  # fmt: skip
    lines = [
        {"epoch": i + 1, "epoch_seconds": s, "val_robust_accuracy": v}
        for i, (s, v) in enumerate(zip(seconds, curve, strict=True))
    ]
    return Result(
        cell, clean=clean, robust=share.value, train_robust=0.8, standing=standing, lines=lines, report=report
    )


@pytest.fixture
def grid(tmp_path):
    study = load_study(write(tmp_path, optimizers={"sgd": {}}), quick=False)
    return study, cells(study, quick=False, allow_code=False)


def test_with_one_seed_the_test_is_mcnemars(grid):
    """Oracle: 12 samples for one, 3 for the other: 2 P(X <= 3), X ~ Binomial(15, 1/2)."""
    _, found = grid
    ours = result(found[0], [1] * 12 + [0] * 3 + [1] * 30 + [0] * 5)
    theirs = result(found[0], [0] * 12 + [1] * 3 + [1] * 30 + [0] * 5)
    expected = 2 * sum(comb(15, k) for k in range(4)) / 2**15
    assert p_value([ours], [theirs]) == pytest.approx(expected)
    assert p_value([ours], [ours]) == 1


def test_with_several_seeds_each_sample_speaks_once(grid):
    _, found = grid
    first, second = found[0], next(c for c in found if c.seed == 1)
    ours = [result(first, [1, 1, 1, 1, 0, 1]), result(second, [1, 1, 1, 1, 1, 0])]
    theirs = [result(first, [0, 0, 0, 0, 1, 1]), result(second, [0, 1, 0, 0, 0, 0])]
    # differences over seeds: +2 +1 +2 +2 0 0 -> four for ours, none for theirs
    assert p_value(ours, theirs) == pytest.approx(2 / 2**4)


def test_other_samples_cannot_be_compared(grid):
    _, found = grid
    with pytest.raises(UserError, match="different samples"):
        p_value([result(found[0], [1, 0])], [result(found[0], [1, 0, 1])])


def test_holms_adjustment():
    """Oracle: 0.01, 0.04, 0.03 -> 3 x 0.01, and 2 x 0.03 for both of the others, since it may not fall."""
    rows = [("d", "a", "o", str(i)) for i in range(3)]
    adjusted = holm(dict(zip(rows, (0.01, 0.04, 0.03), strict=True)))
    assert [adjusted[row] for row in rows] == pytest.approx([0.03, 0.06, 0.06])


def test_time_to_a_goal_counts_whole_epochs():
    lines = [{"epoch_seconds": s, "val_robust_accuracy": v} for s, v in ((2.0, 0.3), (3.0, 0.5), (4.0, 0.4))]
    assert time_to(0.5, lines) == 5
    assert time_to(0.1, lines) == 2
    assert time_to(0.6, lines) is None


def test_the_pareto_front_is_what_nobody_beats():
    points = [(0.9, 0.5), (0.8, 0.7), (0.8, 0.6), (0.95, 0.1), (0.7, 0.7)]
    assert sorted(pareto(points)) == [(0.8, 0.7), (0.9, 0.5), (0.95, 0.1)]


def test_the_report_says_means_spreads_marks_and_failures(grid, tmp_path):
    study, found = grid
    results = []
    for cell in found:
        if cell.method == "madry":
            results.append(result(cell, [1] * (60 + 10 * cell.seed) + [0] * (40 - 10 * cell.seed)))
        elif cell.seed == 0:
            results.append(result(cell, [1] * 20 + [0] * 80, clean=0.95, curve=(0.1, 0.2)))
        else:
            results.append(Result(cell, failure="it broke"))
    report = write_report(study, results, tmp_path / "report")
    ((title, _, rows),) = report.tables
    assert title == "digits: 100 test samples, linf:0.1, pgd-10, 2 seeds"
    table = {row[0]: row[1:] for row in rows}
    assert table["madry"][:4] == ["90.0 ± 0.0", "65.0 ± 7.1", "baseline", "+15.0 ± 7.1"]
    assert table["madry"][5] == "3.0"
    assert table["standard"][:3] == ["95.0", "20.0", "-45.0 ***"]
    assert table["standard"][5] == "-"
    assert report.metrics["digits/mlp/sgd/madry/robust_accuracy"] == pytest.approx(0.65)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| madry | 90.0 ± 0.0 | 65.0 ± 7.1 | baseline |" in text
    assert "it broke" in text
    values = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [v["failure"] for v in values].count("it broke") == 1
    assert {p.name for p in (tmp_path / "report").glob("*.png")} == {"digits-curves.png", "digits-front.png"}


def test_a_report_of_failures_alone_is_written_too(grid, tmp_path):
    study, found = grid
    report = write_report(study, [Result(cell, failure="no") for cell in found], tmp_path)
    assert report.tables == []
    assert "Every training failed" in (tmp_path / "report.md").read_text()
