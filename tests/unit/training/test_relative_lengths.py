"""Radii and step sizes relative to the embeddings of a network, such as `eps: 0.5x`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from advtrain.data import load_data
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.network import EmbeddingModel, embedding_table
from advtrain.models.start import StartWeights
from advtrain.recipe import Recipe, load_recipe
from advtrain.schema import Relative, parse_relative
from advtrain.seeding import mix_seed
from advtrain.training import Session, build_components
from advtrain.training.start import pinned_as, prepare_start, with_embedding_norm
from advtrain.training.step import Progress, perturb
from advtrain.training.trained_model import check_model
from pipelines.data import radii
from pipelines.workspace import about_report, differs, training_threat
from tests.kit import digits_data, digits_recipe, train_here
from tuning.space import Distribution, check_space, with_settings


@pytest.fixture
def values(tmp_path: Path) -> dict:
    """Return the values of a recipe of 80 texts of two kinds, with a relative radius."""
    rows = [{"text": ["good", "bad"][n % 2] + f" film {n}", "label": n % 2} for n in range(80)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attack = {"name": "pgd", "num_steps": 2}
    return {
        "name": "films",
        "data": {"source": "text", "path": str(tmp_path / "q.jsonl")},
        "model": {"name": "text_cnn", "args": {"dim": 8, "channels": 6}},
        "adversary": attack | {"norm": "l2", "eps": "0.5x", "start": "none"},
        "objective": {"adv_ce": 1},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "training": {"epochs": 2, "batch_size": 16},
        "evaluation": {"threat": {"norm": "l2", "eps": 0.2}, "attack": attack, "validation": attack},
    }


def started(values: dict, **adversary) -> Recipe:
    recipe = Recipe.model_validate(values | {"adversary": values["adversary"] | adversary})
    return prepare_start(recipe, load_data(recipe.data, Path()), _none).recipe


def _none(reference):
    raise AssertionError(reference)


def moved(recipe: Recipe) -> torch.Tensor:
    """Return the length of the perturbation of each text of a batch of the first step."""
    data = load_data(recipe.data, Path())
    parts = build_components(recipe, data, Session())
    batch = next(iter(data.train.train_batches(16, 0, 0, recipe.data.augment, parts.session.place)))
    z = perturb(parts, batch, Progress(0, 0.0)) - parts.network.embed(batch.x)
    return z.detach().flatten(1).norm(dim=1)


def test_run_measures_the_mean_norm_of_the_table_that_it_starts_from(values):
    recipe = started(values)
    torch.manual_seed(mix_seed("initialisation", 0))
    data = load_data(recipe.data, Path())
    rows = build_model(recipe.model, data.shape, data.num_classes).network.table.weight[1:].detach()
    mean = sum(math.sqrt(sum(float(v) ** 2 for v in row)) for row in rows) / len(rows)
    assert recipe.adversary.embedding_norm == pytest.approx(mean, rel=1e-5)
    assert recipe.adversary.threat.eps == 0.5 * recipe.adversary.embedding_norm
    assert str(recipe.adversary.eps) == "0.5x"


def test_norm_is_that_of_the_start_weights(values):
    recipe = Recipe.model_validate(values)
    data = load_data(recipe.data, Path())
    weights = build_model(recipe.model, data.shape, data.num_classes).state_dict()
    weights["network.table.weight"] = torch.full_like(weights["network.table.weight"], 0.5)
    found = with_embedding_norm(recipe, data, StartWeights(weights))
    assert found.adversary.embedding_norm == pytest.approx(0.5 * math.sqrt(8), rel=1e-5)


def test_table_of_zeros_is_refused(values):
    recipe = Recipe.model_validate(values)
    data = load_data(recipe.data, Path())
    weights = build_model(recipe.model, data.shape, data.num_classes).state_dict()
    weights["network.table.weight"] = torch.zeros_like(weights["network.table.weight"])
    with pytest.raises(UserError, match="every row of the embedding table is 0"):
        with_embedding_norm(recipe, data, StartWeights(weights))


def test_padding_is_no_row_of_the_table():
    network = EmbeddingModelOf(nn.Embedding(4, 2, padding_idx=1))
    assert torch.equal(embedding_table(network), network.table.weight[[0, 2, 3]])
    assert len(embedding_table(EmbeddingModelOf(nn.Embedding(4, 2)))) == 4
    assert embedding_table(EmbeddingModelOf(None)) is None


class EmbeddingModelOf(EmbeddingModel):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def embed(self, x):
        return x

    def classify(self, z):
        return z

    def threat_at(self, z, threat):
        return threat


@pytest.mark.parametrize("step_size", [None, "2x"])
def test_attack_moves_by_the_relative_radius(values, step_size):
    """A step of 2.5 eps / 2, or of 2x, ends on the sphere of radius 0.5x."""
    recipe = started(values, step_size=step_size)
    assert torch.allclose(moved(recipe), torch.tensor(0.5 * recipe.adversary.embedding_norm))


def test_relative_step_size_is_a_multiple_of_the_norm(values):
    recipe = started(values, name="fgsm", num_steps=1, step_size="0.125x")
    assert torch.allclose(moved(recipe), torch.tensor(0.125 * recipe.adversary.embedding_norm))


def test_relative_radius_equals_the_absolute_one(values):
    relative = started(values, eps_low="0.25x")
    norm = relative.adversary.embedding_norm
    absolute = started(values, eps=0.5 * norm, eps_low=0.25 * norm)
    assert absolute.adversary.embedding_norm is None
    assert torch.equal(moved(relative), moved(absolute))


def test_relative_start_of_freelb_equals_the_absolute_one(values):
    """At two points, the second one depends on the start and on the step size."""
    values["adversary"] = {"name": "freelb", "norm": "l2", "num_steps": 2}
    relative = started(values, eps="0.5x", init_mag="0.4x", step_size="0.1x")
    norm = relative.adversary.embedding_norm
    absolute = started(values, eps=0.5 * norm, init_mag=0.4 * norm, step_size=0.1 * norm)
    other = started(values, eps=0.5 * norm, init_mag=0.1 * norm, step_size=0.1 * norm)
    weights = []
    for recipe in (relative, absolute, other):
        data = load_data(recipe.data, Path())
        parts = build_components(recipe, data, Session())
        batch = next(iter(data.train.train_batches(16, 0, 0, recipe.data.augment, parts.session.place)))
        parts.train_step(parts, batch, Progress(0, 0.0))
        weights.append(embedding_table(parts.model.network).clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_radius_stays_while_the_embeddings_change_and_at_a_resume(values, tmp_path):
    values["training"]["changes"] = [{"epoch": 1, "settings": {"adversary.eps": "0.75x"}}]
    recipe = started(values)
    model, run = train_here(recipe, tmp_path / "runs", load_data(recipe.data, Path()))
    stored = load_recipe(run.path / "recipe.yaml")
    norm = recipe.adversary.embedding_norm
    assert float(embedding_table(model.network).norm(dim=1).mean()) != pytest.approx(norm, rel=1e-6)
    assert (stored.adversary.eps, stored.adversary.embedding_norm) == (Relative(0.5), norm)
    assert stored.in_force(1, 0).adversary.threat.eps == 0.75 * norm
    assert stored.digest() == recipe.digest()


def test_recipe_of_the_user_is_that_of_its_run(values):
    given, run = Recipe.model_validate(values), started(values)
    assert given.digest() != run.digest()
    assert not differs(run, given)
    assert pinned_as(given, run) == run
    other = Recipe.model_validate(values | {"adversary": values["adversary"] | {"eps": "0.6x"}})
    assert differs(run, other)


def test_given_norm_is_kept(values):
    assert started(values, embedding_norm=3).adversary.threat.eps == 1.5


def test_start_and_report_show_both_radii(values):
    recipe = Recipe.model_validate(values)
    norm = started(values).adversary.embedding_norm
    start = prepare_start(recipe, load_data(recipe.data, Path()), _none)
    assert str(start) == f"adversary.eps: 0.5x = {norm / 2:g} (mean norm of the embeddings: {norm:g})"
    assert about_report(start.recipe, 1.0)["training attack"].endswith("(0.5x the mean embedding norm)")
    leaves = {path: value for path, value, _ in start.recipe.leaves()}
    assert (leaves["adversary.eps"], leaves["adversary.embedding_norm"]) == ("0.5x", norm)


def test_radius_is_unknown_before_a_run(values):
    recipe = Recipe.model_validate(values)
    assert list(radii(recipe)) == ["l2:0.2 (evaluation)"]
    with pytest.raises(UserError, match=r"adversary.eps = 0.5x is relative .* set adversary.embedding_norm"):
        training_threat(recipe)


@pytest.mark.parametrize(
    "setting",
    [
        "adversary.eps=0.5x",
        "adversary.step_size=0.1x",
        "training.changes=[{epoch: 1, settings: {adversary.eps: 1x}}]",
    ],
)
def test_model_without_a_table_is_refused(setting):
    recipe = digits_recipe(setting)
    data = digits_data(recipe)
    for check in (check_model, lambda recipe, data: prepare_start(recipe, data, _none)):
        with pytest.raises(UserError, match=r"x is relative to the embedding table .* 'cnn2' has none"):
            check(recipe, data)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.threat.eps=0.5x", "compared at the same radius"),
        ("evaluation.validation.step_size=0.5x", "only adversary.eps, eps_low, init_mag and step_size"),
        ("optimizer.lr=0.5x", "only adversary.eps, eps_low, init_mag and step_size"),
        ("adversary.eps=-0.5x", "greater than or equal to 0"),
        ("adversary.step_size=0x", "greater than 0"),
        ("adversary.eps=halfx", "valid number"),
        ("adversary.eps_low=0.01x", "must both be absolute, or both relative"),
        ("adversary.embedding_norm=1", "does nothing without a relative length"),
    ],
)
def test_relative_length_that_does_not_fit_is_refused(setting, message):
    with pytest.raises(UserError, match=message):
        digits_recipe(setting)


@pytest.mark.parametrize(("text", "factor"), [("0.5x", 0.5), ("1/4x", 0.25), ("2x", 2.0), ("1e-2x", 0.01)])
def test_relative_length_is_text_with_an_x(text, factor):
    assert float(parse_relative(text)) == factor
    assert parse_relative(text.removesuffix("x")) is None


def test_campaign_chooses_between_relative_radii_only(values):
    base = Recipe.model_validate(values)
    choice = {"adversary.eps": Distribution(choice=["0.25x", "0.5x"])}
    check_space(choice, base, allow_code=False)
    trial = with_settings(base, {"adversary.eps": "0.25x"}, "trial")
    assert trial.adversary.eps == Relative(0.25)
    mixed = {"adversary.eps": Distribution(choice=[0.1, "0.5x"])}
    with pytest.raises(UserError, match=r"adversary.eps is 0.5x, 0.1, 0.5x in the recipe and the space"):
        check_space(mixed, base, allow_code=False)
    with pytest.raises(ValueError, match="under choice"):
        Distribution.model_validate({"loguniform": ["0.1x", "1x"]})
