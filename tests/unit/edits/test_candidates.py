"""Candidates are counted by formulas and listed completely."""

from __future__ import annotations

import itertools
import random
from math import prod

import pytest

from advtrain.edits import STOP_WORDS, Candidates, CharEdits, Table, WordEdits, apply_edits
from advtrain.edits.tables import normalize
from advtrain.errors import UserError

TABLE = Table.build("tiny", {"good": ["fine", "nice", "decent"], "film": ["movie"], "bad": ["poor", "mean"]})
TEXT = "a good film , not bad"


def overlapping(one, other):
    return one.low <= other.high and other.low <= one.high


def by_hand(text, edits, k):
    """List the sets of k edits whose places do not overlap, from all subsets."""
    return [
        each
        for each in itertools.combinations(edits, k)
        if not any(overlapping(*pair) for pair in itertools.combinations(each, 2))
    ]


def test_count_of_words_is_the_product_of_the_choices_of_each_word():
    candidates = Candidates(TEXT, WordEdits(TABLE, 3).edits(TEXT))
    assert [candidates.count(k) for k in range(5)] == [1, 6, 3 * 1 + 3 * 2 + 1 * 2, 3 * 1 * 2, 0]
    assert sum(candidates.count(k) for k in range(4)) == prod([4, 2, 3])


@pytest.mark.parametrize(
    "threat",
    [
        WordEdits(TABLE, 3),
        CharEdits(3, "inner", "letters"),
        CharEdits(3, "anywhere", "xy", protect=frozenset()),
        CharEdits(3, "anywhere", "x", ("swap", "insert")),
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [TEXT, "bad", "good goods", ""])
def test_all_lists_every_set_of_edits_once(threat, text):
    text = text[:12] if isinstance(threat, CharEdits) else text
    edits = threat.edits(text)[:40]
    candidates = Candidates(text, edits)
    for k in range(4):
        expected = [apply_edits(text, each) for each in by_hand(text, candidates.edits, k)]
        found = list(candidates.all(k))
        assert [each for _, each in found] == expected
        assert candidates.count(k) == len(expected)
        assert [candidates.apply(chosen) for chosen, _ in found] == expected
        numbers = [candidates.nth(k, index) for index in range(min(500, len(found)))]
        assert numbers == [chosen for chosen, _ in found[:500]]


def test_counts_end_at_the_number_of_places():
    candidates = Candidates("ab", CharEdits(1, "anywhere", "xyz", ("substitute",), frozenset()).edits("ab"))
    assert [candidates.count(k) for k in (1, 2, 3, 10**9)] == [6, 9, 0, 0]
    drawn = {candidates.draw(20, random.Random(seed)) for seed in range(300)}
    assert len(drawn) == 15


def test_draw_is_uniform_over_all_candidates():
    candidates = Candidates(TEXT, WordEdits(TABLE, 3).edits(TEXT))
    generator = random.Random(0)
    drawn = [candidates.draw(3, generator) for _ in range(23_000)]
    shares = [drawn.count(chosen) for k in (1, 2, 3) for chosen, _ in candidates.all(k)]
    assert len(shares) == 23
    assert min(shares) > 850  # 1,000 each, standard deviation 31
    assert max(shares) < 1150


def test_count_of_characters_anywhere_is_that_of_charmer():
    """2 n + 1 places with as many edits as characters: a replacement or a deletion, or an insertion."""
    text, alphabet = "abcabc", "abcdefg"
    edits = CharEdits(1, "anywhere", alphabet, ("substitute", "delete", "insert"), frozenset()).edits(text)
    assert len(edits) == (2 * len(text) + 1) * len(alphabet)


@pytest.mark.parametrize("n", [4, 7])
def test_count_of_inner_letters_follows_the_length_of_the_word(n):
    word = "abcdefgh"[:n]
    edits = CharEdits(1).edits(word)
    assert len(edits) == 25 * (n - 2) + (n - 2) + (n - 3) + 26 * (n - 1)
    assert all(e.start >= 1 and e.end <= n - 1 for e in edits)


def test_a_word_has_at_most_one_inner_edit():
    candidates = Candidates("goods", CharEdits(2).edits("goods"))
    assert candidates.count(2) == 0


def test_a_place_takes_one_edit_and_a_swap_takes_its_gap():
    candidates = Candidates("ab", CharEdits(3, "anywhere", "x", protect=frozenset()).edits("ab"))
    texts = {k: {text for _, text in candidates.all(k)} for k in (1, 2)}
    assert texts[1] == {"xab", "xb", "b", "ba", "axb", "ax", "a", "abx"}
    assert "xxab" not in texts[2]  # two insertions in one gap
    assert "bxa" not in texts[2]  # an insertion inside a swap
    assert "xba" in texts[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good film", {"Fine film", "Nice film", "Decent film", "Good movie"}),
        ("GOOD", {"FINE", "NICE", "DECENT"}),
        ("it's good-film", set()),
        ("film, (bad)", {"movie, (bad)", "film, (poor)", "film, (mean)"}),
        ("  film\n", {"  movie\n"}),
    ],
)
def test_words_are_replaced_in_place_with_their_case(text, expected):
    candidates = Candidates(text, WordEdits(TABLE, 1).edits(text))
    assert {each for _, each in candidates.all(1)} == expected


def test_protected_words_stay():
    assert WordEdits(TABLE, 1, frozenset({"good"})).edits("Good") == []
    assert CharEdits(1).edits("about") == []  # a stop word
    inside = CharEdits(1, "anywhere", "x", protect=frozenset({"about"})).edits("about a")
    assert {(e.start, e.end) for e in inside} == {(0, 0), (5, 5), (5, 6), (5, 7), (6, 6), (6, 7), (7, 7)}


@pytest.mark.parametrize("word", ["Rock'n", "rock\u2019n", "ROCK\u2019N"])
def test_case_and_apostrophe_of_words_do_not_matter(word):
    table = Table.build("t", {"Rock\u2019n": ["roll"]})
    (edit,) = WordEdits(table, 1, frozenset()).edits(word)
    assert edit.new.lower() == "roll"
    for protected in ("rock'n", "Rock\u2019n"):
        assert WordEdits(table, 1, frozenset({protected})).edits(word) == []
        inside = CharEdits(1, "anywhere", "x", ("delete",), frozenset({protected})).edits(word)
        assert inside == []
    assert frozenset(map(normalize, STOP_WORDS)) == STOP_WORDS


def test_equal_edits_are_listed_once():
    table = Table.build("t", {"good": ["Fine", "fine", "nice"]})
    assert [edit.new for edit in WordEdits(table, 1).edits("Good")] == ["Fine", "Nice"]
    assert len(WordEdits(table, 1).edits("good")) == 3
    threat = CharEdits(1, "anywhere", "aab", protect=frozenset())
    assert threat == CharEdits(1, "anywhere", "ab", protect=frozenset())
    assert len(threat.edits("xyz")) == 3 * 2 + 3 + 2 + 4 * 2


def test_letters_keep_the_case_of_their_place():
    edits = CharEdits(1, operations=("substitute", "insert")).edits("MOVie")
    at = {(e.start, e.end): e.new for e in edits}
    assert at[1, 2].isupper()
    assert at[3, 4].islower()
    assert at[1, 1].isupper()


@pytest.mark.parametrize("at_most", [-1, 1.0, True, "2"])
def test_radius_must_be_an_integer(at_most):
    with pytest.raises(UserError, match="at_most must be an integer of at least 0"):
        WordEdits(TABLE, at_most)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"where": "outer"}, "inner or anywhere, not 'outer'"),
        ({"operations": ()}, "need an operation"),
        ({"operations": ("substitute", "flip")}, "unknown operation 'flip'"),
        ({"alphabet": ""}, "the alphabet is empty"),
    ],
)
def test_wrong_edits_of_characters_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        CharEdits(1, **settings)
