"""The option --threat: balls, edits and their settings."""

from __future__ import annotations

import pytest

from advtrain.errors import UserError
from advtrain.recipe.edits import EditThreatConfig, ThreatConfig
from advtrain.recipe.sections import EvaluationConfig
from advtrain.recipe.threats import parse_threat
from pipelines.threats import judged_at


def test_ball_and_edits_are_parsed():
    assert parse_threat("linf:8/255") == ThreatConfig(norm="linf", eps=8 / 255)
    words = parse_threat("words:2")
    assert isinstance(words, EditThreatConfig)
    assert (words.at_most, words.table, words.budget) == (2, "counterfitted", 20_000)
    chars = parse_threat("chars:1,where=anywhere,alphabet=data,budget=500")
    assert isinstance(chars, EditThreatConfig)
    assert (chars.where, chars.alphabet, chars.budget) == ("anywhere", "data", 500)


def test_commas_within_lists_and_quotes_are_part_of_a_value():
    chars = parse_threat("""chars:1,operations=[substitute, swap],alphabet="a,b'",budget=7""")
    assert isinstance(chars, EditThreatConfig)
    assert (chars.operations, chars.alphabet, chars.budget) == (["substitute", "swap"], "a,b'", 7)
    plain = parse_threat("chars:1,alphabet=b',budget=7")
    assert isinstance(plain, EditThreatConfig)
    assert (plain.alphabet, plain.budget) == ("b'", 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words:1.5", "--threat: 'at_most': Input should be a valid integer"),
        ("words:", "--threat: 'at_most'"),
        ("words:1,tables=x", "--threat: unknown key 'tables'; did you mean 'table'"),
        ("words:1,where=inner", "--threat: where belongs to edits: chars"),
        ("words:1,at_most=3", "--threat: 'at_most' is set by 'words:1'; leave out 'at_most=3'"),
        ("words:1,edits=chars", "--threat: 'edits' is set by 'words:1'; leave out 'edits=chars'"),
        ("words:1,budget=3,budget=4", "--threat: 'budget' is given twice; leave out 'budget=4'"),
        ("chars:1,operations=[swap,jump]", "--threat: 'operations"),
        ("words:1,", "not ''"),
        ("letters:1", "'letters:1' is not a threat model"),
    ],
)
def test_wrong_threat_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_threat(text)


def test_attacks_of_another_kind_of_threat_are_dropped():
    ball = EvaluationConfig.model_validate(
        {"threat": {"norm": "l2", "eps": 1}, "attack": {"num_steps": 5}, "seed": 3}
    )
    edited = judged_at(ball, parse_threat("words:1"))
    assert (edited.attack, edited.suite, edited.seed) == (None, None, 3)
    assert judged_at(edited, parse_threat("l2:2")).suite == "autoattack"
    assert judged_at(ball, parse_threat("l2:2")).attack == ball.attack
