"""Evaluation under edits: exact bounds, the same report for any workers, and the cache."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from advtrain.data import Dataset, Place
from advtrain.data.texts import RawText, fit_tokenizer, to_splits
from advtrain.edits import Table
from advtrain.errors import UserError
from advtrain.evaluation import EvalSpec, Report, Workers, evaluate, validate
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.promotion import Outcomes
from advtrain.promotion.consistency import contradictions
from advtrain.recipe.data import TextShape
from advtrain.recipe.edits import EditThreatConfig
from advtrain.recipe.model import ModelConfig
from advtrain.recipe.sections import EvaluationConfig

WORDS = ["good", "fine", "nice", "bad", "poor", "awful", "film", "movie", "plot", "cast"]
#: Weight of each word in the second logit: exact in float32, and no sum of at most five is 0.
SIXTEENTHS = [48, 16, 3, -48, -16, -3, 2, 6, -2, -5]
WEIGHTS = {word: k / 16 + 1 / 1024 for word, k in zip(WORDS, SIXTEENTHS, strict=True)}
TABLE = {
    "good": ["nice", "poor"],
    "fine": ["nice"],
    "nice": ["fine", "bad"],
    "bad": ["poor", "fine"],
    "poor": ["awful"],
    "awful": ["nice", "poor"],
    "film": ["movie", "plot"],
    "movie": ["film", "cast"],
}


class Bag(nn.Module):
    """Linear bag of words: the second logit is the sum of the words' weights."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        score = self.weights[ids].sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def sentences(n=60):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=1 + i % 5)) for i in range(n)]


def bag_and_data(words=TABLE):
    """Return a bag of words with its data; the first five labels are wrong without an edit."""
    texts = sentences()
    scores = np.array([sum(WEIGHTS[word] for word in text.split()) for text in texts])
    labels = (scores > 0).astype(np.int64)
    labels[:5] = 1 - labels[:5]
    raw = RawText("here", np.array(texts, object), labels)
    spec = fit_tokenizer(
        RawText("here", np.array([" ".join(WORDS)] * 2, object), labels[:2]), "words", None, 6
    )
    (split,), _ = to_splits(spec, [raw])
    vocabulary = json.loads(spec.tokenizer)["model"]["vocab"]
    weights = torch.zeros(spec.vocabulary)
    for word, weight in WEIGHTS.items():
        weights[vocabulary[word]] = weight
    shape = TextShape(spec.max_length, spec.vocabulary)
    data = Dataset("here", split, split, split, 2, shape, "0" * 64, ["bad", "good"], text=spec)
    return Bag(weights), Dataset(**{**vars(data), "synonyms": Table.build("small", words)})


def threat(at_most=2, budget=5000, **values):
    given = {"edits": "words", "at_most": at_most, "table": "small", "protect": "none", "budget": budget}
    return EditThreatConfig.model_validate(given | values)


def spec_of(model, data, config, **values):
    return EvalSpec(model, data.test, data, "", config, "bag", **values)


def worst(text, label, at_most):
    """Return whether some replacement of at most `at_most` words is misclassified, by brute force."""
    words = text.split()
    options = [[word, *TABLE.get(word, [])] for word in words]
    for chosen in itertools.product(*options):
        if sum(a != b for a, b in zip(words, chosen, strict=True)) <= at_most:
            score = sum(WEIGHTS[word] for word in chosen)
            if (score if label else -score) <= 0:
                return True
    return False


def test_exact_report_equals_the_worst_case_by_brute_force():
    model, data = bag_and_data()
    found = evaluate(spec_of(model, data, threat(), full=True))
    report, samples = found.report, found.samples
    assert isinstance(report, Report)
    texts, labels = sentences(), data.test.labels.tolist()
    for edits, point in enumerate(report.curve):
        robust = [not worst(text, label, edits) for text, label in zip(texts, labels, strict=True)]
        assert point.eps == edits
        assert point.value == np.mean(robust)
        assert np.array_equal(samples.robust_within(edits), robust)
    assert report.edits is not None
    assert report.edits.proven == report.edits.not_broken == report.robust
    assert 0 < report.robust_accuracy < report.clean_accuracy == 55 / 60
    assert report.threat == "words:2"
    assert report.attacks[0].name == "edits-5000"


def test_small_budget_leaves_a_gap_that_contains_the_exact_accuracy():
    model, data = bag_and_data()
    exact = evaluate(spec_of(model, data, threat())).report
    report = evaluate(spec_of(model, data, threat(budget=4))).report
    assert isinstance(report, Report)
    assert report.edits is not None
    assert report.edits.proven.value < exact.robust_accuracy <= report.edits.not_broken.value
    assert report.edits.queries_max <= 4
    assert report.edits.queries <= 4 * 60


class Rounding(nn.Module):
    """Bag of words that adds a sequence of values to the first logit, one for each call."""

    def __init__(self, bag, values):
        super().__init__()
        self.bag, self.values = bag, itertools.cycle(values)

    def forward(self, ids):
        return self.bag(ids) + torch.tensor([next(self.values), 0.0])


def check_agreement(found):
    """Check that clean, robust, proven, curve, gallery and gate agree with the verdicts."""
    report, samples = found.report, found.samples
    at = [verdict["broken_at"] for verdict in samples.verdicts]
    assert samples.clean.tolist() == [each != 0 for each in at]
    assert samples.robust.tolist() == [each is None for each in at]
    assert not (samples.proven & ~samples.robust).any()
    assert report.edits.proven.count <= report.edits.not_broken.count == report.robust.count
    assert report.curve[0].value == report.clean_accuracy
    assert report.curve[-1].value == report.robust_accuracy
    assert (samples.adv_predictions == samples.labels).tolist() == samples.robust.tolist()
    assert {each["row"] for each in found.failures} <= set(np.flatnonzero(samples.clean).tolist())
    assert contradictions(report, Outcomes.of(samples)) == []


def test_a_tie_is_misclassified_in_every_figure():
    model, data = bag_and_data()
    with torch.no_grad():
        model.weights.zero_()
    found = evaluate(spec_of(model, data, threat()))
    check_agreement(found)
    assert found.samples.clean_predictions.tolist() == [-1 if y == 0 else 0 for y in data.test.labels]
    judge = EvaluationConfig(threat=threat(validation_budget=20))
    assert validate(model, data.test, data, judge, Place())["clean_accuracy"] == 0


@pytest.mark.parametrize("values", [(100.0, 0.0), (-100.0, 0.0, 0.0), (0.0, 100.0, -100.0, 0.0)])
def test_figures_agree_when_another_pass_gives_other_logits(values):
    model, data = bag_and_data()
    check_agreement(evaluate(spec_of(Rounding(model, values), data, threat())))


def test_saved_report_has_the_broken_texts_and_their_edits(tmp_path):
    model, data = bag_and_data()
    found = evaluate(spec_of(model, data, threat(), full=True))
    found.save(tmp_path)
    assert Report.load(tmp_path) == found.report
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    broken = [row for row in rows if row["broken_by"] == "edits-5000"]
    assert broken
    for row in broken:
        text, position, parts = row["text"], 0, []
        for change in row["changes"]:
            assert text[change["start"] : change["end"]] == change["old"]
            parts += [text[position : change["start"]], change["new"]]
            position = change["end"]
        assert "".join([*parts, text[position:]]) == row["broken_text"]
        assert len(row["changes"]) == row["broken_edits"] <= 2
        assert row["adv_prediction"] != row["label"] == row["clean_prediction"]
        assert sum(WEIGHTS[word] for word in row["broken_text"].split()) * (2 * row["label"] - 1) <= 0
    page = (tmp_path / "report.html").read_text()
    assert "<del>" in page
    assert "<ins>" in page
    assert "proven robust accuracy" in (tmp_path / "model_card.md").read_text()


def source_and_data():
    """Return an untrained text_cnn, whose errors are random, with data of its own predictions."""
    _, data = bag_and_data()
    config = ModelConfig(name="text_cnn", args={"dim": 8, "channels": 4})
    made = Architecture(config, data.shape, 2)
    torch.manual_seed(0)
    return ModelSource.of(made.build().state_dict(), made), data


@pytest.mark.ray
def test_report_is_the_same_with_two_workers(ray_cluster):
    source, data = source_and_data()
    data = Dataset(**{**vars(data), "train": data.test.take(np.arange(50))})  # for the check `transfer`
    here = evaluate(spec_of(source, data, threat(budget=30), full=True))
    there = evaluate(spec_of(source, data, threat(budget=30), full=True), workers=Workers(2))
    assert here.report == there.report
    (check,) = [check for check in here.report.checks if check.name == "transfer"]
    assert check.verdict != "skipped"
    assert here.samples.columns().keys() == there.samples.columns().keys()
    assert here.samples.verdicts == there.samples.verdicts


def test_stopped_evaluation_resumes_with_the_same_queries(tmp_path):
    source, data = source_and_data()
    whole = evaluate(spec_of(source, data, threat(), full=True), cache=tmp_path / "whole")
    (lines,) = (tmp_path / "whole").glob("*/units.jsonl")
    target = tmp_path / "cut" / lines.parent.name
    target.mkdir(parents=True)
    kept = lines.read_text().splitlines(keepends=True)
    (target / "units.jsonl").write_text(kept[0] + kept[1][:40])  # killed while it wrote the second line
    again = evaluate(spec_of(source, data, threat(), full=True), cache=tmp_path / "cut")
    assert again.report == whole.report
    assert not again.all_known
    assert evaluate(spec_of(source, data, threat(), full=True), cache=tmp_path / "cut").all_known
    assert len(list((tmp_path / "cut").iterdir())) == 1


def test_other_table_of_the_same_name_is_another_evaluation(tmp_path):
    source, data = source_and_data()
    evaluate(spec_of(source, data, threat()), cache=tmp_path)
    other = Dataset(**{**vars(data), "synonyms": Table.build("small", {"good": ["bad"]})})
    evaluate(spec_of(source, other, threat()), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def with_texts(data, texts):
    """Return the data with as many other test texts."""
    raw = RawText("here", np.array(texts, object), data.test.labels)
    (split,), _ = to_splits(data.text, [raw])
    return Dataset(**{**vars(data), "test": split})


def test_other_unknown_words_are_another_evaluation(tmp_path):
    source, data = source_and_data()
    one, other = (with_texts(data, [f"film {word} movie"] * 60) for word in ("zzqx", "qqqq"))
    assert np.array_equal(one.test.images, other.test.images)
    table = Table.build("small", {"zzqx": ["good"]})
    one, other = (Dataset(**{**vars(each), "synonyms": table}) for each in (one, other))
    found = [evaluate(spec_of(source, each, threat()), cache=tmp_path) for each in (one, other)]
    assert not found[1].all_known
    assert found[1].report == evaluate(spec_of(source, other, threat())).report
    assert len({each.report.edits.texts_digest for each in found}) == 2
    assert evaluate(spec_of(source, one, threat()), cache=tmp_path).all_known


def test_other_tokenizer_of_the_same_ids_is_another_evaluation(tmp_path):
    source, data = source_and_data()
    data = with_texts(data, ["film"] * 60)
    evaluate(spec_of(source, data, threat()), cache=tmp_path)
    made = json.loads(data.text.tokenizer)
    vocabulary = made["model"]["vocab"]
    vocabulary["good"], vocabulary["awful"] = vocabulary["awful"], vocabulary["good"]
    other = data.text.model_copy(update={"tokenizer": json.dumps(made)})
    found = evaluate(spec_of(source, Dataset(**{**vars(data), "text": other}), threat()), cache=tmp_path)
    assert not found.all_known


def test_alphabet_of_other_test_texts_is_another_evaluation(tmp_path):
    source, data = source_and_data()
    config = EditThreatConfig.model_validate(
        {"edits": "chars", "at_most": 1, "alphabet": "data", "budget": 9}
    )
    evaluate(spec_of(source, data, config), cache=tmp_path)
    other = with_texts(data, ["good zebra"] * 60)
    spec = EvalSpec(source, data.test, other, "", config, "bag")
    assert not evaluate(spec, cache=tmp_path).all_known


def test_edits_of_characters_are_judged():
    model, data = bag_and_data()
    config = EditThreatConfig.model_validate({"edits": "chars", "at_most": 1, "protect": "none"})
    report = evaluate(spec_of(model, data, config)).report
    assert isinstance(report, Report)
    assert report.edits is not None
    assert report.threat == "chars:1"
    assert report.edits.table_digest is None
    assert report.robust_accuracy < report.clean_accuracy


def test_table_that_is_not_loaded_is_an_error():
    model, data = bag_and_data()
    with pytest.raises(UserError, match="table 'other' of evaluation.threat is not loaded"):
        evaluate(spec_of(model, data, threat(table="other")))


def test_validation_gives_the_same_sums_on_one_and_three_ranks():
    model, data = bag_and_data()
    judge = EvaluationConfig(threat=threat(validation_budget=20))
    alone = validate(model, data.test, data, judge, Place())
    parts = [validate(model, data.test, data, judge, Place(rank, 3)) for rank in range(3)]
    assert {key: sum(part[key] for part in parts) for key in alone} == alone
    assert alone["samples"] == 60
    assert alone["clean_accuracy"] == 55
    assert 0 < alone["robust_accuracy"] < 55
