"""Search space: distributions, points, and validation errors."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advtrain.errors import UserError
from tests.kit import digits_recipe
from tuning.campaign import parse_campaign
from tuning.space import Distribution, check_space, settings, with_settings

KINDS = {
    "uniform": {"uniform": [0.1, 0.4]},
    "loguniform": {"loguniform": [1e-4, 1e-1]},
    "one_minus": {"one_minus_loguniform": [1e-4, 1e-1]},
    "integer": {"integer": [3, 9]},
}


def space_of(**paths):
    return {path.replace("__", "."): Distribution.model_validate(d) for path, d in paths.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(share=st.floats(0, 1))
def test_unit_interval_maps_into_bounds_and_back(kind, share):
    distribution = Distribution.model_validate(KINDS[kind])
    low, high = distribution.bounds
    raw = distribution.from_unit(share)
    assert low <= raw <= high
    if kind == "integer":
        assert isinstance(raw, int)
        assert distribution.from_unit(distribution.to_unit(raw)) == raw
    else:
        assert distribution.to_unit(raw) == pytest.approx(share, abs=1e-9)
    assert distribution.raw(distribution.value(raw)) == pytest.approx(raw)


def test_one_minus_searches_near_one_on_a_logarithmic_scale():
    distribution = Distribution.model_validate(KINDS["one_minus"])
    values = [distribution.value(distribution.from_unit(share)) for share in (0, 1 / 3, 2 / 3, 1)]
    assert values == pytest.approx([0.9999, 0.999, 0.99, 0.9])
    assert distribution.label("optimizer.beta2") == "1 - optimizer.beta2"


@pytest.mark.parametrize("kind", [*KINDS, "choice"])
def test_mutation_stays_within_bounds(kind):
    distribution = Distribution.model_validate(KINDS.get(kind, {"choice": ["a", "b", "c"]}))
    generator, raw = random.Random(0), distribution.extremes()[0]
    for _ in range(50):
        raw = distribution.neighbour(raw, generator)
        if kind == "choice":
            assert raw in ("a", "b", "c")
        else:
            low, high = distribution.bounds
            assert low <= raw <= high


def test_grid_includes_both_ends_of_range():
    assert Distribution.model_validate({"loguniform": [1e-4, 1e-2]}).grid(3) == pytest.approx(
        [1e-4, 1e-3, 1e-2]
    )
    assert Distribution.model_validate({"integer": [1, 3]}).grid(9) == [1, 2, 3]
    assert Distribution.model_validate({"choice": [None, 1]}).grid(9) == [None, 1]


def test_fractions_stay_exact():
    recipe = digits_recipe()
    distribution = Distribution.model_validate({"uniform": ["2/255", "8/255"]})
    changed = with_settings(recipe, {"adversary.eps": distribution.extremes()[1]}, "here")
    assert changed.adversary.eps == 8 / 255


def test_settings_convert_point_to_recipe_values():
    space = space_of(optimizer__beta2=KINDS["one_minus"], optimizer__lr=KINDS["loguniform"])
    changed = settings(space, {"optimizer.beta2": 0.01, "optimizer.lr": 0.02})
    recipe = with_settings(digits_recipe(), changed, "here")
    assert (recipe.optimizer.beta2, recipe.optimizer.lr) == (0.99, 0.02)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"optimizer.beta3": KINDS["uniform"]},
            "unknown path 'optimizer.beta3'; did you mean 'optimizer.beta",
        ),
        ({"objective.trades": KINDS["uniform"]}, "did you mean 'objective.trades_kl'"),
        ({"evaluation.threat.eps": KINDS["uniform"]}, "is part of the evaluation, which all trials share"),
        ({"data.validation_fraction": KINDS["uniform"]}, "would change the splits"),
        ({"seed": {"integer": [0, 9]}}, "cannot be searched"),
        ({"training.num_workers": {"integer": [0, 2]}}, "is the same for all trials"),
        (
            {"adversary.eps": {"uniform": [-0.1, 0.4]}},
            "adversary.eps=-0.1 is no valid recipe: recipe: 'adversary.eps'",
        ),
        ({"adversary.num_steps": {"uniform": [1, 9]}}, "adversary.num_steps=1.0 is no valid recipe"),
        (
            {"training.epochs": {"integer": [2, 9]}, "adversary.eps_warmup_epochs": {"uniform": [0, 4]}},
            "training.epochs=2, adversary.eps_warmup_epochs=4.0 is no valid recipe",
        ),
    ],
)
def test_check_space_rejects_invalid_space_with_suggestion(space, message):
    found = {path: Distribution.model_validate(d) for path, d in space.items()}
    with pytest.raises(UserError, match=re.escape(message)):
        check_space(found, digits_recipe(), allow_code=False)


SOUND = {
    "name": "small",
    "recipe": "digits",
    "space": {"optimizer.lr": {"loguniform": [1e-3, 1e-2]}, "adversary.eps": {"uniform": [0.05, 0.2]}},
    "objectives": {"robust_accuracy": "max"},
    "budget": {"trials": 4},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": {"kind": "asha", "grace": 2}}, "grace is now called grace_period"),
        ({"budgets": 3}, "unknown key 'budgets'; did you mean 'budget'"),
        (
            {"search": {"algorithm": "tpe", "n_startup": 3}},
            "unknown key 'search.n_startup'; did you mean 'n_startup_trials'",
        ),
        ({"search": {"algorithm": "hyperopt"}}, "search.algorithm"),
        (
            {"search": {"algorithm": "random", "n_startup_trials": 3}},
            "n_startup_trials belongs to tpe and bohb, not to random",
        ),
        ({"space": {"optimizer.lr": {"uniform": [1, 0]}}}, "uniform: low must be below high (got [1, 0])"),
        ({"space": {"optimizer.lr": {"loguniform": [0, 1]}}}, "loguniform: low must be above 0 (got 0)"),
        ({"space": {"optimizer.lr": {}}}, "takes exactly one of uniform, loguniform"),
        ({"space": {"optimizer.lr": {"unifrom": [0, 1]}}}, "did you mean 'uniform'"),
        (
            {"objectives": {"robust_accurcy": "max"}},
            "unknown figure 'robust_accurcy'; did you mean 'robust_accuracy'",
        ),
        ({"objectives": {"robust_accuracy": "min"}}, "more of it is better"),
        (
            {"objectives": {"robust_accuracy": "max", "clean_accuracy": 1}},
            "either all are max or min, or all",
        ),
        ({"objectives": {"robust_accuracy": -1}}, "a weight must be above 0"),
        ({"search": {"algorithm": "pbt"}, "scheduler": {"kind": "asha"}}, "pbt is its own scheduler"),
        ({"search": {"algorithm": "bohb"}, "scheduler": {"kind": "asha"}}, "bohb is tpe under hyperband"),
        (
            {
                "search": {"algorithm": "cma-es"},
                "objectives": {"robust_accuracy": "max", "clean_accuracy": "max"},
            },
            "cma-es searches one objective",
        ),
        (
            {"search": {"algorithm": "cma-es"}, "space": {"model.name": {"choice": ["mlp", "cnn2"]}}},
            "no choice",
        ),
        ({"budget": {"trials": 4, "wall": "2 hours"}}, "takes a time such as 2h, 90m, 45s or 1h30m"),
        ({"budget": {"trials": 4, "wall": "1:30"}}, "'1:30' may mean 1m30s or 1h30m"),
        ({"budget": {"trials": 4, "wall": "1:30:00"}}, "write 1h30m00s"),
        ({"budget": {"trials": 4, "wall": 45}}, "'45' may mean 45s, 45m or 45h"),
        ({"budget": {"trials": 0}}, "budget.trials"),
    ],
)
def test_parse_campaign_rejects_invalid_campaign(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_campaign(SOUND | changes, "here")


def test_parse_campaign_names_all_missing_keys_at_once():
    with pytest.raises(UserError) as caught:
        parse_campaign({"search": {"algorithm": "tpe", "popluation": 3}, "confirm": {}}, "c.yaml")
    first, second = str(caught.value).splitlines()
    missing = ("name", "recipe", "space", "objectives", "budget", "confirm.seeds")
    assert sorted(missing) == sorted(
        first.partition(" are missing")[0].removeprefix("c.yaml: ")[1:-1].split("', '")
    )
    assert second == "c.yaml: unknown key 'search.popluation'; did you mean 'population'?"


def test_parse_campaign_names_keys_as_they_are_written():
    changes = {"register": {"tpo": 1}, "objectives": {"robust_accuracy": "up"}}
    with pytest.raises(UserError) as caught:
        parse_campaign(SOUND | changes, "c.yaml")
    assert "unknown key 'register.tpo'; did you mean 'top'?" in str(caught.value)
    assert "'objectives.robust_accuracy': Input should be 'max' or 'min'" in str(caught.value)
    assert "function" not in str(caught.value)


@pytest.mark.parametrize(
    ("wall", "seconds"),
    [
        ("2h", 7200),
        ("90m", 5400),
        ("45s", 45),
        ("1d", 86400),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("1d 2h 3m 4s", 93784),
    ],
)
def test_wall_budget_accepts_time_units(wall, seconds):
    campaign = parse_campaign(SOUND | {"budget": {"trials": 1, "wall": wall}}, "x")
    assert campaign.budget.wall == seconds
    stored = campaign.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert parse_campaign(stored, "x", stored=True) == campaign


@pytest.mark.parametrize(("given", "hours"), [(3, 3), (0.5, 0.5), ("1/2", 0.5), ("90m", 1.5), ("1d", 24)])
def test_gpu_hours_take_numbers_of_hours_and_units(given, hours):
    budget = {"trials": 1, "gpu_hours": given}
    assert parse_campaign(SOUND | {"budget": budget}, "x").budget.gpu_hours == hours
