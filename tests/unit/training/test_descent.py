"""Training with a part of the batch for each core, against training on the batch as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from threading import current_thread

import pytest
import torch

from advtrain.data import AugmentConfig, Batch
from advtrain.models import recorded
from advtrain.objective import TERMS
from advtrain.training import Session, build_parts
from advtrain.training.descent import PartsDescent
from advtrain.training.loop import TrainingLoop
from advtrain.training.step import adversarial_step, attack_and_descend, backward, perturb
from tests.kit import digits_data, digits_recipe, train_here

PLAIN = [name for name, term in TERMS.items() if not (term.gradient or term.more or term.regression)]


@pytest.fixture(autouse=True)
def _two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def recipe_of(*overrides: str):
    return digits_recipe("training.batch_size=650", "optimizer.name=sgd", "optimizer.lr=0.1", *overrides)


def built(recipe, whole: bool = False):
    """The parts and the first batch; `whole`: on all cores at once."""
    data = digits_data(recipe)
    parts = build_parts(recipe, data, Session())
    assert parts.descent is not None
    if whole:
        parts.descent, parts.attack.cores = None, 1
    parts.reduced.train()
    batches = data.train.train_batches(recipe.training.batch_size, 0, 0, AugmentConfig(), Session().place)
    return parts, next(iter(batches))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6)


def order(tensor: torch.Tensor) -> list[int]:
    """The strides that say where an entry lies: one of a side of 1 says nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("attacked", [True, False], ids=["attacked", "clean"])
@pytest.mark.parametrize("term", PLAIN)
def test_parts_have_the_gradients_and_sums_of_the_whole(term, attacked):
    recipe = recipe_of(f"objective={{clean_ce: 0.3, {term}: 0.7}}", "training.channels_last=true")
    sums, gradients = [], []
    for whole in (False, True):
        parts, batch = built(recipe, whole)
        x_adv = (batch.x + 0.05 * batch.x.flip(0)).clamp(0, 1) if attacked else None
        sums.append(backward(parts, batch, x_adv, 0, 0.0, recipe, Session()))
        gradients.append([p.grad for p in parts.model.parameters()])
    assert list(sums[0]) == list(sums[1])
    assert all(close(sums[0][name], sums[1][name]) for name in sums[0])
    for mine, torchs, parameter in zip(*gradients, parts.model.parameters(), strict=True):
        assert close(mine, torchs)
        assert order(mine) == order(torchs) == order(parameter)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("adversary.norm=l2", "adversary.eps=1", "adversary.momentum=1"),
        ("adversary.eps_low=0.02", "adversary.num_restarts=2"),
        ("adversary.loss=kl", "adversary.start=gaussian", "adversary.fraction=0.5"),
        ("adversary={name: fgsm_rs, eps: 0.1}", "optimizer.awp_gamma=0.01", "optimizer.clip_norm=0.1"),
        ("adversary.friendly=1",),
        ("model.name=mlp", "optimizer.sam_rho=0.05"),
    ],
    ids=["pgd", "l2", "radii", "kl", "awp", "friendly", "mlp"],
)
def test_the_attack_and_the_step_of_parts_are_those_of_the_whole(overrides):
    recipe = recipe_of(*overrides)
    found = []
    for whole in (False, True):
        parts, batch = built(recipe, whole)
        x_adv = perturb(parts, batch, 0, 5.0, recipe, Session())
        sums = adversarial_step(parts, batch, 0, 5.0, recipe, Session())
        found.append((x_adv, sums, list(parts.model.parameters())))
    (mine, my_sums, my_weights), (torchs, sums, weights) = found
    # rounding may turn the sign of a gradient that is all but 0
    assert (mine - torchs).abs().gt(1e-4).float().mean() < 1e-3
    assert sums["loss"].item() == pytest.approx(my_sums["loss"].item(), rel=1e-3)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(my_weights, weights, strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.batch_size=31",),
        ("model={name: wide_resnet, args: {depth: 10, width: 1}}",),
        ("model.name=tests.unit.training.test_loop:dropout_net",),
        ("training.precision=bf16",),
        ("objective={label_noise_ce: 1}",),
        ("objective={clean_ce: 1, input_gradient: 1}",),
        ("adversary.name=free", "adversary.num_steps=2"),
    ],
    ids=["small", "batch norm", "dropout", "bf16", "draws", "gradients", "free"],
)
def test_what_parts_would_change_is_left_whole(overrides):
    recipe = recipe_of(*overrides)
    parts = build_parts(recipe, digits_data(recipe), Session())
    assert parts.descent is None
    assert parts.attack.cores == 1


@pytest.mark.parametrize("at_once", [True, False])
def test_weights_that_are_frozen_in_between_have_no_gradient_and_the_others_their_own(at_once):
    recipe = recipe_of("model.name=mlp")  # its hidden layers are of one shape
    parts, batch = built(recipe)

    def descend() -> None:
        if at_once:
            assert attack_and_descend(parts, batch, 0, 5.0, recipe, Session()) is not None
        else:
            backward(
                parts, batch, perturb(parts, batch, 0, 5.0, recipe, Session()), 0, 5.0, recipe, Session()
            )

    descend()
    before = gradients(parts)
    parameters = list(parts.model.parameters())
    parameters[0].requires_grad_(False)
    descend()
    assert parameters[0].grad is None
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters[1:], before[1:], strict=True))


def test_hooks_of_weights_are_called_once_and_see_the_whole_gradient():
    recipe = recipe_of()
    parts, batch = built(recipe)
    adversarial_step(parts, batch, 0, 5.0, recipe, Session())
    seen = []
    next(parts.model.parameters()).register_hook(lambda gradient: seen.append(gradient.clone()))
    adversarial_step(parts, batch, 1, 5.0, recipe, Session())
    assert len(seen) == 1
    assert torch.equal(seen[0], next(parts.model.parameters()).grad)


def test_a_radius_for_each_sample_is_no_part_of_a_recorded_climb():
    recipe = recipe_of()
    parts, batch = built(recipe)
    threat = parts.threat
    drawn = parts.attack.draw(batch.x, threat, None)
    assert parts.descent.after_climb(parts.attack, batch.x, batch.y, threat, drawn, 0.01) is not None
    threat = threat.per_sample(torch.zeros(len(batch.y)))
    assert parts.descent.after_climb(parts.attack, batch.x, batch.y, threat, drawn, 0.01) is None


def gradients(parts) -> list[torch.Tensor]:
    return [p.grad.clone() for p in parts.model.parameters()]


def of_the_whole(parts, batch, x_adv, factor) -> tuple[torch.Tensor, ...]:
    """The gradients by autograd, neither recorded nor in parts."""
    loss, _ = parts.objective(batch.x, x_adv, batch.y)
    return torch.autograd.grad(loss.sum() * factor, list(parts.model.parameters()))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("adversary={name: fgsm_rs, eps: 0.1}", "objective={clean_ce: 1, trades_kl: 6}"),
        ("adversary.loss=kl", "adversary.start=gaussian"),
        ("adversary.momentum=1",),
        ("adversary={name: n_fgsm, eps: 0.1}", "model.name=mlp"),
        ("adversary={name: fgsm, eps: 0.1}", "adversary.batch_norm=train"),
    ],
    ids=["pgd", "trades", "kl", "momentum", "n_fgsm", "fgsm"],
)
def test_attack_and_descent_at_once_are_the_attack_and_then_the_descent_to_the_last_bit(overrides):
    recipe = recipe_of(*overrides)
    parts, batch = built(recipe)
    x_adv = perturb(parts, batch, 0, 5.0, recipe, Session())
    apart, expected = backward(parts, batch, x_adv, 0, 5.0, recipe, Session()), gradients(parts)
    for _ in range(2):  # recorded, and run as it is recorded
        parts.optimizer.zero_grad()
        at_once = attack_and_descend(parts, batch, 0, 5.0, recipe, Session())
        assert at_once is not None
        assert {name: value.item() for name, value in at_once.items()} == {
            name: value.item() for name, value in apart.items()
        }
        assert all(torch.equal(a, b) for a, b in zip(gradients(parts), expected, strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        ("adversary.fraction=0.5",),
        ("adversary.eps_low=0.02",),
        ("adversary.num_restarts=2",),
        ("adversary.friendly=1",),
        ("adversary.target=random",),
        ("adversary.eps_warmup_epochs=10", "training.epochs=20"),
        ("adversary.norm=l2", "adversary.eps=1"),  # its projection looks at the data
        ("adversary.norm=l1", "adversary.eps=4"),
        ("objective={clean_ce: 1}",),
    ],
    ids=["fraction", "radii", "restarts", "friendly", "target", "warm-up", "l2", "l1", "clean"],
)
def test_other_attacks_come_before_the_descent(overrides):
    recipe = recipe_of(*overrides)
    parts, batch = built(recipe)
    assert attack_and_descend(parts, batch, 0, 5.0, recipe, Session()) is None
    assert adversarial_step(parts, batch, 0, 5.0, recipe, Session())["loss"] > 0


def test_draws_made_ahead_are_those_of_their_step(monkeypatch):
    recipe = recipe_of()
    weights = []
    for foresee in (True, False):
        parts, batch = built(recipe)
        made = []
        draw = parts.attack.draw
        monkeypatch.setattr(
            parts.attack, "draw", lambda *a, m=made, d=draw: m.append(current_thread().name) or d(*a)
        )
        if not foresee:
            monkeypatch.setattr(parts.descent.ahead, "begin", lambda: None)
        few = Batch(batch.x[:600], batch.y[:600], 0, 600)
        for step, data in enumerate([batch, batch, few, batch]):
            adversarial_step(parts, data, step, 5.0, recipe, Session())
        assert ("MainThread" in made[1:2]) != foresee
        weights.append(list(parts.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_another_radius_attack_or_factor_is_another_pass():
    recipe = recipe_of("objective={clean_ce: 1, adv_ce: 1}")
    parts, batch = built(recipe)
    descent, attack, threat = parts.descent, parts.attack, parts.threat
    drawn = attack.draw(batch.x, threat, torch.Generator().manual_seed(1))

    def at_once(attack, threat, factor):
        descent.after_climb(attack, batch.x, batch.y, threat, drawn, factor)
        return gradients(parts)

    def apart(attack, threat, factor):
        x_adv = attack.climb(parts.network, batch.x, batch.y, threat, drawn)
        return of_the_whole(parts, batch, x_adv, factor)

    found = []
    for settings in (
        (attack, threat, 0.01),
        (attack.changed(num_steps=1), threat, 0.01),
        (attack, threat.scaled(0.2), 0.01),
        (attack, threat, 0.03),
    ):
        found.append(at_once(*settings))
        assert all(close(a, b) for a, b in zip(found[-1], apart(*settings), strict=True))
    # so that one for another would be seen
    assert not any(close(found[0][0], other[0]) for other in found[1:])
    ones = torch.ones_like(batch.x)
    for factor in (0.01, 0.03):
        descent(batch.x, ones, batch.y, factor)
        wanted = of_the_whole(parts, batch, ones, factor)
        assert all(close(a, b) for a, b in zip(gradients(parts), wanted, strict=True))


def drop_a_term(objective):
    objective.weights["adv_cw"] = 0.0


def widen_the_margin(objective):
    objective.config = objective.config.model_copy(update={"cw_margin": 0.0})


@pytest.mark.parametrize("change", [drop_a_term, widen_the_margin])
def test_what_changes_an_objective_is_seen(change):
    recipe = recipe_of("objective={clean_ce: 0.3, adv_cw: 0.7, cw_margin: 3.0}")
    parts, batch = built(recipe)
    descent = PartsDescent(parts.objective, 2)

    def found() -> list[torch.Tensor]:
        descent(batch.x, batch.x.flip(0), batch.y, 0.01)
        return gradients(parts)

    before = found()
    assert all(torch.equal(a, b) for a, b in zip(found(), before, strict=True))
    change(parts.objective)
    wanted = of_the_whole(parts, batch, batch.x.flip(0), 0.01)
    after = found()
    assert all(close(a, b) for a, b in zip(after, wanted, strict=True))
    assert not all(close(a, b) for a, b in zip(after, before, strict=True))


def test_batches_are_as_large_as_they_come_out_evened():
    recipe = recipe_of("training.batch_size=513")  # 1,294 samples: three of 431, too few numbers for parts
    assert build_parts(recipe, digits_data(recipe), Session()).descent is None


def test_training_in_parts_is_recorded_repeatable_and_gives_the_cores_back(tmp_path, monkeypatch):
    recipe = recipe_of("training.epochs=2")
    seen = []
    plain = TrainingLoop._look_up

    def look_up(self, last, due):
        kinds = {kind[0][0]: known for kind, known in recorded._passes[self.parts.objective].items()}
        seen.append((torch.get_num_threads(), isinstance(kinds["climb"], recorded.Recording)))
        plain(self, last, due)

    monkeypatch.setattr(TrainingLoop, "_look_up", look_up)
    models = [train_here(recipe, tmp_path / str(number))[0] for number in range(2)]
    assert set(seen) == {(1, True)}
    assert torch.get_num_threads() == 2
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("adversary={name: fgsm_rs, eps: 0.1}", "optimizer.ema_decay=0.9", "optimizer.clip_norm=0.5"),
        ("adversary.eps_warmup_epochs=1", "data.augment.flip=true"),
    ],
    ids=["plain", "averaged", "warm-up"],
)
def test_training_in_parts_that_is_stopped_and_goes_on_ends_as_if_it_never_was(
    tmp_path, monkeypatch, overrides
):
    recipe = recipe_of("training.epochs=3", "training.checkpoint_steps=1", *overrides)
    whole = train_here(recipe, tmp_path / "whole")[0]
    plain, stop_at = TrainingLoop._look_up, [3]

    def look_up(self, last, due):
        plain(self, last, due)
        assert self.parts.descent is not None
        if self.step in stop_at:
            stop_at.clear()
            raise InterruptedError

    monkeypatch.setattr(TrainingLoop, "_look_up", look_up)
    with pytest.raises(InterruptedError):
        train_here(recipe, tmp_path / "stopped")
    resumed = train_here(recipe, tmp_path / "stopped")[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
