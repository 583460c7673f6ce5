"""Masking checks of texts: each kind of hidden robustness is flagged, and an honest model is not."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from advtrain.data.texts import PAD, RawText, fit_tokenizer, to_splits
from advtrain.edits import Table, Verdict, WordEdits
from advtrain.evaluation.edit_checks import TEXT_CHECKS
from advtrain.evaluation.edits import EditEvaluator
from advtrain.evaluation.worst_case import WorkItem

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
