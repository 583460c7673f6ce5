"""The HTML report, the model card, the confidence band of the curve and McNemar's test."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from math import comb

import numpy as np
import pytest

from advtrain.data.units import FeatureUnits
from advtrain.evaluation import Paired, Report
from advtrain.evaluation.checks import Check
from advtrain.evaluation.confusion import confusion_matrix
from advtrain.evaluation.figures import CURVE_FACTORS, build_curve
from advtrain.evaluation.model_card import build_card
from advtrain.evaluation.report import AttackFigure, ClassFigure
from advtrain.evaluation.report_html import build_page
from advtrain.evaluation.statistics import Share, sign_test, wilson
from advtrain.evaluation.worst_case import SampleResults
from advtrain.runs.lineage import Ancestor
from advtrain.threat import ThreatModel

VOID = ("meta", "img", "line", "circle", "polygon", "polyline")
NASTY = '<img src=x onerror=alert(1)> | & "cat"'


def report(**changes) -> Report:
    share = Share.of([True] * 7 + [False] * 3)
    checks = [
        Check(name="one_step", question="Is it?", verdict="failed", evidence="FGSM < PGD", advice="look"),
        Check(name="budget", question="More?", verdict="passed", evidence="0 of 7"),
    ]
    values = {
        "model": NASTY, "norm": "linf", "eps": 8 / 255, "data": "d", "split": "test", "data_digest": "a" * 64,
        "seed": 0, "versions": {"torch": "1"}, "command": "advtrain evaluate 'x y'", "suite": "quick",
        "clean_accuracy": 0.9, "robust_accuracy": 0.7, "clean": share, "robust": share,
        "attacks": [AttackFigure(name="pgd-20", robust=share, num_attacked=9, num_broken=2)],
        "per_class": [ClassFigure(label=0, name=NASTY, clean=share, robust=share)],
        "checks": checks, "curve": build_curve(np.ones((len(CURVE_FACTORS), 5)), ThreatModel("linf", 8 / 255)),
    }  # fmt: skip
    return Report(**{**values, **changes})


def test_headline_shows_worst_class_of_a_classifier_with_several_classes():
    right, wrong = Share.of([True] * 5), Share.of([False] * 5)
    classes = [
        ClassFigure(label=i, name=n, clean=right, robust=r)
        for i, n, r in [(0, "cat", right), (1, "dog", wrong)]
    ]
    several = report(per_class=classes)
    assert ["robust accuracy, worst class (dog)", str(wrong)] in several.rows
    assert "| robust accuracy, worst class (dog) | 0.00 % [" in build_card(several)
    headline = build_page(several, []).partition("<h2>Attacks")[0]
    assert "robust accuracy, worst class<b>0.00 %</b><span class=dim>dog</span>" in headline
    assert not any("worst class" in name for name, _ in report().rows)


def test_page_is_well_formed_escaped_and_self_contained():
    failure = {"label": 0, "predicted_as": 3, "distance": 0.01, "images": ["QUJD"] * 3}
    page = build_page(report(), [failure])
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "link", "iframe")
            assert all(
                not (v or "").startswith(("http", "//")) for k, v in attributes if k in ("src", "href")
            )
            assert not any(k.startswith("on") for k, _ in attributes)
            if tag not in VOID:
                opened.append(tag)

        def handle_endtag(self, tag):
            assert tag in VOID or opened.pop() == tag

    Reader().feed(page)
    assert opened == []
    assert "&lt;img src=x" in page
    assert "1 of 2 checks failed" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"https?://", page)


ABOUT = {"date": "2026-01-02 03:04 UTC", "recipe": "digits", "objective": "adv_ce"}


def samples(labels, clean, attacked) -> SampleResults:
    columns = [np.array(column) for column in (labels, clean, attacked)]
    return SampleResults(*columns, np.where(columns[0] == columns[2], -1, 0))


def test_card_lists_ancestors_in_a_section_of_their_own():
    parent = Ancestor("start", "models:/mnist/3", "a" * 64, data_digest="b" * 64)
    assert "## Ancestors" not in build_card(report())
    card = build_card(report(), ancestors=[parent])
    assert "## Ancestors\n\n| role | model | weights | training data |\n" in card
    assert f"| start | models:/mnist/3 | {'a' * 12} | {'b' * 12} |\n" in card


def test_page_and_card_name_date_recipe_objective_and_attacks():
    page, card = build_page(report(), [], about=ABOUT), build_card(report(), ABOUT)
    for name, value in ABOUT.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
        assert f"- {name}: {value}\n" in card
    assert "<dt>attacks</dt><dd>quick: pgd-20</dd>" in page
    assert "<pre>advtrain evaluate &#x27;x y&#x27;</pre>" in page


def test_report_names_the_file_of_the_data():
    named = report(file="penguins.csv")
    assert named.title.endswith("10 test samples of penguins.csv, linf:8/255")
    assert "<dt>data</dt><dd>penguins.csv, test, digest aaaaaaaaaaaa</dd>" in build_page(named, [])
    assert "- data: penguins.csv, test, digest" in build_card(named)
    assert "of d, linf" in report().title
    assert not {"file", "features"} & set(report().model_dump())


def test_page_and_card_give_the_number_of_copies_of_training_samples():
    known = report(training_copies=1200)
    assert "<dt>copies of training samples</dt><dd>1,200</dd>" in build_page(known, [])
    assert "\n- copies of training samples: 1,200\n\n|" in build_card(known)
    assert "copies" not in build_page(report(), []) + build_card(report())


def test_page_and_card_give_the_radius_in_the_units_of_a_table():
    features = [FeatureUnits(NASTY, 0, 40_000), FeatureUnits("country", 0, 1, 5)]
    table = report(features=features, eps=0.05)
    page, card = build_page(table, []), build_card(table)
    assert "<td>0 to 40,000</td><td>± 2,000</td>" in page
    assert "<td>country (one-hot, 5 categories)</td><td>0 to 1</td><td>± 0.05</td>" in page
    assert "| 0 to 40,000 | ± 2,000 |" in card
    assert "<img src=x" not in page + card
    assert "no other feature changes" not in card
    assert "no other feature changes" in build_card(report(features=features, norm="l2"))
    assert Report.model_validate_json(table.model_dump_json()) == table
    assert "units of the features" not in build_page(report(), []) + build_card(report())


def test_page_marks_a_class_as_weak_when_its_interval_lies_below_the_mean():
    shares = [Share.of([True] * right + [False] * (50 - right)) for right in (45, 33, 10)]
    overall = Share.of([True] * 88 + [False] * 62)
    classes = [ClassFigure(label=k, name=f"c{k}", clean=s, robust=s) for k, s in enumerate(shares)]
    page = build_page(report(per_class=classes, robust=overall), [])
    marked = [row for row in page.split("<tr>") if "weak</b>" in row]
    assert len(marked) == 1
    assert marked[0].startswith("<td>c2</td>")


def test_confusion_matrix_counts_labels_in_rows():
    found = confusion_matrix(np.array([0, 0, 2, 5]), np.array([0, 2, 2, 0]), np.array([0, 2, 5]))
    assert found.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_page_shows_confusions_with_names_without_and_under_attack():
    results = samples([0, 0, 0, 1], [0, 0, 2, 1], [0, 1, 2, 1])
    page = build_page(report(), [], results, ["cat", "dog", "owl"])
    clean, attacked = page.partition("<h3>Without attack")[2].split("<h3>Under attack")
    assert "<th>owl</th>" in clean
    assert "style='--share:0.67'>2</td>" in clean
    assert "style='--share:0.33'>1</td><td class='miss' style='--share:0.33'>1</td>" in attacked


def test_page_lists_confusions_of_many_classes():
    labels = np.arange(30)
    predicted = np.where(labels == 7, 3, labels)
    page = build_page(report(), [], samples(labels, labels, predicted), [f"class{k}" for k in labels])
    assert "<td>class7</td><td>class3</td><td>1</td>" in page.partition("Under attack")[2]
    assert "None." in page.partition("Without attack")[2].partition("Under attack")[0]


def test_curve_has_axis_titles():
    page = build_page(report(), [])
    assert ">epsilon (linf)</text>" in page
    assert ">accuracy, %</text>" in page


def test_report_trust_follows_check_verdicts():
    assert report().trust == "broken"
    assert report().tags["trust"] == "broken"
    passed = [c.model_copy(update={"verdict": "passed"}) for c in report().checks]
    assert report(checks=passed).trust == "trusted"
    warned = [c.model_copy(update={"verdict": "warning"}) for c in report().checks]
    assert report(checks=warned).trust == "trusted"
    assert report(checks=[]).trust == "unchecked"
    assert Report.model_validate_json(report().model_dump_json()) == report()


def test_model_card_has_figures_and_valid_tables():
    card = build_card(report())
    assert "70.00 %" in card
    assert "## Trust: broken" in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {4, 5}


def test_curve_band_is_bootstrap_interval_and_wilson_at_zero():
    rng = np.random.default_rng(0)
    n, threat = 400, ThreatModel("linf", 0.1)
    flags = np.array([rng.random(n) < p for p in np.linspace(0.9, 0.2, len(CURVE_FACTORS))], float)
    flags[-1] = 0
    points = build_curve(flags, threat)
    assert [p.eps for p in points] == pytest.approx([f * 0.1 for f in CURVE_FACTORS])
    for point, row in zip(points[:-1], flags, strict=False):
        assert point.value == pytest.approx(row.mean())
        half = 1.96 * np.sqrt(row.mean() * (1 - row.mean()) / n)  # the normal approximation
        assert point.low == pytest.approx(row.mean() - half, abs=0.015)
        assert point.high == pytest.approx(row.mean() + half, abs=0.015)
    assert (points[-1].low, points[-1].high) == pytest.approx(wilson(0, n))


def test_mcnemar_matches_binomial_of_discordant_samples():
    first = [1] * 12 + [0] * 3 + [1] * 30 + [0] * 5
    second = [0] * 12 + [1] * 3 + [1] * 30 + [0] * 5
    paired = Paired.of(first, second)
    assert (paired.only_first, paired.only_second) == (12, 3)
    assert paired.p_value == pytest.approx(2 * sum(comb(15, k) for k in range(4)) / 2**15)
    assert Paired.of(first, first).p_value == 1
    assert str(paired).startswith("-18.00 points (3 against 12 samples")


def test_sign_test_is_one_sided():
    assert sign_test(12, 3) == pytest.approx(sum(comb(15, k) for k in range(4)) / 2**15)
    assert sign_test(3, 12) > 0.9
    assert sign_test(0, 0) == 1
