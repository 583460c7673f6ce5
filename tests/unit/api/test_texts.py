"""Text models in Python: a loaded model takes texts and ids, and attacks reach its embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import advtrain
from advtrain.api import load
from advtrain.api.texts import TextClassifier
from advtrain.data import load_data
from advtrain.data.texts import encode_texts
from advtrain.data.unseen import Accepts
from advtrain.errors import UserError
from advtrain.models.serialized import ModelSource
from advtrain.recipe.data import TextShape
from advtrain.registry.export import IdsChecked
from advtrain.registry.versions import RegisteredModel
from advtrain.runs.leaks import Lineage
from advtrain.training.trained_model import architecture
from tests.kit import Busy, train_here
from tests.text_kit import KINDS, question, text_recipe

TEXTS = [question(n) for n in range(400, 416)]
LABELS = torch.arange(16) % 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the run folder of a model that tells the two kinds of questions apart."""
    folder = tmp_path_factory.mktemp("texts")
    recipe = text_recipe(folder, "training.epochs=2")
    (folder / "runs").mkdir()
    _, run = train_here(recipe, folder / "runs", load_data(recipe.data, Path()))
    return run


@pytest.fixture
def model(trained):
    """Return the model of the run folder."""
    return advtrain.load_model(trained.path)


def registered(model, monkeypatch):
    """Return what load_model makes of a registered version of the model."""
    ids = torch.ones(2, model.text.max_length, dtype=torch.int64)
    dynamic = {axis: torch.export.Dim.AUTO for axis in (0, 1)}
    program = torch.export.export(
        IdsChecked(model.model, model.text.vocabulary), (ids,), dynamic_shapes=[dynamic]
    )

    class Archive(ModelSource):
        def load(self):
            return program.module()

    accepts = Accepts(
        TextShape(model.text.max_length, model.text.vocabulary), 2, list(KINDS), text=model.text
    )
    found = RegisteredModel(Archive(b""), None, "", accepts, Lineage())
    monkeypatch.setattr("advtrain.registry.load_registered", lambda *args: found)
    return advtrain.load_model("models:/questions/1", tracking_uri="sqlite:///none.db")


def test_run_and_registered_version_map_texts_and_their_ids_to_the_same_logits(model, monkeypatch):
    logits = model(TEXTS)
    assert logits.shape == (16, 2)
    assert (logits.argmax(1) == LABELS).float().mean() > 0.9
    assert model.class_names == list(KINDS)
    ids = model.encode(TEXTS)
    assert ids.dtype == torch.int64
    assert np.array_equal(ids, encode_texts(model.text, TEXTS, "")[0][:, : ids.shape[1]])
    assert ids.shape[1] == max((row != 0).sum() for row in ids)
    other = registered(model, monkeypatch)
    for again in (model(ids), model(np.array(TEXTS, object)), other(TEXTS), other(ids)):
        assert torch.allclose(again, logits, atol=1e-5)


def test_attack_on_texts_equals_the_attack_on_their_ids(model):
    ids = model.encode(TEXTS)
    z, same = (advtrain.attack(model, x, LABELS, "l2:0.5", num_steps=3) for x in (TEXTS, ids))
    assert torch.equal(z, same)
    assert torch.allclose((z - model.embed(TEXTS)).flatten(1).norm(dim=1), torch.tensor(0.5), atol=1e-3)
    z_adv = advtrain.Adversary("l2:0.5", num_steps=3)(model, TEXTS, LABELS)
    losses = [advtrain.Objective(clean_ce=1, adv_ce=1)(model, x, z_adv, LABELS) for x in (TEXTS, ids)]
    assert torch.equal(*losses)
    assert losses[0] > advtrain.Objective(clean_ce=1)(model, TEXTS, None, LABELS)


def test_evaluation_of_texts_equals_that_of_their_ids_and_describes_them(model):
    how = {"suite": "apgd-ce", "full": False}
    loader = [(TEXTS[:10], LABELS[:10]), (TEXTS[10:], LABELS[10:])]
    found = advtrain.evaluate(model, TEXTS, LABELS, "l2:0.5", **how)
    for again in (
        advtrain.evaluate(model, model.encode(TEXTS), LABELS, "l2:0.5", **how),
        advtrain.evaluate(model, loader, threat="l2:0.5", **how),
    ):
        assert (again.clean, again.robust) == (found.clean, found.robust)
    assert found.clean_accuracy == (model(TEXTS).argmax(1) == LABELS).float().mean()
    assert found.space == "embedding"
    assert found.text.vocabulary == model.text.vocabulary


def test_attacks_on_a_registered_text_model_name_the_remedy(model, monkeypatch):
    other = registered(model, monkeypatch)
    for x in (TEXTS, model.encode(TEXTS)):
        for run in (
            lambda x=x: advtrain.attack(other, x, LABELS, "l2:1"),
            lambda x=x: advtrain.evaluate(other, x, LABELS, "l2:1"),
            lambda x=x: advtrain.Adversary("l2:1")(other, x, LABELS),
        ):
            with pytest.raises(UserError, match="attacks need its embeddings; load the run"):
                run()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ("who is it ?", "x is a single text; pass a list of texts"),
        (["who", None], r"x\[1\] is None, no text"),
        (["who", " "], "x: text 1 has no words"),
        ([], "x holds no texts"),
        (torch.ones(2, 3), r"token ids must be int64 \(N, L\) with L from 1 to"),
        (torch.ones(2, 99, dtype=torch.int64), "with L from 1 to 5, not torch.int64"),
        (torch.full((2, 3), 10**6), r"token ids must lie in \[0, \d+\)"),
        (torch.zeros(2, 3, dtype=torch.int64), "with one above 0 in every text"),
    ],
)
def test_text_model_refuses_inputs_that_it_cannot_take(model, x, message):
    with pytest.raises(UserError, match=message):
        model(x)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m: advtrain.attack(Busy().eval(), TEXTS, LABELS, "l2:1"), "only a text model"),
        (lambda m: advtrain.evaluate(Busy().eval(), TEXTS, LABELS, "l2:1"), "only a text model"),
        (lambda m: advtrain.attack(m, {"a": 1}, LABELS, "l2:1"), "x must be a tensor, or a list of texts, not dict"),
        (lambda m: advtrain.evaluate(m, TEXTS, threat="l2:1"), "evaluate needs labels"),
        (lambda m: advtrain.evaluate(m, TEXTS, LABELS[:3], "l2:1"), r"y must have shape \(16,\)"),
        (lambda m: advtrain.evaluate(m, TEXTS, LABELS, "l2:1"), "fab-t searches balls around whole inputs"),
        (
            lambda m: advtrain.load_model("w.pt", model="text_cnn", shape=(5,), num_classes=2),
            "a state dict of text_cnn has no tokenizer; load the run folder",
        ),
    ],
)  # fmt: skip
def test_api_refuses_texts_where_they_do_not_apply(model, run, message):
    with pytest.raises(UserError, match=message):
        run(model)


def test_only_models_of_texts_are_wrapped():
    assert load._with_tokenizer(module := Busy(), None, None) is module


def test_weights_of_a_text_model_are_those_of_the_run(trained, model):
    assert isinstance(model, TextClassifier)
    assert not model.training
    recipe = advtrain.load_recipe(trained.path / "recipe.yaml")
    names = architecture(recipe, load_data(recipe.data, Path())).build().state_dict().keys()
    assert model.model.state_dict().keys() == names
