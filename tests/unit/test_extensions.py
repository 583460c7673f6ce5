"""The five extension points of CONTRIBUTING.md, used as a contributor or user would use them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import advtrain
from advtrain.attacks import SEARCHES, predictions
from advtrain.attacks.base import SearchDefaults, attack_mode, input_gradient
from advtrain.attacks.losses import build_cross_entropy
from advtrain.data.sources import SOURCES, ArraySplit, Source
from advtrain.errors import UserError
from advtrain.models import MODELS
from advtrain.objective import TERMS, ObjectiveConfig
from advtrain.recipe import load_recipe
from advtrain.training.contract import check_code, check_data
from tests.kit import RECIPES, SMALL, Linear, digits_data, digits_recipe, train_here


def one_step(scale: float = 1.0):
    """Build a training attack: FGSM with a step of `scale` times the radius."""

    def attack(model, x, y, threat, generator):
        gradient, _ = input_gradient(model, x, build_cross_entropy(model, x, y))
        return threat.project(threat.step(x, gradient, scale * threat.eps), x)

    return attack


def not_a_factory():
    return 5


def wrong_shape():
    return lambda model, x, y, threat, generator: x[:1]


ATTACK = "adversary={name: tests.unit.test_extensions:one_step, eps: 0.1, args: {scale: 0.5}}"


def test_custom_training_attack_trains_like_builtin_fgsm(tmp_path):
    """Oracle: the built-in FGSM with a step of half the radius."""
    short = ("training.epochs=2", "training.batch_size=100")
    ours, _ = train_here(digits_recipe(ATTACK, *short), tmp_path / "ours")
    plain = digits_recipe("adversary={name: fgsm, eps: 0.1, step_size: 0.05}", *short)
    theirs, _ = train_here(plain, tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


CHANGES = "training.changes=[{{epoch: 1, settings: {{{}}}}}]"


@pytest.mark.parametrize(
    "override",
    [ATTACK, CHANGES.format("adversary.name: 'a.b:c'"), "adversary={name: 'torchvision:x', eps: 0.1}"],
)
def test_custom_training_attack_needs_allow_code(override):
    with pytest.raises(UserError, match=r"adversary\.name '.*' runs code that is not part of advtrain"):
        load_recipe(RECIPES / "digits.yaml", [*SMALL, override])


def test_custom_term_in_changes_needs_allow_code():
    mapping = CHANGES.format("objective.custom: {function: 'os:getcwd', weight: 1}")
    with pytest.raises(UserError, match=r"objective\.custom\.function 'os:getcwd' runs code"):
        load_recipe(RECIPES / "digits.yaml", [*SMALL, mapping])


def test_check_data_does_not_import_custom_attack():
    """The recipe is checked against the data even if the module of its attack is missing."""
    recipe = digits_recipe("adversary={name: 'nowhere:attack', eps: 0.1}")
    check_data(recipe, digits_data(recipe))
    with pytest.raises(UserError, match="cannot import 'nowhere'"):
        check_code(recipe)  # training would call it


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.unit.test_extensions:nothing", "no 'nothing'"),
        ("tests.unit.test_extensions:not_a_factory", "returned a int, not a function"),
        ("tests.unit.test_extensions:wrong_shape", r"returned \(1, 1, 8, 8\), not a tensor"),
    ],
)
def test_invalid_custom_training_attack_is_rejected(name, message, tmp_path):
    recipe = digits_recipe(f"adversary={{name: '{name}', eps: 0.1}}")
    with pytest.raises(UserError, match=message):
        train_here(recipe, tmp_path)


@pytest.mark.parametrize("setting", ["num_steps: 3", "loss: margin", "step_size: 0.1"])
def test_custom_attack_rejects_settings_it_would_ignore(setting):
    with pytest.raises(UserError, match="does not apply to a custom attack; give it to the factory in args"):
        digits_recipe(f"adversary={{name: 'tests.unit.test_extensions:one_step', eps: 0.1, {setting}}}")


def test_custom_training_attack_is_rejected_for_evaluation():
    with pytest.raises(UserError, match="for training only, not for evaluation"):
        digits_recipe("evaluation.validation={name: tests.unit.test_extensions:one_step}")


class Noise(SearchDefaults):
    """An evaluation attack that tries random points of the ball."""

    num_rounds = 1

    def __init__(self, queries: int) -> None:
        self.queries = queries

    @property
    def name(self) -> str:
        return f"noise-{self.queries}"

    def find_failures(self, model, x, y, threat, generator=None, number=0, batch_size=None):
        x_adv, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool)
        with attack_mode(model), torch.no_grad():
            for _ in range(self.queries):
                z = threat.random_start(x, generator)
                new = (predictions(model(z)) != y) & ~fooled
                x_adv[new], fooled = z[new], fooled | new
        return x_adv, fooled


def test_evaluation_attack_is_added_by_one_registry_entry(monkeypatch):
    monkeypatch.setitem(SEARCHES, "noise", lambda queries=10: Noise(queries))
    model = Linear(16)
    model.bias.data = -model.weight.detach().sum() / 2  # the center of the box is on the decision boundary
    x = torch.rand(50, 16)
    y = model(x).argmax(1)
    report = advtrain.evaluate(model, x, y, "linf:0.3", suite="noise-30,apgd-ce-10", full=False)
    noise, apgd = report.attacks
    assert (noise.name, noise.num_attacked) == ("noise-30", 50)
    assert noise.num_broken > 0
    assert apgd.num_attacked == 50 - noise.num_broken


def test_every_term_is_a_described_weight_of_objective_config():
    for name, term in TERMS.items():
        field = ObjectiveConfig.model_fields[name]
        assert (field.default, field.description.endswith(term.description)) == (0.0, True)
        assert set(term.settings) <= set(ObjectiveConfig.model_fields)


def confidence(f):
    """Return the highest probability on adversarial inputs, as a custom term."""
    return f.adv_logits.softmax(1).amax(1)


def test_custom_term_is_trained_and_logged(tmp_path):
    custom = "objective={adv_ce: 1, custom: {function: 'tests.unit.test_extensions:confidence', weight: 0.5}}"
    _, run = train_here(digits_recipe(custom, "training.epochs=1"), tmp_path)
    (line,) = run.metrics()
    assert line["train_loss"] == pytest.approx(line["train_adv_ce"] + 0.5 * line["train_custom"], rel=1e-5)


def tiny(shape, num_classes, *, width=8):
    return nn.Sequential(
        nn.Conv2d(shape[0], width, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def test_network_is_added_by_registry_entry_or_custom_factory(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "tiny", tiny)
    ours, _ = train_here(digits_recipe("model={name: tiny, args: {width: 4}}", "training.epochs=1"), tmp_path)
    name = "model={name: 'tests.unit.test_extensions:tiny', args: {width: 4}}"
    theirs, _ = train_here(digits_recipe(name, "training.epochs=1"), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_data_source_is_added_by_one_registry_entry(monkeypatch, tmp_path):
    def stripes(request):
        y = np.arange(200, dtype=np.int64) % 2
        x = np.zeros((200, 1, 8, 8), np.uint8)
        x[y == 1, :, ::2] = 255
        return Source(ArraySplit(x, y), None, 2)

    monkeypatch.setitem(SOURCES, "stripes", stripes)
    recipe = digits_recipe("data={source: stripes}", "training.epochs=5", "training.batch_size=20")
    _, run = train_here(recipe, tmp_path)
    assert run.metrics()[-1]["val_robust_accuracy"] == 1
