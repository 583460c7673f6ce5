"""Promotion rules of texts that were judged under edits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from advtrain.evaluation import Share, evaluate
from advtrain.evaluation.edit_figures import EditFigures
from advtrain.evaluation.report import CurvePoint
from advtrain.promotion import Case, Evidence, Outcomes, different, judge
from advtrain.promotion.consistency import contradictions
from advtrain.promotion.repeat_edits import repeat_edits
from tests.registry_kit import flags, make_evaluation
from tests.unit.evaluation.test_edits import source_and_data, spec_of, threat, with_texts
from tests.unit.promotion.test_rules import RUN, SIGNATURE, policy

N = 1000
SETTINGS = {
    "edits": "words",
    "at_most": 2,
    "table": "counterfitted",
    "table_digest": "a" * 64,
    "texts_digest": "c" * 64,
    "protect": "stop_words",
    "where": None,
    "alphabet": None,
    "operations": None,
    "budget": 2000,
}


def evidence(robust=700, proven=600, version="2", first=0, **settings) -> Evidence:
    """Return evidence on `robust` texts that were not broken; the last `proven` of these are proven."""
    values = SETTINGS | settings
    not_broken, is_proven = flags(N, robust), flags(N, proven, first)
    figures = EditFigures(
        **values,
        proven=Share.of(is_proven),
        not_broken=Share.of(not_broken),
        queries=10_000,
        queries_median=10.0,
        queries_max=2000,
    )
    curve = [CurvePoint(eps=float(k), value=v, low=v, high=v) for k, v in enumerate([0.95, 0.8, robust / N])]
    search = f"edits-{values['budget']}"
    facts = {"norm": values["edits"], "eps": 2.0, "suite": search, "edits": figures, "curve": curve}
    found = make_evaluation(flags(N, 950), not_broken, (search,), **facts)
    outcomes = replace(Outcomes.of(found.samples), proven_edits=np.where(is_proven, 2, 1))
    return Evidence(
        version, found.report, outcomes, signature=SIGNATURE, run=RUN, files_digest="f", num_files=9
    )


def verdicts(challenger, champion=None, **values) -> dict[str, str]:
    case = Case(policy(**values), challenger, champion)
    return {finding.rule: finding.verdict for finding in judge(case)}


def test_better_text_model_under_edits_passes_every_rule():
    found = verdicts(evidence(800, 700), evidence(700, 600, version="1"), min_proven=0.5, min_robust=0.7)
    assert "failed" not in found.values()
    assert {found[rule] for rule in ("task", "suite", "robust_gain", "min_proven", "min_robust")} == {
        "passed"
    }
    assert found["proven_not_worse"] == "passed"
    assert found["neighbours"] == "skipped"


@pytest.mark.parametrize(
    ("rule", "how", "values"),
    [
        ("min_proven", {"proven": 499}, {"min_proven": 0.5}),
        ("min_robust", {"robust": 699}, {"min_robust": 0.7}),
        ("suite", {}, {"edit_budget": 2001}),
        ("proven_not_worse", {"robust": 800, "proven": 550}, {"min_proven": 0.5}),
        ("robust_gain", {"robust": 700}, {}),
    ],
)
def test_rule_fails_just_below_its_threshold(rule, how, values):
    assert verdicts(evidence(**how), evidence(700, 600, version="1"), **values)[rule] == "failed"


def test_floors_are_met_exactly():
    found = verdicts(evidence(700, 500), min_proven=0.5, min_robust=0.7, edit_budget=2000)
    assert [found[rule] for rule in ("min_proven", "min_robust", "suite")] == ["passed"] * 3


def test_ball_proves_nothing():
    ball = replace(evidence(), report=make_evaluation(flags(N, 950), flags(N, 700)).report)
    assert verdicts(ball)["min_proven"] == "skipped"
    assert verdicts(ball, min_proven=0.1)["min_proven"] == "failed"


@pytest.mark.parametrize(
    "changed",
    [
        {"table_digest": "b" * 64},
        {"texts_digest": "d" * 64},
        {"protect": "none"},
        {"budget": 3000},
        {"edits": "chars", "where": "inner"},
    ],
)
def test_other_edits_are_not_compared(changed):
    assert different(evidence(), evidence(version="1", **changed))
    assert verdicts(evidence(), evidence(version="1", **changed))["judged_alike"] == "failed"


def test_budget_is_not_taken_from_the_name_of_the_attack():
    honest = evidence(budget=20)
    attack = honest.report.attacks[0].model_copy(update={"name": "edits-2000"})
    renamed = replace(honest, report=honest.report.model_copy(update={"attacks": [attack]}))
    assert verdicts(honest, edit_budget=20)["suite"] == "passed"
    assert verdicts(renamed, edit_budget=2000)["suite"] == "failed"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"suite": "edits-9999"}, "the report says suite edits-9999, its edits edits-2000"),
        ({"norm": "chars"}, "the report says norm chars, its edits words"),
        ({"eps": 3.0}, "the report says eps 3.0, its edits 2.0"),
        ({"attacks": []}, "the report says attacks [], its edits ['edits-2000']"),
    ],
)
def test_report_must_agree_with_its_block_of_edits(changed, message):
    whole = evidence()
    assert message in contradictions(whole.report.model_copy(update=changed), whole.outcomes)
    longer = whole.report.edits.model_copy(update={"budget": 9999})
    found = contradictions(whole.report.model_copy(update={"edits": longer}), whole.outcomes)
    assert "the report says attacks ['edits-2000'], its edits ['edits-9999']" in found


def test_search_is_repeated_on_the_texts_of_its_report_only():
    source, data = source_and_data()
    data = with_texts(data, ["film zzqx movie"] * 60)
    found = evaluate(spec_of(source, data, threat()))
    how = (found.report.edits, 0, Outcomes.of(found.samples), 1)
    assert repeat_edits(source, data, *how).agrees
    other = repeat_edits(source, with_texts(data, ["film qqqq movie"] * 60), *how)
    assert not other.agrees
    assert "the texts of the test split are not those of its report" in other.reason


def test_report_must_have_the_bounds_of_its_samples():
    whole = evidence()
    assert contradictions(whole.report, whole.outcomes) == []
    more = replace(whole.outcomes, proven_edits=np.where(flags(N, 601), 2, 0))
    assert any("600 texts are proven" in each for each in contradictions(whole.report, more))
    both = replace(whole.outcomes, proven_edits=np.where(flags(N, 600, 400), 2, 0))
    assert "texts are proven and broken at once" in contradictions(whole.report, both)
    missing = replace(whole.outcomes, proven_edits=None)
    assert "the samples have no column proven_edits" in contradictions(whole.report, missing)
