"""Training steps on the word embeddings of texts against calculations by hand on a linear network."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advtrain.data import Batch, load_data
from advtrain.errors import UserError
from advtrain.recipe import load_recipe
from advtrain.threat import ThreatModel
from advtrain.training.free import random_start
from advtrain.training.step import Components, Progress, attacked_rows
from tests.kit import RECIPES
from tests.linear_text_kit import ByHand, ascended, batches, built, text_recipe, write_texts
from tests.unit.training.test_loop import check_resume


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def test_free_training_of_texts_starts_at_zero_in_each_batch(folder):
    components, data = built(text_recipe(folder, {"name": "free", "num_steps": 3, "step_size": 0.2}))
    hand = ByHand(components.model.network)
    for step, batch in enumerate(batches(data, 3)):
        components.train_step(components, batch, Progress(step, 0.0))
        mask = (batch.x != 0).unsqueeze(-1).double()
        d = torch.zeros(*batch.x.shape, 4, dtype=torch.float64)
        for _ in range(3):
            *gradients, token = hand.gradients(batch.x, batch.y, hand.embed(batch.x) + d)
            d = ascended(d, token, mask, 0.2, 0.3)
            hand.step(tuple(gradients))
        hand.assert_equals(components.model.network)
    assert len({batch.x.shape[1] for batch in batches(data, 3)}) > 1  # lengths differ
    assert components.replayed is None  # nothing to save


FREELB = {"name": "freelb", "num_steps": 3, "step_size": 0.2}


def drawn_start(components: Components, x: Tensor, step: int, size: float) -> Tensor:
    """Return U(-1, 1) size / sqrt(len D) on the tokens, drawn text by text and token by token."""
    generator = components.generator("attack", step)
    d = torch.zeros(*x.shape, 4, dtype=torch.float64)
    draws = iter(torch.rand(4 * int((x != 0).sum()), generator=generator).split(4))
    for row, ids in enumerate(x):
        for place in range(int((ids != 0).sum())):
            d[row, place] = (next(draws).double() * 2 - 1) * size / (4 * int((ids != 0).sum())) ** 0.5
    return d


@pytest.mark.parametrize(
    ("adversary", "size", "eps"),
    [
        ({"start": "none"}, 0.0, 0.3),
        ({}, 0.3, 0.3),
        ({"init_mag": 0.05}, 0.05, 0.3),
        ({"init_mag": 0.9}, 0.9, 0.3),  # a start outside the ball
        ({"init_mag": 0.5, "eps": 0.9}, 0.5, math.inf),  # eps = init_mag + 2 step_size never acts
    ],
    ids=["clean first", "usual start", "small start", "large start", "unbounded"],
)
def test_freelb_is_algorithm_1_of_zhu_et_al(folder, adversary, size, eps):
    components, data = built(text_recipe(folder, FREELB | adversary))
    hand = ByHand(components.model.network)
    for step, batch in enumerate(batches(data, 3)):
        sums = components.train_step(components, batch, Progress(step, 0.0))
        mask, d = (batch.x != 0).unsqueeze(-1).double(), drawn_start(components, batch.x, step, size)
        total, loss = [0, 0, 0], 0.0
        for _ in range(3):
            z = hand.embed(batch.x) + d
            loss += float(F.cross_entropy(z.sum(1) @ hand.weight.T + hand.bias, batch.y, reduction="sum"))
            *gradients, token = hand.gradients(batch.x, batch.y, z)
            total = [one + other / 3 for one, other in zip(total, gradients, strict=True)]
            d = ascended(d, token, mask, 0.2, eps)
        hand.step(tuple(total))
        hand.assert_equals(components.model.network)
        assert float(sums["loss"]) == pytest.approx(loss / 3, rel=1e-5)


def points(components: Components, batch: Batch, progress: Progress | None = None) -> list[Tensor]:
    """Take one step and return the perturbed embeddings of its passes, minus the clean ones."""
    found, objective = [], components.ddp_objective
    clean = components.model.network.embed(batch.x).detach()

    def record(x, z_adv, *others):
        found.append(z_adv.detach() - clean)
        return objective(x, z_adv, *others)

    components.train_step(replace(components, ddp_objective=record), batch, progress or Progress(0, 0.0))
    return found


def lengths(d: Tensor) -> Tensor:
    return d.flatten(1).norm(dim=1)


def test_freelb_points_stay_in_the_ball_and_off_the_padding(folder):
    components, data = built(text_recipe(folder, FREELB | {"num_steps": 4}))
    (batch,) = batches(data, 1)
    first, *others = points(components, batch)
    assert 0 < lengths(first).min() <= lengths(first).max() <= 0.3
    assert len(others) == 3
    for d in (first, *others):
        assert (d[batch.x == 0] == 0).all()
        assert lengths(d).max() <= 0.3 + 1e-6
    assert torch.allclose(lengths(others[-1]), torch.tensor(0.3), atol=1e-5)


@pytest.mark.parametrize("model", ["text_cnn", "transformer"])
@pytest.mark.parametrize(
    "adversary",
    [
        {"num_steps": 1, "start": "none"},
        {"num_steps": 3, "step_size": 0.2, "eps": 0},
        {"num_steps": 2, "eps": 1e-20},  # two points at which float32 sees the clean input
    ],
    ids=["one point", "radius 0", "two equal points"],
)
def test_freelb_in_the_limit_is_plain_cross_entropy_bit_for_bit(folder, model, adversary):
    args = {"dim": 8, "channels": 6} if model == "text_cnn" else {"dim": 8, "heads": 2, "depth": 1}
    net = {"model": {"name": model, "args": args | {"dropout": 0.5}}}
    found = []
    for attack, objective in ((adversary, {"adv_ce": 1}), ({"eps": 0}, {"clean_ce": 1})):
        name = "freelb" if "adv_ce" in objective else "pgd"
        components, data = built(text_recipe(folder, {"name": name} | attack, objective=objective, **net))
        for step, batch in enumerate(batches(data, 3)):
            components.train_step(components, batch, Progress(step, 0.0))
        found.append(components.model.state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.parametrize(
    ("adversary", "changes", "passes"),
    [
        ({}, {}, 3),
        ({"num_steps": 1}, {}, 1),
        ({"eps": 0}, {}, 1),
        ({}, {"objective": {"clean_ce": 1, "adv_ce": 1}}, 6),
        ({}, {"training": {"epochs": 2, "batch_size": 6, "accumulate": 2}}, 6),
        ({"eps_delay_epochs": 1}, {}, 1),
        ({"fraction": 0}, {}, 1),
    ],
)
def test_freelb_takes_one_pass_for_each_point_with_equal_dropout_masks(folder, adversary, changes, passes):
    net = {"model": {"name": "tests.linear_text_kit:DropoutBag"}}
    components, data = built(text_recipe(folder, FREELB | adversary, **net, **changes))
    before = {name: value.clone() for name, value in components.model.state_dict().items()}
    batch, other = batches(data, 2)
    masks = components.model.network.masks
    components.train_step(components, batch, Progress(0, 0.0))
    assert len(masks) == passes
    parts = changes.get("training", {}).get("accumulate", 1)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == parts
    first = masks[0]
    masks.clear()
    components.train_step(components, other, Progress(1, 0.0))
    assert not torch.equal(masks[0], first)
    assert any(not torch.equal(before[name], value) for name, value in components.model.state_dict().items())


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_padding_changes_neither_points_nor_weights(folder, norm, per):
    net = {"model": {"name": "transformer", "args": {"dim": 4, "heads": 2, "depth": 1, "dropout": 0}}}
    found = []
    for pad in (0, 1):
        components, data = built(text_recipe(folder, FREELB | {"norm": norm, "per": per}, **net))
        batch = next(b for b in batches(data, 9) if b.x.shape[1] < data.shape[0])
        batch = replace(batch, x=F.pad(batch.x, (0, pad)))
        moved = points(components, batch)
        assert all((d[batch.x == 0] == 0).all() for d in moved)
        found.append(([d[:, : d.shape[1] - pad] for d in moved], components.model.state_dict()))
    (short, weights), (long, others) = found
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(short, long, strict=True))
    assert torch.equal(short[0], long[0])  # the random start
    assert all(torch.allclose(weights[name], others[name], atol=1e-6) for name in weights)


def test_norm_per_token_equals_that_of_the_sequence_for_texts_of_one_token(folder):
    found = []
    for per in ("sequence", "token"):
        components, data = built(text_recipe(folder, FREELB | {"per": per}))
        (batch,) = batches(data, 1)
        found.append(points(components, replace(batch, x=batch.x[:, :1])))
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("norm", "length"), [("linf", 0.5), ("l2", 0.5 / 3**0.5), ("l1", 0.25)])
def test_random_start_has_the_norm_of_uniform_coordinates(norm, length):
    """The root mean square of U(-1, 1) is 1 / sqrt(3), and its mean absolute value is 1 / 2."""
    threat = ThreatModel(norm, 9.0, low=-math.inf, high=math.inf)
    z = torch.zeros(4, 50, 80)
    start = random_start(z, threat, 0.5, torch.Generator().manual_seed(0))
    assert torch.allclose(threat.length(start), torch.tensor(length), rtol=0.03)
    assert threat.length(start).max() <= 0.5
    again = random_start(z, threat.with_radius_scale(torch.tensor([1.0, 0.5, 0, 1])), 0.5, torch.Generator())
    assert torch.allclose(threat.length(again) / length, torch.tensor([1.0, 0.5, 0, 1]), rtol=0.03)


def test_freelb_attacks_a_fraction_at_radii_that_warm_up(folder):
    """At half of the warm-up, start, step and radius are halved."""
    changes = {"fraction": 0.5, "eps_warmup_epochs": 1, "eps_low": 0.2, "init_mag": 0.1, "num_steps": 5}
    components, data = built(text_recipe(folder, FREELB | changes))
    (batch,) = batches(data, 1)
    progress = Progress(0, 0.5)
    start, *others = points(components, batch, progress)
    wanted = torch.zeros(len(batch.y), dtype=torch.bool)
    wanted[attacked_rows(0.5, batch, progress)] = True
    assert torch.equal(lengths(start) > 0, wanted)
    assert lengths(start).max() <= 0.05
    last = lengths(others[-1])[wanted]
    assert (lengths(others[-1])[~wanted] == 0).all()
    assert 0.1 - 1e-6 <= last.min() < last.max() <= 0.15 + 1e-6
    step = lengths(others[0] - start)[wanted] / lengths(others[0] - start)[wanted].max()
    assert step.min() < 1  # steps follow the radius of each text
    assert lengths(others[0] - start).max() <= 0.1 + 1e-6


@pytest.mark.parametrize("adversary", [FREELB, {"name": "free", "num_steps": 2}], ids=["freelb", "free"])
def test_resumed_training_of_texts_equals_an_uninterrupted_run(folder, adversary):
    recipe = text_recipe(folder, adversary, model={"name": "tests.linear_text_kit:DropoutBag"})
    check_resume(folder, recipe, load_data(recipe.data, Path()))


@pytest.mark.parametrize(
    ("adversary", "changes", "message"),
    [
        ({"loss": "margin"}, {}, "freelb maximizes the training objective itself; it has no loss"),
        ({"num_restarts": 2}, {}, "it has no num_restarts"),
        ({"start": "gaussian"}, {}, "set start to uniform or none"),
        ({"noise": 2}, {}, "freelb has no noise"),
        ({"batch_norm": "train"}, {}, "freelb makes no passes of its own, so batch_norm must stay eval"),
        ({"start": "none", "init_mag": 1}, {}, "init_mag belongs to freelb with start: uniform"),
        ({"name": "pgd", "init_mag": 1}, {}, "init_mag belongs to freelb"),
        ({"eps": 0, "init_mag": 1}, {}, r"set eps to init_mag \+ \(num_steps - 1\) step_size"),
        ({"start": "none"}, {"objective": {"clean_ce": 1, "trades_kl": 6}}, "set adversary.start: uniform"),
        (
            {},
            {"optimizer": {"name": "sgd", "lr": 1, "sam_rho": 0.1}},
            "freelb differentiates by weights and input",
        ),
        (
            {},
            {"evaluation": {"threat": {"eps": 1}, "attack": {"name": "freelb"}}},
            "freelb is for training only",
        ),
    ],
)
def test_recipe_rejects_what_does_not_suit_freelb(folder, adversary, changes, message):
    with pytest.raises(ValueError, match=message):
        text_recipe(folder, FREELB | adversary, **changes)


def test_objective_without_the_adversarial_inputs_is_refused(folder):
    objective = {"custom": {"function": f"{__name__}:clean_term"}}
    components, data = built(text_recipe(folder, FREELB, objective=objective))
    (batch,) = batches(data, 1)
    with pytest.raises(UserError, match="freelb maximizes the objective, but none of its terms uses"):
        components.train_step(components, batch, Progress(0, 0.0))


def clean_term(f):
    return f.clean_loss


@pytest.mark.parametrize(("steps", "one_step"), [(1, True), (2, True), (3, False)])
def test_freelb_with_one_ascent_counts_as_one_step_attack(folder, steps, one_step):
    assert text_recipe(folder, FREELB | {"num_steps": steps}).adversary.one_step is one_step


def test_freelb_trains_a_regression():
    load_recipe(RECIPES / "diabetes.yaml", ["adversary={name: freelb, eps: 0.1}"])
