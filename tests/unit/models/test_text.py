"""Networks of texts: padding, attacks on embeddings, export, and the path from training to a prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlflow.exceptions import MlflowException
from tokenizers import Tokenizer
from torch import nn

import advtrain
from advtrain.attacks import AttackConfig, GradientAttack
from advtrain.data import DataConfig, Place, load_data
from advtrain.data.texts import RawText, fit_tokenizer
from advtrain.errors import UserError
from advtrain.evaluation import EvalSpec, evaluate
from advtrain.evaluation.checks import training_radius
from advtrain.models import TEXT_MODELS, build_model
from advtrain.models.network import attack_view
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.objective import ObjectiveConfig, ObjectiveModule
from advtrain.promotion import PromotionRequest, load_policy
from advtrain.recipe import Recipe
from advtrain.recipe.data import TextShape
from advtrain.recipe.model import ModelConfig
from advtrain.registry.advtrain_pyfunc_v1 import InvalidRequestError, ServedModel
from advtrain.registry.export import IdsChecked, check_export
from advtrain.threat import ThreatModel
from advtrain.training.trained_model import check_model
from pipelines.predict import predict
from pipelines.promote import promote
from pipelines.train import train
from pipelines.workspace import Workspace, training_threat
from tests.kit import ROOT, digits_data, digits_recipe, train_here

POLICY = ROOT / "pipelines" / "policies" / "default.yaml"

SHAPE = TextShape(12, 40)
SMALL = {
    "text_cnn": {"dim": 8, "channels": 6},
    "char_cnn": {"dim": 8, "channels": 6, "depth": 2},
    "transformer": {"dim": 8, "heads": 2, "depth": 1},
}
L2 = ThreatModel("l2", 0.7)


def small(name: str, dropout: float = 0.0) -> nn.Module:
    return build_model(ModelConfig(name=name, args=SMALL[name] | {"dropout": dropout}), SHAPE, 3).eval()


def ids() -> torch.Tensor:
    x = torch.randint(1, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    x[1, 5:] = x[2, 1:] = 0
    return x


def padded(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 5))


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_padding_changes_neither_logits_nor_perturbation(name):
    model, x, y = small(name), ids(), torch.tensor([0, 1, 2, 0])
    assert torch.allclose(model(padded(x)), model(x), atol=1e-6)
    short, long = (advtrain.attack(model, each, y, L2, num_steps=3, start="none") for each in (x, padded(x)))
    assert torch.allclose(long[:, :7], short, atol=1e-5)
    assert (long[:, 7:] == 0).all()
    assert (short[2, 1:] == 0).all()
    z = model.embed(x)
    assert torch.allclose((short - z).flatten(1).norm(dim=1), torch.full((4,), 0.7), atol=1e-4)


def test_fgm_is_the_normalized_gradient_of_the_sequence():
    model, x, y = small("text_cnn"), ids(), torch.tensor([0, 1, 2, 0])
    z = model.embed(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(z, embedded=True), y, reduction="sum"), z)
    gradient = gradient * (x != 0).unsqueeze(-1)
    wanted = z + 0.7 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    found = advtrain.attack(model, x, y, L2, name="fgsm")
    assert torch.allclose(found, wanted, atol=1e-6)


def test_norm_per_token_equals_that_of_the_sequence_for_a_single_token():
    model, y = small("text_cnn"), torch.tensor([0, 1, 2, 0])
    per_token = replace(L2, group="token")
    for x, same in ((ids()[:, :1], True), (ids(), False)):
        one, other = (advtrain.attack(model, x, y, threat, name="fgsm") for threat in (L2, per_token))
        assert torch.allclose(one, other, atol=1e-6) is same
    moved = (other - model.embed(x)).norm(dim=2)
    assert torch.allclose(moved[x != 0], torch.tensor(0.7), atol=1e-5)
    assert (moved[x == 0] == 0).all()


def test_norm_per_token_is_a_setting_of_the_training_attack(recipe):
    per_token = {"adversary": recipe.values()["adversary"] | {"per": "token"}}
    other = Recipe.model_validate(recipe.values() | per_token)
    assert (recipe.adversary.threat.group, other.adversary.threat.group) == ("sample", "token")
    assert recipe.digest() != other.digest()
    assert str(training_threat(other)) == "l2:0.2 per token"
    assert training_radius(training_threat(other), recipe.evaluation.threat_model).verdict == "warning"
    check_model(other, load_data(recipe.data, Path()))
    images = digits_recipe("adversary.per=token")
    with pytest.raises(UserError, match="per token is for networks that embed their inputs; model 'cnn2'"):
        check_model(images, digits_data(images))


def test_radius_zero_is_plain_cross_entropy_bit_for_bit():
    x, y = ids(), torch.tensor([0, 1, 2, 0])
    model = small("text_cnn", dropout=0.5).train()
    view, z, threat = attack_view(model, x, ThreatModel("l2", 0.0))
    attack = GradientAttack(AttackConfig.model_validate({"num_steps": 2}))
    z_adv = attack(view, z, y, threat, torch.Generator())
    losses = [
        ObjectiveModule(ObjectiveConfig(**weights), model)(x, z_adv, y, dropout_seed=3)[0]
        for weights in ({"clean_ce": 1}, {"adv_ce": 1})
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_network_is_exported_for_any_number_and_length_of_texts(name):
    check_export(small(name), SHAPE)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_network_of_the_shortest_texts_is_exported(name):
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        DataConfig(source="text", path="a.txt", max_length=2)
    one = RawText("here", np.array(["word"], object), np.zeros(1, np.int64))
    spec = fit_tokenizer(one, "words", None, None)
    shape = TextShape(spec.max_length, spec.vocabulary)
    check_export(build_model(ModelConfig(name=name, args=SMALL[name]), shape, 2).eval(), shape)


@pytest.mark.parametrize("x", [[[40, 1]], [[-1, 1]], [[1, 2], [0, 0]]])
def test_ids_outside_the_vocabulary_are_refused(x):
    with pytest.raises(RuntimeError, match=r"token ids must lie in \[0, 40\)"):
        IdsChecked(small("text_cnn"), 40)(torch.tensor(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 13), np.int64), "at most 12 token ids, not 13"),
        (np.ones((0, 5), np.int64), "inputs have no rows"),
        (np.zeros((1, 0), np.int64), "row 0 has no tokens"),
        (np.full((1, 2), 40), r"must lie in \[0, 40\)"),
    ],
)
def test_served_model_refuses_ids_that_its_network_cannot_take(x, message):
    served = ServedModel(None, {"text": {"vocabulary": 40, "max_length": 12}})
    with pytest.raises(InvalidRequestError, match=message):
        served.predict(x)


@pytest.mark.parametrize(
    ("name", "args", "shape", "message"),
    [
        ("text_cnn", {}, (1, 8, 8), "takes texts, but the samples are not; use mlp"),
        ("cnn2", {}, SHAPE, "takes images or tables, but the samples are texts; use text_cnn, char_cnn"),
        ("text_cnn", {"widths": []}, SHAPE, "widths must be numbers of words above 0"),
        ("char_cnn", {"width": 4}, SHAPE, "width must be odd, not 4"),
        ("text_cnn", {"heads": 4}, SHAPE, "takes no 'heads'"),
        ("tests.kit:Linear", {}, SHAPE, "attacks cannot change token ids"),
    ],
)
def test_network_that_does_not_suit_the_samples_is_refused(name, args, shape, message):
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(name=name, args=args), shape, 2)


def question(kind: int, number: int) -> str:
    return [f"who made thing {number} ?", f"where is place {number} ?"][kind]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Return a recipe of 160 questions of two kinds."""
    rows = [{"text": question(n % 2, n), "label": ["human", "location"][n % 2]} for n in range(160)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe.model_validate(
        {
            "name": "questions",
            "data": {"source": "text", "path": str(tmp_path / "q.jsonl"), "vocabulary": 30},
            "model": {"name": "text_cnn", "args": SMALL["text_cnn"]},
            "adversary": {"name": "pgd", "norm": "l2", "eps": 0.2, "num_steps": 2},
            "objective": {"clean_ce": 1, "adv_ce": 1},
            "optimizer": {"name": "adamw", "lr": 0.01},
            "training": {"epochs": 3, "batch_size": 16},
            "evaluation": {
                "threat": {"norm": "l2", "eps": 0.2},
                "attack": {"name": "pgd", "num_steps": 2},
                "validation": {"name": "pgd", "num_steps": 2},
            },
        }
    )


def test_training_learns_and_leaves_the_embedding_of_padding_at_zero(recipe, tmp_path):
    data = load_data(recipe.data, Path())
    model, _ = train_here(recipe, tmp_path, data)
    assert (model.network.table.weight[0] == 0).all()
    (batch,) = data.test.batches(100, Place())
    assert (model(batch.x).argmax(1) == batch.y).float().mean() > 0.9


def test_archive_of_a_text_model_is_not_attacked(recipe):
    data = load_data(recipe.data, Path())
    with pytest.raises(UserError, match="attacks need its embeddings; evaluate the run"):
        evaluate(EvalSpec(ModelSource(b""), data.test, data, recipe.evaluation.attack, L2, name="m"))


@pytest.mark.parametrize(("name", "space"), [("tests.kit:Tokens", "embedding"), ("cnn2", "input")])
def test_report_says_whether_the_model_of_images_was_attacked_in_embeddings(name, space):
    data = digits_data(digits_recipe())
    made = Architecture(ModelConfig(name=name), data.shape, data.num_classes)
    model = made.build().eval()
    for each in (model, ModelSource.of(model.state_dict(), made)):
        assert EvalSpec(each, data.test, data, "quick", L2, name="m").facts()["space"] == space


@pytest.mark.parametrize(("suite", "attack"), [("quick", None), ("autoattack", "fab-t")])
def test_suite_that_needs_bounds_is_refused_for_texts(recipe, suite, attack):
    values = recipe.values()
    values["evaluation"] = {"threat": {"norm": "l2", "eps": 1}, "suite": suite}
    other, data = Recipe.model_validate(values), load_data(recipe.data, Path())
    if attack is None:
        assert check_model(other, data) == []
    else:
        with pytest.raises(UserError, match=f"{attack} searches balls around whole inputs"):
            check_model(other, data)


@pytest.mark.slow
def test_text_model_is_trained_registered_and_predicts_texts(recipe, store, tmp_path):
    workspace = Workspace(tmp_path / "runs", store, tmp_path)
    result = train(recipe, workspace)
    run, uri = result.run, result.registered.uri
    assert result.report.space == "embedding"
    assert result.registered.champion is False
    assert "is a regularizer and no threat" in (run.report / "model_card.md").read_text()
    assert "is a regularizer and no threat" in (run.report / "report.html").read_text()
    found = predict(uri, None, workspace, texts=["who is it ?", "where is it ?"])
    assert [record["name"] for record in found.records] == ["human", "location"]
    (tmp_path / "in.txt").write_text("where is it ?\n\nwho is it ?\r\n")
    again = predict(uri, tmp_path / "in.txt", workspace)
    assert [record["input"] for record in again.records] == ["where is it ?", "who is it ?"]
    assert again.records[1]["probabilities"] == pytest.approx(found.records[0]["probabilities"], abs=1e-5)
    folder = Path(mlflow.artifacts.download_artifacts(uri, tracking_uri=store))
    assert (folder / "tokenizer.json").read_text() == (run.path / "tokenizer.json").read_text()
    served = mlflow.pyfunc.load_model(str(folder))
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(["who is it ?", "where ?"])
    x = np.array([each.ids for each in tokens], np.int64)
    assert served.predict(x, params={"output": "classes"}).tolist() == ["human", "location"]
    with pytest.raises(MlflowException, match=r"token ids must lie in \[0, 32\)"):
        served.predict(x + 32)
    client = mlflow.MlflowClient(tracking_uri=store)
    before = client.get_registered_model("questions").aliases
    decision = promote("questions", workspace, PromotionRequest("1", load_policy(POLICY)))
    findings = {finding.rule: finding for finding in decision.findings}
    assert decision.status == "refused"
    assert "task" in decision.failed
    assert client.get_registered_model("questions").aliases == before
    assert "champion" not in before
    assert findings["task"].figures.startswith("evaluated in embeddings")
