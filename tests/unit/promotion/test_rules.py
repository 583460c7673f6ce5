"""Promotion rules at their thresholds, and the false positive rate of the gain test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from advtrain.data.rows import RowRecord
from advtrain.evaluation.checks import Check
from advtrain.evaluation.report import CurvePoint
from advtrain.promotion import RULES, Case, Evidence, Outcomes, Policy, Repetition, failed, judge
from advtrain.promotion.comparison import covers
from advtrain.promotion.consistency import contradictions
from advtrain.runs.leaks import Lineage
from advtrain.runs.lineage import Ancestor
from tests.registry_kit import AUTOATTACK, FACTORS, flags, make_evaluation

N = 1000
SIGNATURE = (
    '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 1, 8, 8]}}]',
    '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 10]}}]',
)
OTHER = (SIGNATURE[0], SIGNATURE[1].replace("float32", "float64"))
WIDER = (SIGNATURE[0], SIGNATURE[1].replace("[-1, 10]", "[-1, 11]"))
RUN = {"status": "FINISHED", "commit": "c" * 40, "dirty": "false", "data_digest": "d" * 64}


def outcomes_of(labels, clean, robust):
    predictions = np.where(clean, labels, (labels + 1) % 10)
    broken = tuple(None if r else "apgd" if c else "clean" for c, r in zip(clean, robust, strict=True))
    return Outcomes(labels, predictions, robust, broken)


def policy(**values) -> Policy:
    return Policy(**({"name": "p", "version": 1} | values))


def evidence(
    clean=950, robust=700, first=0, attacks=AUTOATTACK, version="2", n=N, report=None, **values
) -> Evidence:
    found = make_evaluation(flags(n, clean), flags(n, robust, first), attacks, **(report or {}))
    facts = {"signature": SIGNATURE, "run": RUN, "files_digest": "f", "num_files": 9} | values
    return Evidence(version, found.report, Outcomes.of(found.samples), **facts)


CHAMPION = evidence(version="1")


def curve(at_neighbour: float):
    return {
        "curve": [
            CurvePoint(eps=0.1 * f, value=v, low=v, high=v)
            for f, v in zip(FACTORS, [0.9, 0.9, 0.9, 0.8, 0.8, at_neighbour, 0.1, 0.0], strict=True)
        ]
    }


def verdict(rule: str, case: Case) -> str:
    (found,) = [finding.verdict for finding in judge(case) if finding.rule == rule]
    return found


ALLOW = {"provenance": {"unknown_ancestors": "allow"}}


def lineage(*, shared=0, known=True):
    """Return the lineage of a model whose ancestor was trained on `shared` of its 10 test samples."""
    keys = np.array([f"{number:016}".encode() for number in range(40)])

    def record(digest, train, validation, test):
        return RowRecord("d", digest, {"train": train, "validation": validation, "test": test})

    records = {"own": record("own", keys[:10], keys[10:20], keys[20:30])}
    if known:
        records["theirs"] = record("theirs", keys[30 - shared : 40], keys[:0], keys[:0])
    parent = Ancestor("start", "models:/parent/1", "f" * 64, "parent", "theirs")
    return Lineage("own", (parent,), records)


RAND = ("eot-apgd-ce-100x20", "eot-apgd-dlr-100x20", "eot-square-1000x20")
RANDOM = [
    Check(name=name, question="?", verdict="passed", evidence="averaged over 20 draws", data={flag: True})
    for name, flag in (
        ("stochastic", "averages_over_draws"),
        ("slope", "on_means"),
        ("black_box", "on_means"),
    )
]

#: rule, policy, challenger that just passes, challenger that just fails
BOUNDARIES = [
    ("task", {}, {}, {"signature": WIDER}),
    ("judged_alike", {}, {}, {"report": {"data_digest": "e" * 64}}),
    ("judged_alike", {}, {}, {"report": {"eps": 0.2}}),
    ("judged_alike", {}, {}, {"attacks": AUTOATTACK[:3]}),
    ("suite", {}, {}, {"attacks": AUTOATTACK[:3]}),
    ("suite", {}, {}, {"attacks": ("apgd-ce-99", *AUTOATTACK[1:])}),
    (
        "suite",
        {},
        {"attacks": RAND, "report": {"checks": RANDOM}},
        {"attacks": RAND[:1], "report": {"checks": RANDOM}},
    ),
    ("suite", {}, {}, {"attacks": RAND}),  # a model that is not marked as stochastic
    ("suite", {}, {}, {"attacks": RAND, "report": {"checks": RANDOM[:2]}}),  # black_box did not run on means
    ("suite", {"suite": "standard"}, {"attacks": AUTOATTACK[:2]}, {"attacks": AUTOATTACK[:1]}),
    (
        "suite",
        {"suite": "quick"},
        {"attacks": AUTOATTACK[:2]},
        {"attacks": AUTOATTACK[1:]},
    ),  # stronger is enough
    ("trust", {}, {}, {"report": {"checks": []}}),
    (
        "trust",
        {},
        {},
        {"report": {"checks": [Check(name="a", question="?", verdict="failed", evidence="x")]}},
    ),
    ("samples", {"min_samples": N}, {}, {"n": N - 1}),
    # With 700 robust, McNemar's one-sided p is 0.0312 for 5 lost and 0 gained, 0.0625 for 4 lost.
    ("robust_not_worse", {}, {"robust": 696}, {"robust": 695}),
    ("robust_gain", {}, {"robust": 705}, {"robust": 704}),
    ("clean_drop", {}, {"clean": 940}, {"clean": 939}),
    ("clean_drop", {"max_clean_drop": 0}, {"clean": 950}, {"clean": 949}),
    # Ten classes of 100 samples in turn: with 310 robust samples each class has 31.
    ("worst_class", {"min_worst_class": 0.31}, {"robust": 310}, {"robust": 309}),
    ("min_robust", {"min_robust": 0.7}, {"robust": 700}, {"robust": 699}),
    ("neighbours", {}, {"report": curve(0.4)}, {"report": curve(0.39)}),
    ("calibration", {"max_calibration_error": 0.051}, {"clean": 950}, {"clean": 952}),
    ("latency", {"max_latency_ms": 2.0}, {"latency_ms": 2.0}, {"latency_ms": 2.001}),
    ("size", {"max_size_mb": 1.0}, {"size_mb": 1.0}, {"size_mb": 1.001}),
    ("signature", {}, {}, {"signature": OTHER}),
    ("signature", {"approve_signature_change": True}, {"signature": OTHER}, None),
    ("provenance", {}, {}, {"run": RUN | {"status": "RUNNING"}}),
    ("provenance", {}, {}, {"run": RUN | {"dirty": "true"}}),
    ("provenance", {}, {}, {"run": {k: v for k, v in RUN.items() if k != "commit"}}),
    ("provenance", {}, {}, {"run": {k: v for k, v in RUN.items() if k != "data_digest"}}),
    ("repeated", {"repeat_units": 2}, {"repetition": Repetition(100, 2)}, {"repetition": Repetition(100, 3)}),
    ("provenance", {}, {}, {"pickles": ["data/model.pkl"]}),
    ("provenance", {}, {"lineage": lineage()}, {"lineage": lineage(known=False)}),
    ("provenance", ALLOW, {"lineage": lineage(known=False)}, None),
    ("provenance", {}, {}, {"lineage": Lineage(unrecorded=("model.from",))}),
    ("leaks", {}, {"lineage": lineage()}, {"lineage": lineage(shared=1)}),
    ("leaks", {}, {"lineage": lineage()}, {"lineage": replace(lineage(), allowed_leak="a demo")}),
    ("leaks", ALLOW, {"lineage": lineage(known=False)}, {"lineage": lineage(shared=1)}),
    ("provenance", {"clean_git": False}, {"run": {"status": "FINISHED", "data_digest": "d"}}, {"run": {}}),
]


@pytest.mark.parametrize(("rule", "thresholds", "passing", "failing"), BOUNDARIES)
def test_rule_passes_at_threshold_and_fails_beyond(rule, thresholds, passing, failing):
    champion = evidence(version="1", report=curve(0.6))
    assert verdict(rule, Case(policy(**thresholds), evidence(**passing), champion)) == "passed"
    if failing is not None:
        assert verdict(rule, Case(policy(**thresholds), evidence(**failing), champion)) == "failed"


def test_boundaries_cover_every_rule():
    of_texts = {"min_proven", "proven_not_worse"}  # in test_edit_rules.py
    assert {rule for rule, *_ in BOUNDARIES} | {"integrity"} | of_texts == set(RULES)


def test_findings_name_leaks_and_unknown_ancestors():
    case = Case(policy(**ALLOW), evidence(lineage=lineage(shared=3)), None)
    found = {finding.rule: finding.figures for finding in judge(case)}
    assert found["leaks"].startswith(
        "3 of 10 test samples are training samples of its ancestor models:/parent/1"
    )
    case = Case(policy(**ALLOW), evidence(lineage=lineage(known=False)), None)
    found = {finding.rule: finding.figures for finding in judge(case)}
    assert "the training data of models:/parent/1 is unknown" in found["provenance"]


def test_a_model_without_ancestors_skips_the_rule_on_leaks():
    assert verdict("leaks", Case(policy(), evidence(), None)) == "skipped"


def test_comparison_rules_are_skipped_without_champion():
    findings = {f.rule: f.verdict for f in judge(Case(policy(), evidence(), None))}
    assert not failed(judge(Case(policy(), evidence(), None)))
    skipped = {"judged_alike", "robust_not_worse", "robust_gain", "clean_drop", "signature"}
    assert skipped <= {rule for rule, found in findings.items() if found == "skipped"}


ABSOLUTE = [
    "suite",
    "trust",
    "repeated",
    "samples",
    "worst_class",
    "neighbours",
    "calibration",
    "latency",
    "size",
    "provenance",
    "leaks",
]


@pytest.mark.parametrize(
    ("rule", "thresholds", "failing"),
    [(rule, t, failing) for rule, t, _, failing in BOUNDARIES if rule in ABSOLUTE and failing],
)
def test_absolute_rule_applies_without_champion(rule, thresholds, failing):
    assert verdict(rule, Case(policy(**thresholds), evidence(**failing), None)) == "failed"


def test_comparison_rules_are_skipped_when_data_differs():
    other = evidence(version="1", report={"data_digest": "e" * 64}, robust=100)
    findings = {f.rule: f.verdict for f in judge(Case(policy(), evidence(), other))}
    assert findings["judged_alike"] == "failed"
    assert findings["robust_not_worse"] == findings["robust_gain"] == findings["clean_drop"] == "skipped"


def test_judged_alike_fails_when_labels_differ():
    one = evidence()
    shuffled = replace(one, outcomes=replace(one.outcomes, labels=one.outcomes.labels[::-1]))
    assert verdict("judged_alike", Case(policy(), shuffled, CHAMPION)) == "failed"


def test_neighbours_rule_allows_level_of_champion():
    low = evidence(version="1", report=curve(0.1))
    assert verdict("neighbours", Case(policy(), evidence(report=curve(0.1)), low)) == "passed"
    assert verdict("neighbours", Case(policy(), evidence(report=curve(0.05)), low)) == "failed"
    assert verdict("neighbours", Case(policy(), evidence(report=curve(0.1)), None)) == "failed"


def test_neighbours_rule_fails_without_curve():
    assert verdict("neighbours", Case(policy(), evidence(report={"curve": []}), None)) == "failed"


@pytest.mark.parametrize("margin", [-0.01, 0.02])
def test_min_gain_shifts_required_gain(margin):
    """With 1,000 samples and none lost, the test needs up to 20 samples beyond the margin."""
    asked = policy(min_gain=margin)
    verdicts = [
        verdict("robust_gain", Case(asked, evidence(robust=700 + k), CHAMPION)) for k in range(-12, 60)
    ]
    first = verdicts.index("passed") - 12
    assert set(verdicts[first + 12 :]) == {"passed"}
    assert 1000 * margin < first < 1000 * margin + 20


def test_robust_gain_is_skipped_when_min_gain_is_null():
    assert verdict("robust_gain", Case(policy(min_gain=None), evidence(), CHAMPION)) == "skipped"


@pytest.mark.parametrize(
    ("made", "wanted", "enough"),
    [
        (["apgd-t-100x9"], ["apgd-t-50x9"], True),
        (["apgd-t-100x9"], ["apgd-t-100x10"], False),
        (["square-5000", "pgd-20"], ["square-5000"], True),
        (["apgd-ce-100x5"], ["apgd-ce-100"], True),
        (["apgd-ce-100"], ["apgd-ce-100x5"], False),
        (["eot-apgd-ce-100x20"], ["apgd-ce-100"], False),
        ([], ["square-5000"], False),
    ],
)
def test_attack_budget_covers_smaller_budgets(made, wanted, enough):
    assert covers(made, wanted) is enough


def test_robust_gain_has_stated_false_positive_rate():
    """Two equally robust models differ on a fifth of the samples. The rule accepts about one in twenty."""
    rng, rounds, taken = np.random.default_rng(0), 1500, 0
    asked = policy(alpha=0.05)
    gain = RULES["robust_gain"]
    champion = evidence(version="1")
    right = np.ones(N, bool)
    for _ in range(rounds):
        both = rng.random(N) < 0.6
        differs = (rng.random(N) < 0.2) & ~both
        second = rng.random(N) < 0.5
        one = replace(
            champion, outcomes=outcomes_of(champion.outcomes.labels, right, both | (differs & ~second))
        )
        gained = outcomes_of(champion.outcomes.labels, right, both | (differs & second))
        other = replace(champion, version="2", outcomes=gained)
        taken += gain(Case(asked, other, one))[0]
    # An exact test accepts at most alpha, and not much less with about 80 differing samples.
    assert 0.025 <= taken / rounds <= 0.065


def test_real_gain_passes_all_rules():
    better = evidence(robust=760)
    assert not failed(judge(Case(policy(), better, CHAMPION)))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([str(label) for label in range(10)], "class 9: "),
        (["cat", *"123456789"], "class 9: "),
        (["a", "b", "c", "d", "e", "f", "g", "h", "i", "two words"], "class 9 (two words): "),
    ],
)
def test_worst_class_is_named_with_its_number(names, wanted):
    found = evidence(robust=709)  # the samples of each class come in turn: class 9 has one robust sample less
    classes = [c.model_copy(update={"name": names[c.label]}) for c in found.report.per_class]
    found = replace(found, report=found.report.model_copy(update={"per_class": classes}))
    (finding,) = [f for f in judge(Case(policy(min_worst_class=0.9), found, None)) if f.rule == "worst_class"]
    assert finding.figures == f"{wanted}70.00 % robust"
    assert finding.verdict == "failed"


def test_contradiction_names_the_class_with_its_number():
    found = evidence()
    classes = [c.model_copy(update={"name": "cat"}) if c.label == 3 else c for c in found.report.per_class]
    classes[3] = classes[3].model_copy(update={"robust": classes[3].clean})
    changed = found.report.model_copy(update={"per_class": classes})
    assert contradictions(changed, found.outcomes) == ["the figures of class 3 (cat) differ from its samples"]
