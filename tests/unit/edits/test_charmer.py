"""Edits of characters agree with an independent construction, that of Charmer (Abad Rocamora et al. 2024).

Charmer writes a blank between all characters. One edit puts a character or a blank in one of the 2 n + 1 places, and
then the blanks are removed.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from advtrain.edits import Candidates, CharEdits, TextScore, search_texts

BLANK = "\0"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "ate",
    "red",
    "hot",
    "figs",
    "while",
    "it",
    "ran",
    "by",
]
TEXTS = [" ".join(WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(4)) for i in range(50)]


def expanded(text):
    return [BLANK, *itertools.chain.from_iterable((c, BLANK) for c in text)]


def contracted(places):
    return "".join(c for c in places if c != BLANK)


def charmer_set(text, alphabet, k):
    """Return the texts after up to k edits of places of the original text."""
    places = expanded(text)
    texts = set()
    for chosen in itertools.chain(*(itertools.combinations(range(len(places)), j) for j in range(k + 1))):
        for new in itertools.product([*alphabet, BLANK], repeat=len(chosen)):
            changed = list(places)
            for place, c in zip(chosen, new, strict=True):
                changed[place] = c
            texts.add(contracted(changed))
    return texts


@pytest.mark.parametrize("text", ["abba", "a b", "x", ""])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_candidates_anywhere_are_the_edits_of_charmer(text, k):
    operations = ("substitute", "delete", "insert")
    candidates = Candidates(text, CharEdits(k, "anywhere", "ab", operations, frozenset()).edits(text))
    found = {each for j in range(k + 1) for _, each in candidates.all(j)}
    assert found == charmer_set(text, "ab", k)


class Trigrams(torch.nn.Module):
    """Random convolution over characters with a maximum over the text: an honest model of characters."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.filters = torch.randn(16, 128, 3, generator=generator)
        self.head = torch.randn(16, 3, generator=generator)
        self.queries = 0

    def forward(self, texts):
        self.queries += len(texts)
        longest = max(map(len, texts)) + 4
        x = torch.zeros(len(texts), 128, longest)
        for row, text in enumerate(texts):
            x[row, torch.tensor([ord(c) for c in text]), torch.arange(2, len(text) + 2)] = 1.0
        h = torch.nn.functional.conv1d(x, self.filters).amax(2)
        return h @ self.head


def margin(model, texts, label):
    logits = model(texts).double()
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return logits[:, label] - others.amax(1)


def charmer(model, text, label, alphabet, k, places=20):
    """Return the text that Charmer finds: the best edit of the best places, k times, and whether it is broken."""
    for _ in range(k):
        old = expanded(text)
        probes = [contracted([*old[:i], " ", *old[i + 1 :]]) for i in range(len(old))]
        ranked = margin(model, probes, label).argsort()[:places].tolist()
        tried = [contracted([*old[:i], c, *old[i + 1 :]]) for i in ranked for c in [*alphabet, BLANK]]
        found = margin(model, tried, label)
        text = tried[int(found.argmin())]
        if found.min() <= 0:
            return text, True
    return text, False


def test_charmer_breaks_no_text_that_exact_search_proves():
    model = Trigrams()
    labels = model(TEXTS).argmax(1).tolist()
    alphabet = "aeimorstz "
    threat = CharEdits(1, "anywhere", alphabet, protect=frozenset())
    verdicts = search_texts(TextScore(model), TEXTS, labels, threat, 5000, range(50), "exact")
    broken = [charmer(model, text, label, alphabet, 1)[1] for text, label in zip(TEXTS, labels, strict=True)]
    assert {verdict.status for verdict in verdicts} == {"proven", "broken"}
    assert not any(b and v.status == "proven" for b, v in zip(broken, verdicts, strict=True))
    assert 5 < sum(broken) <= sum(v.status == "broken" for v in verdicts) < 45


def test_default_search_breaks_at_least_what_charmer_breaks_with_as_many_queries():
    model = Trigrams()
    labels = model(TEXTS).argmax(1).tolist()
    alphabet = "aeimorstz "
    model.queries = 0
    broken = [charmer(model, text, label, alphabet, 2)[1] for text, label in zip(TEXTS, labels, strict=True)]
    budget = model.queries // len(TEXTS)
    threat = CharEdits(2, "anywhere", alphabet, protect=frozenset())
    verdicts = search_texts(TextScore(model), TEXTS, labels, threat, budget, range(50))
    assert max(verdict.queries for verdict in verdicts) <= budget
    assert sum(v.status == "broken" for v in verdicts) >= sum(broken) > 10
