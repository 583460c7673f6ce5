"""Edits of texts as evaluation threat model of a recipe: defaults, errors, round trips and digests."""

from __future__ import annotations

import pytest

from advtrain.errors import UserError
from advtrain.recipe import load_recipe, load_stored_recipe
from tests.kit import RECIPES, digits_recipe


def trec(threat: str, *overrides: str):
    """Return the TREC recipe with another evaluation threat model, as YAML."""
    settings = [f"evaluation.threat={threat}", "evaluation.attack=null", *overrides]
    return load_recipe(RECIPES / "trec.yaml", settings)


def test_edits_of_words_fill_their_defaults():
    judge = trec("{edits: words, at_most: 2}").evaluation
    assert judge.edits is not None
    assert (judge.edits.table, judge.edits.protect, judge.edits.where) == (
        "counterfitted",
        "stop_words",
        None,
    )
    assert (judge.threat.norm, judge.threat.eps, str(judge.threat_model)) == ("words", 2.0, "words:2")
    assert judge.suite is None
    assert judge.attack is None


def test_edits_of_characters_fill_their_defaults():
    judge = trec("{edits: chars, at_most: 1}").evaluation
    assert judge.edits is not None
    assert (judge.edits.table, judge.edits.where, judge.edits.alphabet) == (None, "inner", "letters")
    assert judge.edits.operations == ["substitute", "swap", "delete", "insert"]


@pytest.mark.parametrize(
    ("threat", "message"),
    [
        ("{edits: words}", "'evaluation.threat.at_most' is missing"),
        ("{edits: wrods, at_most: 1}", "'evaluation.threat.edits'.*'words' or 'chars'"),
        ("{edits: words, at_most: 1.5}", "'evaluation.threat.at_most'.*integer"),
        ("{edits: words, at_most: 0}", "'evaluation.threat.at_most'.*greater than or equal to 1"),
        ("{edits: words, at_most: 1, eps: 1}", "unknown key 'evaluation.threat.eps'"),
        ("{edits: words, at_most: 1, tables: x}", "unknown key 'evaluation.threat.tables'.*table"),
        ("{edits: words, at_most: 1, where: inner}", "where belongs to edits: chars"),
        ("{edits: chars, at_most: 1, table: counterfitted}", "table belongs to edits: words"),
        ("{norm: l2}", "'evaluation.threat.eps' is missing"),
        ("{norm: l2, at_most: 1}", "unknown key 'evaluation.threat.at_most'"),
    ],
)
def test_edits_reject_what_is_not_a_threat_model(threat, message):
    with pytest.raises(UserError, match=message):
        trec(threat)


def test_edits_are_for_texts():
    with pytest.raises(UserError, match="evaluation.threat.edits is for texts; data.source digits"):
        digits_recipe("evaluation={threat: {edits: words, at_most: 1}}")


@pytest.mark.parametrize("setting", ["suite=quick", "attack={num_steps: 3}", "validation.num_steps=3"])
def test_edits_take_no_attack_on_tensors(setting):
    with pytest.raises(UserError, match="does not apply to edits of texts; set threat.*budget"):
        load_recipe(
            RECIPES / "trec.yaml",
            ["evaluation={threat: {edits: words, at_most: 1}}", f"evaluation.{setting}"],
        )


def test_edits_round_trip_through_a_stored_recipe(tmp_path):
    recipe = trec("{edits: chars, at_most: 1, where: anywhere, budget: 500}")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_stored_recipe(file) == recipe
    assert load_stored_recipe(file).digest() == recipe.digest()
    assert trec("{edits: chars, at_most: 2, where: anywhere, budget: 500}").digest() != recipe.digest()
