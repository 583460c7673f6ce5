"""Scores of token ids: batches, padding, texts that the tokenizer does not tell apart, and shares of such edits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from advtrain.data.texts import RawText, encode_texts, fit_tokenizer
from advtrain.edits import (
    Candidates,
    CharEdits,
    EditShares,
    Encoder,
    Table,
    TokenScore,
    WordEdits,
    edit_shares,
    search,
)
from advtrain.edits import score as score_module
from advtrain.errors import UserError
from advtrain.models.text import text_cnn
from advtrain.recipe.data import TextShape

TEXTS = ["a good film", "a bad film , too long", "who knows ?", "the film is long and good , not bad at all"]
TABLE = Table.build("tiny", {"good": ["fine", "Good", "gôod"], "film": ["movie", "long"], "long": ["bad"]})


def fitted(unit="words", length=None):
    texts = np.array(TEXTS, object)
    return fit_tokenizer(RawText("t", texts, np.zeros(len(TEXTS), np.int64)), unit, None, length)


def network(spec):
    return text_cnn(TextShape(spec.max_length, spec.vocabulary), 3, dim=8, channels=4).eval()


@pytest.mark.parametrize("unit", ["words", "bytes"])
@pytest.mark.parametrize("batch", [(1, 10_000), (3, 20), (4096, 16_384)])
def test_logits_are_those_of_the_encoded_texts(unit, batch, monkeypatch):
    spec = fitted(unit)
    net = network(spec)
    monkeypatch.setattr(score_module, "BATCH_TEXTS", batch[0])
    monkeypatch.setattr(score_module, "CPU_TOKENS", batch[1])
    shapes = []

    def model(ids):
        shapes.append(tuple(ids.shape))
        return net(ids)

    score = TokenScore(model, spec)
    found = score.logits(score.keys(TEXTS))
    ids, _, _ = encode_texts(spec, TEXTS, "t")
    with torch.no_grad():
        torch.testing.assert_close(found, net(torch.from_numpy(ids)))
    assert sum(n for n, _ in shapes) == len(TEXTS)
    assert all(n <= batch[0] and (n == 1 or n * length <= batch[1]) for n, length in shapes)


def test_texts_of_the_same_ids_are_one_query():
    spec = fitted()
    score = TokenScore(network(spec), spec)
    text = "a good film"
    label = int(score.logits(score.keys([text])).argmax())
    threat = WordEdits(Table.build("t", {"good": ["qqq", "rrr", "bad"]}), 1)  # two unknown words
    verdict = search(score, text, label, threat, 100, 0, "exact")
    assert verdict.queries <= 3
    sent = []
    score = TokenScore(lambda ids: sent.append(ids) or torch.eye(3)[[label] * len(ids)], spec)
    verdict = search(score, text, label, threat, 100, 0, "exact")
    assert (verdict.queries, verdict.status) == (3, "proven")
    assert sum(len(ids) for ids in sent) == 3


def test_texts_without_tokens_are_not_sent():
    spec = fitted()
    score = TokenScore(lambda ids: torch.eye(3)[[0] * len(ids)], spec)
    assert score.keys(["  ", "film"])[0] is None
    threat = CharEdits(1, "anywhere", "x", ("delete",), frozenset())
    verdict = search(score, "?", 0, threat, 10, 0)
    assert (verdict.queries, verdict.status) == (1, "proven")
    assert edit_shares(score.encoder, threat, "?").empty == 1
    with pytest.raises(UserError, match="text without tokens has no logits"):
        score.logits(score.keys(["film", "  "]))


def test_original_text_without_tokens_is_refused():
    spec = fitted()
    score = TokenScore(lambda ids: torch.eye(3)[[0] * len(ids)], spec)
    with pytest.raises(UserError, match="the text '  ' has no token"):
        search(score, "  ", 0, WordEdits(TABLE, 1), 10, 0)


def test_number_of_logits_is_checked_in_each_batch(monkeypatch):
    monkeypatch.setattr(score_module, "BATCH_TEXTS", 2)
    spec, rows = fitted(), iter([1, 3])  # as many rows as texts in total
    score = TokenScore(lambda ids: torch.zeros(next(rows), 3), spec)
    with pytest.raises(UserError, match=r"logits of shape \(1, 3\) for 2 texts"):
        score.logits(score.keys(TEXTS))


def test_shares_name_edits_that_do_not_reach_the_model():
    spec = fitted(length=5)
    encoder = Encoder(spec)
    text = "a good film , long film good"  # cut after "long"
    shares = edit_shares(encoder, WordEdits(Table.build("t", {"good": ["zzz"], "film": ["long"]}), 1), text)
    assert shares == EditShares(edits=4, cut=2, unknown=1, distinct=2, cut_texts=1)
    blanks = CharEdits(1, "anywhere", " ", ("insert",), frozenset())
    shares = edit_shares(encoder, blanks, "a film")
    assert (shares.edits, shares.same_ids) == (7, 4)  # at the ends and around the blank
    assert (shares.unknown, shares.distinct) == (3, 1)  # "f ilm", "fi lm" and "fil m" are two unknown words
    assert (shares + shares).edits == 14


def test_an_edit_at_the_end_of_a_cut_text_may_change_the_last_word():
    encoder = Encoder(fitted(length=3))
    text = "a good film good"
    assert encoder.end(text) == len("a good film")
    insert = CharEdits(1, "anywhere", "x", ("insert",), frozenset())
    shares = edit_shares(encoder, insert, text)
    by_hand = [
        edit
        for edit in Candidates(text, insert.edits(text)).edits
        if encoder.ids([text[: edit.start] + "x" + text[edit.start :]]) == encoder.ids([text])
    ]
    assert shares.cut == len(by_hand) == 5
    assert shares.same_ids == 0


def test_an_edit_that_moves_the_cut_puts_in_no_unknown_word():
    encoder, delete = Encoder(fitted(length=3)), CharEdits(1, "anywhere", "x", ("delete",), frozenset())
    # Without its first word, the model sees the unknown word behind the cut.
    text = "a good film qqq"
    shares = edit_shares(encoder, delete, text)
    # Ten deletions make an unknown word: the first two blanks, and the letters of good and film.
    assert shares == EditShares(edits=15, cut=3, unknown=10, distinct=5, cut_texts=1)


def test_texts_are_tokenized_in_slices(monkeypatch):
    encoder, threat = Encoder(fitted(length=3)), CharEdits(1, protect=frozenset())
    expected = encoder.ids(TEXTS), edit_shares(encoder, threat, TEXTS[1])
    monkeypatch.setattr(score_module, "ENCODED_TEXTS", 3)
    sizes, tokenizer = [], encoder._tokenizer

    class Recorder:
        encode, token_to_id = tokenizer.encode, tokenizer.token_to_id

        @staticmethod
        def encode_batch_fast(texts):
            sizes.append(len(texts))
            return tokenizer.encode_batch_fast(texts)

    encoder._tokenizer = Recorder
    assert (encoder.ids(TEXTS), edit_shares(encoder, threat, TEXTS[1])) == expected
    assert sizes[:2] == [3, 1]
    assert max(sizes) == 3


def test_bytes_have_no_unknown_words_and_show_the_case():
    encoder = Encoder(fitted("bytes"))
    shares = edit_shares(encoder, CharEdits(1), "good films")
    assert (shares.same_ids, shares.unknown, shares.empty) == (0, 0, 0)
    assert encoder.unknown is None
    # A repeated letter gives the same text on either side of it.
    texts = {text for _, text in Candidates("good films", CharEdits(1).edits("good films")).all(1)}
    assert shares.distinct == len(texts) < shares.edits
