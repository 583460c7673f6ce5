"""Statistics of the study report against worked examples; tables and figures of given results."""

from __future__ import annotations

import json
from itertools import product
from math import comb

import numpy as np
import pytest

from advtrain.errors import UserError
from advtrain.evaluation import Share
from advtrain.evaluation.report import AttackFigure, Report
from tests.unit.tuning.test_study_grid import write
from tuning.study.figures import pareto
from tuning.study.grid import Cell, cells, load_study
from tuning.study.report import holm, p_samples, p_seeds, shared_seeds, time_to, write_report
from tuning.study.results import Result


def result(cell: Cell, standing, clean=0.9, seconds=(1.0, 2.0), curve=(0.2, 0.6)) -> Result:
    standing = np.array(standing, bool)
    share = Share.of(standing)
    report = Report(
        model="m", norm="linf", eps=0.1, data="digits", split="test", data_digest="d", seed=0, versions={},
        clean_accuracy=clean, robust_accuracy=share.value, clean=share, robust=share, per_class=[], suite="pgd-10",
        attacks=[AttackFigure(name="pgd-10", robust=share, num_attacked=1, num_broken=0)],
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


def test_p_samples_is_mcnemar_test_for_one_seed(grid):
    """Oracle: with 12 and 3 discordant samples, p = 2 P(X <= 3), X ~ Binomial(15, 1/2)."""
    _, found = grid
    ours = result(found[0], [1] * 12 + [0] * 3 + [1] * 30 + [0] * 5)
    theirs = result(found[0], [0] * 12 + [1] * 3 + [1] * 30 + [0] * 5)
    expected = 2 * sum(comb(15, k) for k in range(4)) / 2**15
    assert p_samples([(ours, theirs)]) == pytest.approx(expected)
    assert p_samples([(ours, ours)]) == 1


def test_p_samples_is_sign_flip_test_for_several_seeds(grid):
    """Oracle: enumeration of all sign flips of the summed differences per sample."""
    _, found = grid
    first, second = found[0], next(c for c in found if c.seed == 1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b, c, d = rng.random((4, 9)) < 0.6
        pairs = [(result(first, a), result(first, b)), (result(second, c), result(second, d))]
        sums = a.astype(int) - b + c.astype(int) - d
        flips = [
            abs(sum(s * v for s, v in zip(signs, sums, strict=True))) for signs in product((1, -1), repeat=9)
        ]
        expected = np.mean([f >= abs(sums.sum()) for f in flips])
        assert p_samples(pairs) == pytest.approx(expected)


def test_p_seeds_pools_variance_over_rows(grid):
    """Oracle: scipy's two-sample t-test, which pools in the same way for two rows of two seeds."""
    from scipy.stats import ttest_ind

    _, found = grid
    by_method = {m: [c for c in found if c.method == m] for m in ("standard", "madry")}
    shares = {"standard": (20, 26), "madry": (40, 44)}
    rows = {
        cells[0].row: [result(c, [1] * n + [0] * (100 - n)) for c, n in zip(cells, shares[m], strict=True)]
        for m, cells in by_method.items()
    }
    standard, madry = rows.values()
    expected = ttest_ind([0.20, 0.26], [0.40, 0.44]).pvalue
    assert p_seeds(shared_seeds(standard, madry), rows) == pytest.approx(expected)
    single = {row: cells[:1] for row, cells in rows.items()}
    assert p_seeds(shared_seeds(standard[:1], madry[:1]), single) is None


def test_significance_stars_need_difference_across_seeds(grid, tmp_path):
    """Two methods differ only by their seeds. 10,000 samples separate the networks, not the methods."""
    study, found = grid
    luck = {("standard", 0): 6000, ("standard", 1): 6400, ("madry", 0): 6300, ("madry", 1): 6000}
    results = [
        result(c, [1] * luck[c.method, c.seed] + [0] * (10_000 - luck[c.method, c.seed])) for c in found
    ]
    ((_, _, rows),) = write_report(study, results, tmp_path).tables
    assert {row[0]: row[3] for row in rows} == {"madry": "baseline", "standard": "+0.5 n.s."}


def test_significance_stars_are_in_brackets_for_one_seed(grid, tmp_path):
    study, found = grid
    one = [c for c in found if c.seed == 0]
    results = [
        result(
            c, [1] * (80 if c.method == "madry" else 20) + [0] * 20 + [0] * (0 if c.method == "madry" else 60)
        )
        for c in one
    ]
    ((title, _, rows),) = write_report(study, results, tmp_path).tables
    assert title.endswith("1 seed")
    assert {row[0]: row[3] for row in rows}["standard"] == "-60.0 (***)"


def test_shared_seeds_rejects_different_samples(grid):
    _, found = grid
    with pytest.raises(UserError, match="different samples"):
        shared_seeds([result(found[0], [1, 0])], [result(found[0], [1, 0, 1])])


def test_holm_adjustment_matches_worked_example():
    """Oracle: 0.01, 0.04, 0.03 -> 3 x 0.01, then 2 x 0.03 for both others, as values may not decrease."""
    rows = [("d", "a", "o", str(i)) for i in range(3)]
    adjusted = holm(dict(zip(rows, (0.01, 0.04, 0.03), strict=True)))
    assert [adjusted[row] for row in rows] == pytest.approx([0.03, 0.06, 0.06])


def test_time_to_counts_whole_epochs():
    lines = [{"epoch_seconds": s, "val_robust_accuracy": v} for s, v in ((2.0, 0.3), (3.0, 0.5), (4.0, 0.4))]
    assert time_to(0.5, lines) == 5
    assert time_to(0.1, lines) == 2
    assert time_to(0.6, lines) is None


def test_pareto_returns_nondominated_points():
    points = [(0.9, 0.5), (0.8, 0.7), (0.8, 0.6), (0.95, 0.1), (0.7, 0.7)]
    assert sorted(pareto(points)) == [(0.8, 0.7), (0.9, 0.5), (0.95, 0.1)]


def test_report_shows_means_spreads_significance_and_failures(grid, tmp_path):
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
    assert table["standard"][:3] == ["95.0", "20.0", "-40.0 n.s."]
    assert table["standard"][5] == "-"
    assert report.metrics["digits/mlp/sgd/madry/robust_accuracy"] == pytest.approx(0.65)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| madry | 90.0 ± 0.0 | 65.0 ± 7.1 | baseline |" in text
    assert "it broke" in text
    values = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [v["failure"] for v in values].count("it broke") == 1
    assert {p.name for p in (tmp_path / "report").glob("*.png")} == {"digits-curves.png", "digits-front.png"}


def test_report_is_written_when_every_cell_failed(grid, tmp_path):
    study, found = grid
    report = write_report(study, [Result(cell, failure="no") for cell in found], tmp_path)
    assert report.tables == []
    assert "Every training failed" in (tmp_path / "report.md").read_text()
