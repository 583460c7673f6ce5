"""Texts in a report: which ones are shown, and what the tokenizer leaves out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from advtrain.data import ArraySplit, load_data
from advtrain.data.texts import RawText, encode_texts, fit_tokenizer
from advtrain.evaluation import EvalSpec, evaluate
from advtrain.evaluation.model_card import build_card
from advtrain.evaluation.report_html import build_page
from advtrain.evaluation.texts import (
    CARD_LENGTH,
    CARD_TEXTS,
    PAGE_LENGTH,
    PAGE_TEXTS,
    TextSplit,
    card_rows,
    text_facts,
    text_failures,
)
from advtrain.evaluation.worst_case import AttackRecord, SampleResults
from advtrain.models.serialized import ModelSource
from advtrain.training.trained_model import architecture
from tests.text_kit import text_recipe
from tests.unit.evaluation.test_report_html import NASTY, report

NAMES = {0: "ham", 1: NASTY}


def split_of(*texts: str) -> TextSplit:
    labels = np.zeros(len(texts), np.int64)
    return TextSplit(np.ones((len(texts), 3), np.int64), labels, np.array(texts, object))


def results(clean: list[int], broken_by: list[int], confidences: list[float]) -> SampleResults:
    adv = [1 if b >= 0 else c for c, b in zip(clean, broken_by, strict=True)]
    labels = np.zeros(len(clean), np.int64)
    attacks = [AttackRecord("pgd-2", 3, 1, 2), AttackRecord("apgd-ce", 2, 1, 1)]
    arrays = [np.array(each, np.int64) for each in (clean, adv, broken_by)]
    return SampleResults(labels, *arrays, attacks, np.array(confidences))


def test_errors_come_first_by_confidence_then_broken_texts_by_doubt():
    found = text_failures(
        results([0, 1, 1, 0, 0], [1, -2, -2, -1, 0], [0.6, 0.7, 0.9, 0.5, 0.55]),
        split_of("a", "b", "c", "d", "e"),
    )
    assert [(f["text"], f["broken_by"], f["predicted_as"], f["row"]) for f in found] == [
        ("c", None, 1, 2),
        ("b", None, 1, 1),
        ("e", "pgd-2", 1, 4),
        ("a", "apgd-ce", 1, 0),
    ]
    images = ArraySplit(np.zeros((5, 1, 2, 2), np.uint8), np.zeros(5, np.int64))
    assert text_failures(results([1] * 5, [-2] * 5, [0.5] * 5), images) == []


def test_page_and_card_show_a_few_texts_shortened_and_escaped():
    many = PAGE_TEXTS + 3
    texts = [f"{n} <b>{'long ' * 100}\n" for n in range(many)]
    found = text_failures(results([1] * many, [-2] * many, [0.5] * many), split_of(*texts))
    assert len(found) == PAGE_TEXTS
    page = build_page(report(), found, class_names=[NAMES[0], NAMES[1]])
    assert page.count("<figure class=text>") == PAGE_TEXTS
    assert "Misclassified texts" in page
    assert "an attack broke" not in page
    assert "&lt;b&gt;long" in page
    assert "<b>long" not in page
    rows = card_rows(found, NAMES)
    assert len(rows) == CARD_TEXTS
    assert {len(row[0]) for row in rows} == {CARD_LENGTH}
    assert rows[0][0].endswith("...")
    card = build_card(report(), texts=rows)
    assert "| text | label | predicted as | confidence |" in card
    assert "| 0 &lt;b>long long" in card
    assert max(len(line) for line in re.findall("<figure class=text>([^<]*)", page)) < PAGE_LENGTH + 10
    assert "Misclassified texts" not in build_card(report())


@pytest.mark.parametrize(("unit", "unknown"), [("words", 0.25), ("bytes", 0.0)])
def test_facts_are_the_shares_of_cut_texts_and_unknown_words(unit, unknown):
    train = RawText("here", np.array(["red red blue", "red"], object), np.zeros(2, np.int64))
    spec = fit_tokenizer(train, unit, 1 if unit == "words" else None, 3)
    texts = ["red", "red red blue blue"]
    ids, _, _ = encode_texts(spec, texts, "here")
    facts = text_facts(spec, TextSplit(ids, np.zeros(2, np.int64), np.array(texts, object)))
    assert (facts.tokenizer, facts.max_length, facts.vocabulary) == (unit, 3, spec.vocabulary)
    assert (facts.cut, facts.unknown) == (0.5, unknown)
    assert facts.rows()["longest text"] == "3 tokens; 50.0% of the evaluated texts are cut"
    assert text_facts(None, ArraySplit(ids, np.zeros(2, np.int64))) is None


def test_evaluation_of_a_text_model_lists_its_errors_and_facts(tmp_path):
    recipe = text_recipe(tmp_path)
    data = load_data(recipe.data, Path())
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = architecture(recipe, data)
        source = ModelSource.of(made.build().state_dict(), made)
    threat = recipe.evaluation.threat_model
    spec = EvalSpec(source, data.test, data, recipe.evaluation.judged_with, threat, name="m", full=True)
    found = evaluate(spec)
    wrong = np.flatnonzero(~found.samples.clean)
    listed = [each for each in found.failures if each["broken_by"] is None]
    assert {each["row"] for each in listed} <= set(wrong.tolist())
    assert len(listed) == min(len(wrong), PAGE_TEXTS) > 0
    assert all(data.test.texts[each["row"]] == each["text"] for each in found.failures)
    found.save(tmp_path / "report")
    page, card = ((tmp_path / "report" / name).read_text() for name in ("report.html", "model_card.md"))
    for shown in (page, card):
        assert listed[0]["text"] in shown
        assert f"words, {data.text.vocabulary} token ids" in shown
    assert found.report.text.unknown > 0
