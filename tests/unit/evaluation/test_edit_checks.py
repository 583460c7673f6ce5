"""Masking checks of texts: each kind of hidden robustness is flagged, and an honest model is not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from advtrain.data import Dataset
from advtrain.data.texts import PAD, RawText, fit_tokenizer, to_splits
from advtrain.edits import Table, Verdict, WordEdits
from advtrain.evaluation import EvalSpec, evaluate
from advtrain.evaluation.edit_checks import TEXT_CHECKS
from advtrain.evaluation.edits import EditEvaluator, training_texts
from advtrain.evaluation.worst_case import WorkItem
from advtrain.recipe.edits import EditThreatConfig
from tests.unit.evaluation.test_edits import bag_and_data, sentences

GOOD, BAD, OTHER = ["good", "fine", "nice", "great"], ["bad", "poor", "awful", "dull"], ["film", "plot"]
#: Synonyms of the same sign, so that few texts break; in 1/16, all different.
WEIGHTS = dict(zip([*GOOD, *BAD, *OTHER], [32, 29, 27, 25, -31, -28, -26, -24, 2, -3], strict=True))
TABLE = Table.build("small", {w: [o for o in words if o != w] for words in (GOOD, BAD) for w in words})
TEXTS = [
    f"{first} {other} {second}"
    for words in (GOOD, BAD)
    for first, other, second in itertools.product(words, OTHER, words)
]


class Bag(nn.Module):
    """Linear bag of words, with one flaw by name."""

    def __init__(self, weights: torch.Tensor, flaw: str = "") -> None:
        super().__init__()
        self.weights, self.flaw = nn.Parameter(weights), flaw

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weights = self.weights.sign() if self.flaw == "quantized" else self.weights
        score = weights[ids].sum(1)
        if self.flaw == "saturated":
            score = 1e6 * score.sign()
        if self.flaw == "random":
            score = score + torch.randn_like(score)
        if self.flaw == "padding":
            score = score + 0.1 * (ids == PAD).sum(1)
        if self.flaw == "batch":
            score = score - score.mean()
        logits = torch.stack([torch.zeros_like(score), score], 1)
        return torch.tensor([[1.0, 0.0]]).expand(len(ids), 2) if self.flaw == "constant" else logits


def evaluator(flaw="", words=(), max_length=4, table=TABLE, scale=1.0):
    """Return an evaluator of the texts; only `words` are in the vocabulary if there are any."""
    labels = np.array([0 if flaw == "constant" else int(t.split()[0] in GOOD) for t in TEXTS], np.int64)
    known = RawText("here", np.array([" ".join(words or WEIGHTS)] * 2, object), labels[:2])
    spec = fit_tokenizer(known, "words", None, max_length)
    (split,), _ = to_splits(spec, [RawText("here", np.array(TEXTS, object), labels)])
    vocabulary = json.loads(spec.tokenizer)["model"]["vocab"]
    weights = torch.zeros(spec.vocabulary)
    for word, weight in WEIGHTS.items():
        if word in vocabulary:
            weights[vocabulary[word]] = scale * weight / 16
    model, threat = Bag(weights, flaw).eval(), WordEdits(table, 2, frozenset())
    return EditEvaluator(
        model, TEXTS, split.labels, threat, spec, 1000, 0, torch.device("cpu"), 2, dict(TEXT_CHECKS)
    )


def verdicts(made: EditEvaluator, *names: str) -> dict[str, str]:
    rows = np.arange(0, len(TEXTS), 2)
    return {name: made.do(WorkItem(rows, probe=name))["verdict"] for name in names or TEXT_CHECKS}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_honest_model_passes_at_any_scale_of_its_logits(scale):
    found = verdicts(evaluator(scale=scale))
    assert found.pop("guided") == "skipped"  # all candidates fit its queries
    assert found.pop("transfer") == "skipped"  # there are no training texts
    assert set(found.values()) == {"passed"}


@pytest.mark.parametrize(
    ("flaw", "check"),
    [
        ("saturated", "flat_logits"),
        ("quantized", "flat_logits"),
        ("random", "stochastic"),
        ("padding", "batch"),
        ("batch", "batch"),
        ("constant", "free_words"),
    ],
)
def test_model_that_hides_its_errors_is_flagged(flaw, check):
    assert verdicts(evaluator(flaw), check) == {check: "failed"}


def test_vocabulary_without_the_substitutions_is_flagged():
    known = [GOOD[0], BAD[0], *OTHER]
    assert verdicts(evaluator(words=known), "unknown_tokens") == {"unknown_tokens": "warning"}


def test_tokenizer_that_ignores_the_edits_is_flagged():
    assert verdicts(evaluator(words=OTHER), "no_ops") == {"no_ops": "warning"}


def test_texts_that_are_cut_are_flagged():
    made = evaluator(max_length=1)
    assert verdicts(made, "truncation") == {"truncation": "warning"}
    result = made.do(WorkItem(np.arange(8), probe="truncation"))
    assert result["data"]["cut_texts"] == 8
    assert "of 1 tokens, in 8 texts" in result["evidence"]


class Found(EditEvaluator):
    """Evaluator whose searches have given results: row r survives `method` if r is in survivors[method]."""

    survivors: dict[str, range]

    def verdicts(self, rows, **changed):
        left = self.survivors[changed["method"]]
        return [Verdict(2, None if row in left else 1, 0, 1, 1.0, 0.0) for row in rows]


@pytest.mark.parametrize(
    ("beam", "random", "verdict"),
    [(5, 20, "passed"), (5, 5, "passed"), (5, 4, "warning"), (20, 5, "failed")],
)
def test_guided_search_must_not_lose_to_random_edits(beam, random, verdict):
    words = {w: [f"{w}{k}" for k in range(40)] for w in WEIGHTS}
    made = evaluator(table=Table.build("large", words))
    made.__class__ = Found
    made.survivors = {"beam": range(beam), "random": range(random)}
    assert made.do(WorkItem(np.arange(32), probe="guided"))["verdict"] == verdict


PRAISE, BLAME = ([f"{kind}{k}" for k in range(30)] for kind in ("good", "bad"))
#: Every word may become any other word of its kind, or one of the other kind.
FEW_OPPOSITES = Table.build(
    "few opposites",
    {
        word: [other for other in words if other != word] + [opposites[i]]
        for words, opposites in ((PRAISE, BLAME), (BLAME, PRAISE))
        for i, word in enumerate(words)
    },
)


class Misleading(nn.Module):
    """Counts the words of both kinds; while the class is the same, fewer of its words mean a larger margin."""

    def __init__(self, weights: torch.Tensor, honest: bool = False) -> None:
        super().__init__()
        self.weights, self.honest = nn.Parameter(weights), honest

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        score = self.weights[ids].sum(1)
        score = score if self.honest else score.sign() * (20 - score.abs())
        return torch.stack([torch.zeros_like(score), score], 1)


def of_two_kinds(honest=False, at_most=4, train=300):
    """Return the checks of an evaluation of 24 texts of six words, with a budget far below their candidates."""
    rng = np.random.default_rng(0)
    labels = np.arange(train + 24) % 2
    texts = [" ".join(rng.choice([BLAME, PRAISE][label], 6)) for label in labels]
    raw = RawText("here", np.array(texts, object), labels)
    spec = fit_tokenizer(raw, "words", None, 6)
    (split,), _ = to_splits(spec, [raw])
    vocabulary = json.loads(spec.tokenizer)["model"]["vocab"]
    weights = torch.zeros(spec.vocabulary)
    for sign, words in ((1, PRAISE), (-1, BLAME)):
        weights[[vocabulary[word] for word in words]] = sign * torch.linspace(0.95, 1.05, 30)
    test = split.take(np.arange(train, train + 24))
    parts = (split.take(np.arange(train)) if train else test, test, test)
    data = Dataset("here", *parts, 2, (6,), "0" * 64, text=spec, synonyms=FEW_OPPOSITES)
    given = {"edits": "words", "at_most": at_most, "table": "few opposites", "protect": "none", "budget": 200}
    threat = EditThreatConfig.model_validate(given)
    evaluation = evaluate(
        EvalSpec(Misleading(weights, honest), test, data, "", threat, "two kinds", full=True)
    )
    return evaluation.report, {check.name: check for check in evaluation.report.checks}


def test_margins_that_mislead_the_search_are_flagged_by_transfer():
    report, checks = of_two_kinds()
    assert report.robust_accuracy > 0.8  # every text has a misclassified candidate
    check = checks["transfer"]
    assert check.verdict == "failed"
    assert check.data["texts"] > 20
    assert check.data["broken"] > 12
    assert "trust the proven share only" in check.advice
    assert report.trust == "broken"
    assert checks["guided"].verdict != "failed"  # random edits find few of them


def test_transfer_passes_for_a_model_that_is_robust():
    report, checks = of_two_kinds(honest=True, at_most=2)
    assert report.robust_accuracy == 1
    assert report.edits.proven.count == 0
    assert checks["transfer"].verdict == "passed"
    assert checks["transfer"].data["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("training", "rows", "evidence"),
    [
        (None, 5, "not run: the training texts are unknown"),
        ((TEXTS, np.zeros(len(TEXTS), np.int64)), 5, "not run: a text_cnn learns nothing from"),
        ((TEXTS, np.arange(len(TEXTS)) % 2), 0, "transfer can break no other"),
    ],
)
def test_transfer_says_why_it_is_not_run(training, rows, evidence):
    made = evaluator()
    made.training = training
    result = made.do(WorkItem(np.arange(rows), probe="transfer"))
    assert result["verdict"] == "skipped"
    assert evidence in result["evidence"]


def test_data_without_a_training_split_has_no_training_texts():
    *_, data = bag_and_data()
    assert training_texts(data, 0) is None
    texts, labels = training_texts(replace(data, train=data.test.take(np.arange(9))), 0)
    assert (texts, labels.tolist()) == (sentences()[:9], data.test.labels[:9].tolist())
