"""Evaluations that a promotion repeats."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from advtrain.data import ArraySplit, Dataset
from advtrain.data.texts import RawText, fit_tokenizer, to_splits
from advtrain.data.unseen import Accepts
from advtrain.errors import UserError
from advtrain.promotion import Outcomes, PromotionRequest
from advtrain.recipe.data import TextShape
from advtrain.registry.versions import RegisteredModel
from advtrain.runs.leaks import Lineage
from pipelines import promote
from pipelines.workspace import Workspace
from tests.kit import digits_recipe
from tests.unit.promotion.test_edit_rules import evidence
from tests.unit.promotion.test_rules import policy

TEXTS = RawText("here", np.array(["good film", "bad film", "bad plot"], object), np.array([1, 0, 0]))


def tokenizer(*words):
    texts = np.array([" ".join(words)] * 2, object)
    return fit_tokenizer(RawText("here", texts, np.zeros(2, np.int64)), "words", None, 4)


def dataset_of(text):
    (split,), _ = to_splits(text, [TEXTS])
    return Dataset(
        "here", split, split, split, 2, TextShape(text.max_length, text.vocabulary), "d" * 64, text=text
    )


class StopError(Exception):
    """Ends a test at the evaluation."""


@pytest.fixture
def re_evaluate(monkeypatch):
    """Return the function that evaluates version 1 on the data of version 2, and the specs it evaluates."""
    texts = {"1": tokenizer("plot", "film", "good"), "2": tokenizer("good", "bad", "film", "plot")}
    specs = []

    def load(uri, _):
        text = texts[uri[-1]]
        accepts = Accepts((4,), 2, None, None, text)
        return RegisteredModel(SimpleNamespace(), digits_recipe(), "d" * 64, accepts, Lineage())

    def stop(spec, **_):
        specs.append(spec)
        raise StopError

    monkeypatch.setattr(promote, "load_registered", load)
    monkeypatch.setattr(promote, "load_dataset", lambda *_, kept, **__: dataset_of(kept))
    monkeypatch.setattr(promote, "with_synonyms", lambda dataset, *_: dataset)
    monkeypatch.setattr(promote, "evaluate", stop)
    workspace = Workspace(Path("runs"), "sqlite:///m.db", Path("data"))
    made = promote._re_evaluation("m", workspace, PromotionRequest("2", policy()), lambda _: None)
    return made, specs, texts


def test_champion_is_evaluated_again_with_its_own_tokenizer(re_evaluate):
    again, specs, texts = re_evaluate
    with pytest.raises(StopError):
        again(evidence(version="1"), evidence().report, "edits-2000", "2")
    (spec,) = specs
    (own,), _ = to_splits(texts["1"], [TEXTS])
    assert spec.dataset.text == texts["1"] != texts["2"]
    assert spec.split is spec.dataset.test
    assert np.array_equal(spec.split.images, own.images)
    assert not np.array_equal(own.images, dataset_of(texts["2"]).test.images)
    assert list(spec.split.texts) == list(TEXTS.texts)
    assert (spec.dataset.digest, spec.dataset.shape.vocabulary) == ("d" * 64, texts["1"].vocabulary)


def test_champion_without_tokenizer_is_refused_on_texts():
    dataset = dataset_of(tokenizer("good", "bad"))
    with pytest.raises(UserError, match="the model takes no texts, but the test split of here has texts"):
        promote.retokenized(dataset, None)
    with pytest.raises(UserError, match="the model takes texts, but the test split of here has no texts"):
        promote.retokenized(replace(dataset, test=SimpleNamespace(), text=None), tokenizer("good"))


@pytest.mark.parametrize(
    ("settings", "has_texts", "reason"),
    [
        ({"at_most": 200}, True, "report.json: edits: 'at_most': .* less than or equal to 100 .given: 200"),
        ({"table": "none.json"}, True, "none.json"),
        ({}, False, "texts"),
    ],
)
def test_report_that_cannot_be_repeated_is_a_reason_and_no_error(monkeypatch, settings, has_texts, reason):
    dataset = dataset_of(tokenizer("good", "bad", "film", "plot"))
    if not has_texts:
        images = ArraySplit(np.zeros((3, 1, 2, 2), np.uint8), TEXTS.labels)
        dataset = replace(dataset, test=images, text=None, shape=(1, 2, 2))
    accepts = Accepts(dataset.shape, 2, None, None, dataset.text)
    loaded = RegisteredModel(SimpleNamespace(), digits_recipe(), "d" * 64, accepts, Lineage())
    monkeypatch.setattr(promote, "load_registered", lambda *_: loaded)
    monkeypatch.setattr(promote, "load_dataset", lambda *_, **__: dataset)
    found = evidence(**settings)
    labels = Outcomes(**{**vars(found.outcomes), "labels": TEXTS.labels})
    report = found.report.model_copy(update={"data_digest": dataset.digest})
    workspace = Workspace(Path("runs"), "sqlite:///m.db", Path("data"))
    again = promote._repetition("m", workspace, lambda _: None)
    repetition = again(replace(found, report=report, outcomes=labels), 2)
    assert (repetition.compared, repetition.agrees) == (0, False)
    assert re.match("cannot be repeated here: .*" + reason, repetition.reason)
