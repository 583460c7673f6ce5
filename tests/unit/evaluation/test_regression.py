"""Regression: worst-case errors against closed forms in units of the target; reports; data; settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from advtrain.attacks import AttackConfig
from advtrain.data import ArraySplit, DataConfig, Dataset, Place, load_data
from advtrain.errors import UserError
from advtrain.evaluation import Estimate, EvalSpec, RegressionReport, evaluate, load_report, validation_errors
from advtrain.recipe import load_recipe
from advtrain.recipe.edits import EditThreatConfig
from advtrain.threat import ThreatModel
from advtrain.training.contract import check_data
from tests.kit import RECIPES, train_here


def diabetes(*overrides):
    return load_recipe(
        RECIPES / "diabetes.yaml", ["evaluation.attack.num_restarts=1", *overrides], allow_code=True
    )


def line(shape, outputs):
    """Build a linear regression, as a custom model of a user."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0], outputs))


def test_linear_model_worst_errors_match_closed_form_linf(tmp_path):
    """Oracle: the prediction at the two corners of ball and box along the sign of the weights."""
    recipe = diabetes(
        "data.source=linear", "model={name: tests.unit.evaluation.test_regression:line}", "training.epochs=8"
    )
    data = load_data(recipe.data, Path())
    model, _ = train_here(recipe, tmp_path, data)
    threat = ThreatModel("linf", 0.1)
    found = evaluate(
        EvalSpec(
            model,
            data.test,
            data,
            recipe.evaluation.attack,
            threat,
            name="line",
        ),
    )
    report, errors = found.report, found.samples
    x, y = torch.from_numpy(data.test.images), torch.from_numpy(data.test.labels)
    weight = model.network[1].weight[0].detach()
    with torch.no_grad():
        ends = [(model((x + s * 0.1 * weight.sign()).clamp(0, 1)).squeeze(1) - y).abs() for s in (1, -1)]
    worst = torch.maximum(*ends).double().numpy()
    assert np.allclose(errors.robust, worst, rtol=1e-4)
    assert report.robust_mae.value == pytest.approx(worst.mean(), rel=1e-4)
    assert report.robust_rmse.value == pytest.approx(np.sqrt((worst**2).mean()), rel=1e-4)
    # A lower bound: a model that fits the slopes of the data loses up to eps ||w||_1 inside the box.
    assert report.robust_mae.value > report.clean_mae.value + 0.05 * np.abs(weight.numpy()).sum()


def test_regression_attack_tries_both_directions():
    """Oracle: the largest error of a one-dimensional function on a grid over the ball."""

    class Valley(nn.Module):
        def forward(self, x):
            return torch.where(x < 0.5, 5 * (0.5 - x), 2 * (x - 0.5) - 10 * (x - 0.5).clamp_min(0.2) + 2)

    split = ArraySplit(np.full((1, 1), 0.45, np.float32), np.zeros(1, np.float32))
    grid = Valley()(torch.linspace(0.15, 0.75, 1000).unsqueeze(1)).abs().max()
    sums = validation_errors(
        Valley(),
        split,
        _attack(num_steps=40),
        ThreatModel("linf", 0.3),
        seed=0,
        batch_size=10,
        place=Place(),
    )
    assert sums["robust_mae"] == pytest.approx(float(grid), abs=0.02)


@pytest.mark.parametrize(
    ("threat", "message"),
    [
        (EditThreatConfig(edits="chars", at_most=1), r"edits of texts \(chars:1\) are for classifiers"),
        (ThreatModel("linf", 0.1), "suites are for classifiers"),
    ],
)
def test_regression_names_what_it_does_not_take(threat, message):
    split = ArraySplit(np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
    data = Dataset("here", split, split, split, 0, (3,), "0" * 64)
    with pytest.raises(UserError, match=message):
        evaluate(EvalSpec(line((3,), 1), split, data, "", threat, "line"))


def _attack(**values):
    from advtrain.attacks import build_attack

    return build_attack(AttackConfig.model_validate({"loss": "mae", "num_restarts": 3} | values))


@pytest.mark.slow
def test_adversarial_regression_is_more_robust_than_standard_regression(tmp_path):
    """The worst-case MAE is at least 5 % lower, on friedman1 at eps 0.1."""
    scores = {}
    for term in ("clean_mse", "adv_mse", "adv_mae", "adv_huber"):
        recipe = diabetes(
            "data.source=friedman1",
            f"objective={{{term}: 1}}",
            "adversary.eps=0.1",
            "evaluation.threat.eps=0.1",
            "training.epochs=15",
        )
        data = load_data(recipe.data, Path())
        model, _ = train_here(recipe, tmp_path, data)
        evaluator = recipe.evaluation
        found = evaluate(
            EvalSpec(
                model,
                data.test,
                data,
                evaluator.attack,
                evaluator.threat_model,
                name=term,
            ),
        )
        scores[term] = found.report.robust_mae.value
    for term in ("adv_mse", "adv_mae", "adv_huber"):
        assert scores[term] < 0.95 * scores["clean_mse"], scores


def test_regression_report_has_intervals_and_round_trips_through_disk(tmp_path):
    recipe = diabetes("training.epochs=2")
    data = load_data(recipe.data, Path())
    model, run = train_here(recipe, tmp_path, data)
    evaluator = recipe.evaluation
    found = evaluate(
        EvalSpec(
            model,
            data.test,
            data,
            evaluator.attack,
            evaluator.threat_model,
            name="it",
            full=True,
        ),
    )
    found.save(tmp_path)
    report, errors = found.report, found.samples
    assert load_report(tmp_path) == report
    assert isinstance(report, RegressionReport)
    assert report.robust_mae.low < report.robust_mae.value < report.robust_mae.high
    assert (errors.robust >= errors.clean - 1e-4).all()
    last = run.metrics()[-1]
    assert last["val_robust_mae"] >= last["val_clean_mae"] > 1  # in units of the target
    assert last["train_adv_mae"] > 1


def test_bootstrap_interval_has_stated_coverage():
    """Oracle: the share of 300 samples of a known distribution whose interval holds the true mean."""
    rng = np.random.default_rng(0)
    held = [(e := Estimate.of(rng.exponential(size=80), "mae")).low <= 1.0 <= e.high for _ in range(300)]
    assert 0.88 <= np.mean(held) <= 0.98


def test_non_finite_prediction_is_reported_as_infinite_error(tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1] > 0.5, float("nan"), 100 + x[:, :1])

    recipe = diabetes()
    data = load_data(recipe.data, Path())
    found = evaluate(
        EvalSpec(
            Broken(),
            data.test,
            data,
            recipe.evaluation.attack,
            ThreatModel("linf", 0.05),
            name="b",
        ),
    )
    report, errors = found.report, found.samples
    assert np.isinf(errors.clean).any()
    assert (errors.robust >= errors.clean).all()
    assert report.robust_mae.value == float("inf")
    found.save(tmp_path)
    assert load_report(tmp_path) == report


def test_tabular_regression_data_is_split_and_scaled():
    data = load_data(DataConfig(source="diabetes"), Path())
    assert data.regression
    assert data.shape == (10,)
    assert sum(len(s) for s in (data.train, data.validation, data.test)) == 442
    images = np.concatenate([s.images for s in (data.train, data.validation, data.test)])
    assert (images.min(0), images.max(0)) == (pytest.approx(0), pytest.approx(1))
    mean, deviation = data.target_scale
    assert (mean, deviation) == (
        pytest.approx(data.train.labels.mean()),
        pytest.approx(data.train.labels.std()),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=digits"], "digits has labels"),
        (
            [
                "objective={adv_ce: 1}",
                "adversary.loss=ce",
                "evaluation.attack.loss=ce",
                "evaluation.validation.loss=ce",
            ],
            "diabetes has targets",
        ),
        (["data.num_classes=3"], "it is a regression"),
        (["data.augment.flip=true"], "tables of 10 columns"),
        (["data.source=digits", "data.task=regression"], "is for npz"),
    ],
)
def test_recipe_rejects_data_that_does_not_fit_objective(overrides, message):
    recipe = diabetes(*overrides)
    with pytest.raises(UserError, match=message):
        check_data(recipe, load_data(recipe.data, Path()))


def test_npz_targets_may_be_any_finite_number(tmp_path):
    x = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    y = np.linspace(-5, 900, 50)
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    config = DataConfig(source="npz", path="mine.npz", task="regression")
    data = load_data(config, tmp_path)
    assert data.regression
    assert data.train.labels.max() > 100
    y[7] = np.nan
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    with pytest.raises(UserError, match="target of sample 7"):
        load_data(config, tmp_path)


def test_image_model_is_rejected_for_tabular_data():
    from advtrain.training import Session, build_components

    recipe = diabetes("model={name: cnn2}")
    with pytest.raises(UserError, match="use mlp"):
        build_components(recipe, load_data(recipe.data, Path()), Session())
