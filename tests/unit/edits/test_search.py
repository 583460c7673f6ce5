"""Searches find what a linear model's closed form says, and count each text once."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from advtrain.edits import (
    METHODS,
    Candidates,
    CharEdits,
    Table,
    TextScore,
    WordEdits,
    apply_edits,
    margins,
    search,
    search_texts,
)
from advtrain.edits.problem import Problem
from advtrain.errors import UserError

beam_module = sys.modules["advtrain.edits.beam"]
search_module = sys.modules["advtrain.edits.search"]  # the package has a function of this name
WORDS = [f"q{'abcdefghij'[i]}" for i in range(10)]
TABLE = Table.build("tiny", {w: [f"{w}{c}" for c in "xyz"] for w in WORDS})
WEIGHTS = {
    w: float(v)
    for w, v in zip(
        [*WORDS, *(o for w in WORDS for o in TABLE.words[w])],
        torch.randn(40, generator=torch.Generator().manual_seed(1)),
        strict=True,
    )
}


class Linear:
    """Linear bag of words with the margin sum of weights + bias, which keeps the texts that it was sent."""

    def __init__(self, bias=0.0, scale=1.0):
        self.bias, self.scale, self.sent = bias, scale, []

    def __call__(self, texts):
        self.sent += texts
        z = torch.tensor([sum(WEIGHTS.get(w, 0.0) for w in t.split()) for t in texts], dtype=torch.float64)
        z = (z + self.bias) * self.scale
        return torch.stack([z, -z], 1).float() / 2


def gains(text):
    """Return the largest drop of the margin at each word, largest first."""
    drops = [WEIGHTS[w] - min(WEIGHTS[o] for o in TABLE.words[w]) for w in text.split()]
    return sorted((max(0.0, d) for d in drops), reverse=True)


def run(text, bias, threat=None, budget=10_000, method="default", label=0, seed=0, scale=1.0):
    model = Linear(bias, scale)
    verdict = search(TextScore(model), text, label, threat or WordEdits(TABLE, 3), budget, seed, method)
    assert verdict.queries == len(model.sent) == len(set(model.sent)) <= budget
    return verdict


TEXT = " ".join(WORDS[:8])
CLEAN = sum(WEIGHTS[w] for w in WORDS[:8])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("method", ["exact", "default", "beam"])
def test_worst_case_of_a_linear_model_is_the_sum_of_the_largest_gains(k, method):
    worst = sum(gains(TEXT)[:k])
    above = run(TEXT, worst - CLEAN + 0.01, WordEdits(TABLE, k), method=method)
    assert above.broken_at is None
    assert above.lowest == pytest.approx(0.01, abs=1e-5)
    assert above.status == ("not broken" if method == "beam" else "proven")
    below = run(TEXT, worst - CLEAN - 0.01, WordEdits(TABLE, k), method=method)
    assert below.status == "broken"
    assert below.broken_at == k  # one edit less does not suffice
    assert below.proven == (0 if method == "beam" else k - 1)
    assert len(below.changes) == k
    assert Linear(worst - CLEAN - 0.01)([below.text])[0].diff() > 0


def test_changes_give_the_broken_text():
    verdict = run(TEXT, sum(gains(TEXT)[:2]) - CLEAN - 0.01)
    text = list(TEXT)
    for change in reversed(verdict.changes):
        assert TEXT[change.start : change.end] == change.old
        text[change.start : change.end] = change.new
    assert "".join(text) == verdict.text


def test_exact_scores_every_candidate():
    threat = WordEdits(TABLE, 2)
    candidates = Candidates(TEXT, threat.edits(TEXT))
    verdict = run(TEXT, 100.0, threat, method="exact")
    assert verdict.queries == 1 + candidates.count(1) + candidates.count(2) == 1 + 24 + 252


def test_misclassified_text_takes_one_query():
    verdict = run(TEXT, -CLEAN - 1)
    assert (verdict.status, verdict.broken_at, verdict.proven, verdict.queries) == ("misclassified", 0, -1, 1)
    assert verdict.text == TEXT
    assert verdict.changes == ()


@pytest.mark.filterwarnings("error")
def test_a_tie_and_a_logit_that_is_not_finite_are_misclassified():
    for logits in ([0.0, 0.0], [1.0, float("nan")], [float("inf"), 0.0], [float("inf"), float("inf")]):
        score = TextScore(lambda texts, z=logits: torch.tensor([z] * len(texts)))
        assert search(score, TEXT, 0, WordEdits(TABLE, 1), 10, 0).status == "misclassified"


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(("text", "bias", "at_most"), [("nothing here", 1.0, 3), (TEXT, 1.0 - CLEAN, 0)])
def test_a_text_without_candidates_is_proven(text, bias, at_most, method):
    verdict = run(text, bias, WordEdits(TABLE, at_most), method=method)
    assert (verdict.status, verdict.proven, verdict.queries) == ("proven", at_most, 1)


def test_radius_above_the_number_of_words_is_proven():
    verdict = run(" ".join(WORDS[:2]), 100.0, WordEdits(TABLE, 10**9))
    assert (verdict.status, verdict.proven, verdict.queries) == ("proven", 10**9, 1 + 6 + 9)


def test_known_texts_do_not_use_up_the_last_queries():
    """One of two edits suffices, but the text without it was sent before and the budget is almost used up."""
    candidates = Candidates(
        "ab", CharEdits(2, "anywhere", "x", ("delete", "substitute"), frozenset()).edits("ab")
    )
    problem = Problem("ab", candidates, 2, 10, random.Random(0))
    problem.proven, problem.broken = 0, (0, 2)
    problem.known |= {key: 1.0 for key in range(9)}
    steps = beam_module._undo(problem)
    assert next(steps) == [candidates.apply((2,))]
    assert steps.send(np.array([1.0])) == [candidates.apply((0,))]
    problem.known["new"] = -1.0
    with pytest.raises(StopIteration):
        steps.send(np.array([-1.0]))
    assert problem.broken == (0,)


@pytest.mark.parametrize("budget", [1, 2, 24, 25, 26, 100, 277, 1000])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_budget_is_never_exceeded(budget, method):
    verdict = run(TEXT, 100.0, WordEdits(TABLE, 2), budget=budget, method=method)
    affordable = 2 if budget >= 277 else 1 if budget >= 25 else 0
    assert verdict.proven == (affordable if method in ("exact", "default") else 0)
    if method in ("beam", "default"):  # all that is left is used
        assert verdict.queries == min(budget, 277)


def test_default_continues_with_beam_when_the_budget_does_not_suffice():
    bias = sum(gains(TEXT)[:3]) - CLEAN - 0.01
    verdict = run(TEXT, bias, WordEdits(TABLE, 3), budget=600)
    assert (verdict.proven, verdict.broken_at, verdict.status) == (2, 3, "broken")
    assert run(TEXT, bias, WordEdits(TABLE, 3), budget=600, method="exact").status == "not broken"


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_scale_of_the_logits_changes_nothing(scale, method):
    for k, offset in itertools.product((1, 2, 3), (0.1, -0.1)):
        bias = sum(gains(TEXT)[:k]) - CLEAN + offset
        one, other = (run(TEXT, bias, budget=300, method=method, scale=s) for s in (1.0, scale))
        assert (one.broken_at, one.text, one.queries, one.proven) == (
            other.broken_at,
            other.text,
            other.queries,
            other.proven,
        )


def random_cases(n):
    generator = torch.Generator().manual_seed(3)
    for i in range(n):
        words = [WORDS[j] for j in torch.randint(10, (8,), generator=generator)]
        text = " ".join(words)
        share = float(torch.rand(1, generator=generator))
        yield i, text, sum(gains(text)[:4]) * share - sum(WEIGHTS[w] for w in words) + 0.01


def test_beam_breaks_nothing_that_exact_proves_and_at_least_what_random_breaks():
    counts = Counter()
    for seed, text, bias in random_cases(60):
        threat = WordEdits(TABLE, 3)
        exact = run(text, bias, threat, 20_000, "exact")
        assert exact.status in ("proven", "broken")
        for method in ("beam", "random"):
            found = run(text, bias, threat, 150, method, seed=seed)
            counts[method] += found.status == "broken"
            if exact.status == "proven":
                assert found.status == "not broken"
            if found.broken_at is not None:
                assert found.broken_at >= exact.broken_at
        counts["exact"] += exact.status == "broken"
    assert counts["exact"] >= counts["beam"] >= counts["random"]
    assert 60 > counts["exact"] > 10  # both outcomes happen
    assert counts["beam"] > counts["random"]


def test_random_search_finds_the_fewest_edits_by_undoing_others():
    bias = sum(gains(TEXT)[:1]) - CLEAN - 0.01  # one edit suffices
    assert run(TEXT, bias, WordEdits(TABLE, 3), 5000, "random").broken_at == 1


@pytest.mark.parametrize("most_edits", [1, 100, 200_000])
def test_same_seed_gives_the_same_verdict_also_among_other_texts(most_edits, monkeypatch):
    monkeypatch.setattr(search_module, "_MOST_EDITS", most_edits)
    cases = list(random_cases(40))
    model = Linear(6.0)
    arguments = [text for _, text, _ in cases], [0] * 40, WordEdits(TABLE, 3), 200, list(range(40))
    first = search_texts(TextScore(model), *arguments)
    assert first == search_texts(TextScore(Linear(6.0)), *arguments)
    alone = [run(text, 6.0, budget=200, seed=seed) for seed, text, _ in cases]
    assert first == alone
    assert len({verdict.status for verdict in first}) > 1


@pytest.mark.parametrize(("budget", "texts"), [(10, 32), (100, 5), (10_000, 1)])
def test_larger_budgets_search_fewer_texts_at_the_same_time(budget, texts, monkeypatch):
    monkeypatch.setattr(search_module, "_MOST_QUERIES", 500)
    model, sizes = Linear(100.0), []
    score = TextScore(lambda sent: sizes.append(len(sent)) or model(sent))
    originals = [" ".join(words) for words in itertools.islice(itertools.permutations(WORDS[:5]), 40)]
    search_texts(score, originals, [0] * 40, WordEdits(TABLE, 1), budget, range(40))
    assert sizes[0] == texts


def test_other_seeds_send_other_texts():
    sent = []
    for seed in (0, 1):
        model = Linear(100.0)
        search(TextScore(model), TEXT, 0, WordEdits(TABLE, 3), 100, seed, "random")
        sent.append(model.sent)
    assert set(sent[0]) != set(sent[1])


def test_same_text_from_different_edits_is_sent_once():
    model = Linear(1.0)
    threat = CharEdits(1, "anywhere", "a", ("insert", "delete"), frozenset())
    verdict = search(TextScore(model), "aaaa", 0, threat, 100, 0)
    assert Candidates("aaaa", threat.edits("aaaa")).count(1) == 9
    assert sorted(model.sent) == ["aaa", "aaaa", "aaaaa"]
    assert (verdict.queries, verdict.proven) == (3, 1)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_another_number_of_logits_than_of_texts_is_refused(rows):
    score = TextScore(lambda texts: torch.eye(2)[[0] * rows])
    with pytest.raises(UserError, match=rf"logits of shape \({rows}, 2\) for 2 texts"):
        search_texts(score, [TEXT, "other"], [0, 0], WordEdits(TABLE, 1), 10, [0, 1])


class WithoutDoubles:
    """Logits on a device that has no float64."""

    def __init__(self, logits):
        self.logits = logits

    def detach(self):
        return self

    def cpu(self):
        return self.logits


def test_margins_need_no_float64_on_the_device():
    assert margins(WithoutDoubles(torch.tensor([[3.0, 1.0]])), 0).tolist() == [2.0]


def test_seeds_and_labels_may_be_integers_of_numpy():
    score, threat = TextScore(Linear(6.0)), WordEdits(TABLE, 2)
    found = search_texts(score, [TEXT], np.array([0]), threat, 100, np.array([7]), "random")
    assert found == search_texts(score, [TEXT], [0], threat, 100, [7], "random")


def test_wrong_settings_are_refused():
    score = TextScore(Linear())
    with pytest.raises(UserError, match="did you mean 'exact'"):
        search(score, TEXT, 0, WordEdits(TABLE, 1), 10, 0, "exakt")
    for budget in (0, 2.5, "3", True):
        with pytest.raises(UserError, match=rf"integer of at least 1 query \(got {budget!r}\)"):
            search(score, TEXT, 0, WordEdits(TABLE, 1), budget, 0)
    for labels, seeds in (([0], [0, 1]), ([0, 1], [0])):
        with pytest.raises(UserError, match=rf"got 2 texts, {len(labels)} labels and {len(seeds)} seeds"):
            search_texts(score, [TEXT, TEXT], labels, WordEdits(TABLE, 1), 10, seeds)
    with pytest.raises(UserError, match=r"label 2 returned logits of shape \(1, 2\)"):
        search(score, TEXT, 2, WordEdits(TABLE, 1), 10, 0)


def hashed(level):
    """Return a model without structure: the margin of a text is a hash of it, mostly positive."""

    def model(texts):
        z = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 - level for text in texts]
        return torch.stack([torch.tensor(z), torch.zeros(len(z))], 1)

    return model


@pytest.mark.parametrize("level", [0.002, 0.05])
@pytest.mark.parametrize("threat", [WordEdits(TABLE, 2), CharEdits(2, "anywhere", "x")], ids=str)
@pytest.mark.parametrize("budget", [1, 40, 300, 2000])
def test_verdicts_agree_with_a_list_of_all_texts(level, threat, budget):
    texts = [" ".join(WORDS[i : i + n]) for n in (1, 2, 3) for i in range(3)]
    model = hashed(level)
    for method in METHODS:
        verdicts = search_texts(TextScore(model), texts, [0] * 9, threat, budget, range(9), method)
        for text, verdict in zip(texts, verdicts, strict=True):
            edits = threat.edits(text)
            fewest = next((k for k in range(3) if any_broken(model, text, edits, k)), None)
            if verdict.broken_at is not None:
                assert fewest is not None
                assert fewest <= verdict.broken_at
                assert model([verdict.text])[0].diff() >= 0
                assert len(verdict.changes) == verdict.broken_at
            assert verdict.proven < (3 if fewest is None else fewest)
            if budget == 2000 and method in ("exact", "default"):
                assert verdict.broken_at == fewest
                assert verdict.proven == (2 if fewest is None else fewest - 1)


@functools.cache
def candidate_texts(text, edits, k):
    """Return the texts of all sets of k edits whose places do not overlap."""
    sets = itertools.combinations(edits, k)
    return [
        apply_edits(text, each)
        for each in sets
        if all(a.high < b.low or b.high < a.low for a, b in itertools.combinations(each, 2))
    ]


def any_broken(model, text, edits, k):
    texts = candidate_texts(text, tuple(edits), k)
    return bool(texts) and bool((model(texts)[:, 0] <= 0).any())
