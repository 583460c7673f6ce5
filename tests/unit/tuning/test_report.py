"""The report of a campaign: reasons of the choice, space, budget, and the page."""

from __future__ import annotations

import pytest

from tests.unit.tuning.surface import ledger_of, show
from tuning.choice import campaign_params, explain_choice, range_of, score_name
from tuning.report import write_report
from tuning.selection import Preference, candidates
from tuning.space import Distribution

POINT = {"optimizer.lr": 1e-2, "adversary.eps": 0.1}
TWO = {"objectives": {"robust_accuracy": "max", "clean_accuracy": "max"}}


def closed(ledger, *figures, status="finished", **begin):
    trial = ledger.begin(POINT, {}, **begin)
    show(trial, *figures)
    ledger.close(trial, status)
    return trial


def reasons(ledger, prefer=None):
    preference = None if prefer is None else Preference.parse(prefer, ledger.campaign)
    found = candidates(ledger)
    order = found if preference is None else preference.order(found)
    return "\n".join(explain_choice(ledger, order[0], order, preference))


def test_reasons_name_the_tier_the_score_and_the_next_trial(tmp_path):
    ledger = ledger_of(tmp_path)
    closed(ledger, (0.5, 0.9)), closed(ledger, (0.6, 0.8)), closed(ledger, (0.9, 0.9), status="stopped")
    closed(ledger, status="failed")
    text = reasons(ledger)
    assert "3 of 4 trials may win" in text
    assert "t001 is one of 2 trials that were trained to the end" in text
    assert "t001 has 0.6000. Of the others, t000 has the highest score, 0.5000." in text
    assert "robust accuracy: 60.00 % in epoch 1, with one seed" in text


def test_reasons_give_seeds_and_say_when_the_lead_may_be_chance(tmp_path):
    ledger = ledger_of(tmp_path)
    first, second = closed(ledger, (0.6, 0.9)), closed(ledger, (0.5, 0.9))
    for trial, figures in ((first, (0.56, 0.60)), (second, (0.57, 0.58))):
        for seed, robust in enumerate(figures, 1):
            closed(ledger, (robust, 0.9), of=trial, seed=seed)
    text = reasons(ledger)
    assert "t000 is one of 2 trials that were confirmed with other seeds" in text
    assert "mean 58.00 %, standard deviation 2.83 %, with 2 seeds: 56.00 %, 60.00 %" in text
    assert "The lead of 0.0050 is below the standard deviation over seeds, 0.0283" in text


@pytest.mark.parametrize(
    ("prefer", "expected"),
    [
        (None, "t001 is on the Pareto front of these trials, which has 2"),
        ("clean=0.9", "1 of 3 such trials meet the limit clean accuracy = 0.9"),
        ("clean=0.99", "No trial meets the limit clean accuracy = 0.99. t000 is the nearest."),
    ],
)
def test_reasons_name_front_and_limit(tmp_path, prefer, expected):
    ledger = ledger_of(tmp_path, TWO)
    closed(ledger, (0.5, 0.95)), closed(ledger, (0.8, 0.7)), closed(ledger, (0.4, 0.6))
    assert expected in reasons(ledger, prefer)


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        ({"robust_accuracy": "max"}, "robust accuracy"),
        (TWO["objectives"], "mean of robust accuracy and clean accuracy"),
        (
            {"robust_accuracy": 0.7, "clean_accuracy": 0.3},
            "sum of 0.7 robust accuracy and 0.3 clean accuracy",
        ),
    ],
)
def test_score_name_states_the_formula(tmp_path, objectives, expected):
    assert score_name(ledger_of(tmp_path, {"objectives": objectives})) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"loguniform": [1e-4, 0.1]}, "loguniform 0.0001 to 0.1"),
        ({"integer": [1, 5]}, "integer 1 to 5"),
        ({"choice": ["a", 2]}, "choice of a, 2"),
    ],
)
def test_range_of_a_distribution(given, expected):
    assert range_of(Distribution.model_validate(given)) == expected


def test_page_explains_the_choice_and_embeds_its_figures(tmp_path):
    ledger = ledger_of(tmp_path, {"description": "<b>small</b>"})
    closed(ledger, (0.5, 0.9)), closed(ledger, (0.6, 0.8))
    report = write_report(ledger, [], tmp_path / "report", {})
    page = (tmp_path / "report" / "report.html").read_text()
    assert "&lt;b&gt;small" in page
    assert "<h2>Why t001 won</h2>" in page
    assert report.choices[0][1][2] in page
    assert "<td>adversary.eps</td><td>uniform 0 to 0.3</td><td>0.1</td>" in page
    assert "<td>trials</td><td>2</td><td>40</td>" in page
    assert page.count("data:image/png") == len(list((tmp_path / "report").glob("*.png"))) > 2
    assert "<img alt='Score of each trial" in page
    text = (tmp_path / "report" / "report.md").read_text()
    assert "1. 2 of 2 trials may win." in text


def test_params_and_tags_describe_space_budget_and_choice(tmp_path):
    ledger = ledger_of(tmp_path)
    closed(ledger, (0.5, 0.9))
    report = write_report(ledger, [], tmp_path / "report", {})
    tags = report.tags
    assert report.params == {
        "space.optimizer.lr": "loguniform 0.0001 to 0.1",
        "space.adversary.eps": "uniform 0 to 0.3",
        "budget.trials": "40",
        "budget.wall": "no limit",
        "budget.gpu_hours": "no limit",
    }
    winner = candidates(ledger)[0]
    ends = campaign_params(ledger, [(winner, "models:/digits/1"), (winner, None)])
    assert ends == report.params | {"winner": "t000, t000", "registered": "models:/digits/1"}
    assert tags["advtrain.space.adversary.eps"] == "uniform 0 to 0.3"
    assert tags["advtrain.budget"].startswith("trials: 1 (limit: 40); wall time")
    assert "## Why t000 won" in tags["mlflow.note.content"]
    assert "| trials | 1 | 40 |" in tags["mlflow.note.content"]


def test_page_of_a_campaign_without_results(tmp_path):
    ledger = ledger_of(tmp_path)
    closed(ledger, status="failed")
    write_report(ledger, [], tmp_path / "report", {})
    assert "<h2>No winner</h2>" in (tmp_path / "report" / "report.html").read_text()
