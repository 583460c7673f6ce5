"""Training steps of special methods against short implementations of their papers' algorithms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from advtrain.data import AugmentConfig, Place
from advtrain.errors import UserError
from advtrain.training import Session, build_components
from advtrain.training.step import Progress, perturb
from tests.kit import digits_data, digits_recipe, train_here

PLAIN = ("model.name=mlp", "optimizer={name: sgd, lr: 0.1}", "training.batch_size=40")


def batches(data, count=3):
    return list(zip(range(count), data.train.train_batches(40, 0, 0, AugmentConfig(), Place()), strict=False))


def start(*overrides):
    """Return recipe, components, and the batches of the first three steps."""
    recipe = digits_recipe(*PLAIN, *overrides)
    data = digits_data(recipe)
    parts = build_components(recipe, data, Session())
    parts.ddp_objective.train()
    return recipe, parts, batches(data)


def run(*overrides):
    recipe, parts, steps = start(*overrides)
    for step, batch in steps:
        parts.train_step(parts, batch, Progress(step, step / 10))
    return parts


def same(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("replays", [1, 3])
def test_free_training_is_algorithm_1_of_shafahi_et_al(replays):
    ours = run("adversary.name=free", f"adversary.num_steps={replays}")
    _, parts, steps = start()
    delta = torch.zeros(40, 1, 8, 8)
    for _, batch in steps:
        d = delta[: len(batch.y)]
        for _ in range(replays):
            z = (batch.x + d).clamp(0, 1).requires_grad_()
            loss = F.cross_entropy(parts.network(z), batch.y)
            gradients = torch.autograd.grad(loss, [*parts.model.parameters(), z])
            with torch.no_grad():
                for p, g in zip(parts.model.parameters(), gradients, strict=False):
                    p.sub_(0.1 * g)
                moved = (z - batch.x + 0.1 * gradients[-1].sign()).clamp(-0.1, 0.1)
                d.copy_((batch.x + moved).clamp(0, 1) - batch.x)
    assert same(ours.model, parts.model)
    assert torch.allclose(ours.replayed, delta, atol=1e-6)


def test_free_training_with_one_replay_is_one_step_training():
    """One pass per batch updates the weights at the perturbed batch and the perturbation as FGSM does."""
    recipe, parts, steps = start("adversary.name=free", "adversary.num_steps=1")
    fgsm, plain, _ = start("adversary={name: fgsm, eps: 0.1}")
    (_, batch), *_ = steps
    attacked = perturb(plain, batch, Progress(0, 0.0))
    parts.train_step(parts, batch, Progress(0, 0.0))
    assert torch.allclose(parts.replayed[: len(batch.y)], attacked - batch.x, atol=1e-6)
    standard, standard_parts, _ = start("objective={clean_ce: 1}")
    standard_parts.train_step(standard_parts, batch, Progress(0, 0.0))
    assert same(parts.model, standard_parts.model)  # the first batch starts without a perturbation


@pytest.mark.parametrize("kind", ["sam_rho", "awp_gamma"])
def test_sam_and_awp_apply_gradient_of_perturbed_weights_to_original_ones(kind):
    ours = run("adversary.name=fgsm", "adversary.num_steps=1", f"optimizer.{kind}=0.05")
    recipe, parts, steps = start("adversary.name=fgsm", "adversary.num_steps=1")
    for step, batch in steps:
        x_adv = perturb(parts, batch, Progress(step, 0.0))
        weights = list(parts.model.parameters())

        def gradients(weights=weights, x_adv=x_adv, batch=batch, network=parts.network):
            return torch.autograd.grad(F.cross_entropy(network(x_adv), batch.y), weights)

        first, before = gradients(), [w.detach().clone() for w in weights]
        length = torch.cat([g.flatten() for g in first]).norm()
        with torch.no_grad():
            for w, g in zip(weights, first, strict=True):
                if kind == "sam_rho":
                    w.add_(0.05 * g / length)
                elif w.dim() > 1:
                    w.add_(0.05 * w.norm() * g / g.norm())
        second = gradients()
        with torch.no_grad():
            for w, old, g in zip(weights, before, second, strict=True):
                w.copy_(old - 0.1 * g)
    assert same(ours.model, parts.model)


def test_awp_starts_after_warm_up():
    """The steps of `run` are in the first 0.3 epochs."""
    plain = run()
    assert same(run("optimizer.awp_gamma=0.05", "optimizer.awp_warmup_epochs=0.5").model, plain.model)
    assert not same(run("optimizer.awp_gamma=0.05", "optimizer.awp_warmup_epochs=0.1").model, plain.model)


@pytest.mark.parametrize(("kind", "kept"), [("sam_rho", "first"), ("awp_gamma", "second")])
def test_batch_norm_statistics_come_from_pass_used_by_published_code(kind, kept):
    """SAM uses the pass at the original weights, AWP the pass at the perturbed ones."""
    net = (
        "model={name: wide_resnet, args: {depth: 10, width: 1}}",
        "adversary.fraction=0",
        f"optimizer.{kind}=0.5",
    )
    recipe, parts, ((_, batch), *_) = start(*net)
    other = build_components(recipe, digits_data(recipe), Session())
    norm = lambda p: next(b for n, b in p.model.named_buffers() if n.endswith("running_mean"))  # noqa: E731
    other.network.train()(batch.x)
    at_the_old_weights = norm(other).clone()
    parts.train_step(parts, batch, Progress(0, 0.0))
    assert torch.allclose(norm(parts), at_the_old_weights, atol=1e-6) == (kept == "first")


def test_fraction_below_one_sample_per_batch_attacks_expected_share():
    recipe, parts, _ = start("adversary.fraction=0.01")
    data = digits_data(recipe)
    attacked = 0
    for step, batch in batches(data, 32):
        x_adv = perturb(parts, batch, Progress(step, 0.0))
        attacked += int((x_adv != batch.x).flatten(1).any(1).sum())
    assert abs(attacked - 0.01 * sum(len(b.y) for _, b in batches(data, 32))) <= 1
    assert attacked > 5


def test_passes_of_one_step_use_same_dropout_masks():
    """With different masks, a distance between clean and adversarial outputs would measure dropout."""
    recipe, parts, ((_, batch), *_) = start(
        "objective={clean_ce: 1, trades_kl: 6, alp: 1}",
        "model.name=tests.unit.training.test_loop:dropout_net",
    )
    _, sums = parts.ddp_objective(batch.x, batch.x.clone(), batch.y, parts.config.adversary.threat, None, 5)
    assert float(sums["alp"]) == 0
    _, apart = parts.ddp_objective(
        batch.x, batch.x.clone(), batch.y, parts.config.adversary.threat, None, None
    )
    assert float(apart["alp"]) > 0
    assert recipe.objective.alp == 1


def test_perturbed_weights_pass_does_not_update_batch_norm_again():
    """Only the pass at the unperturbed weights updates the running statistics."""
    plain, moved = (
        run("model={name: wide_resnet, args: {depth: 10, width: 1}}", "adversary.fraction=0", *extra)
        for extra in ((), ("optimizer.sam_rho=0.1",))
    )
    counts = [{int(b) for n, b in p.model.named_buffers() if n.endswith("tracked")} for p in (plain, moved)]
    assert counts == [{3}, {3}]


def test_each_sample_draws_its_radius_between_eps_low_and_eps():
    recipe, parts, ((_, batch), *_) = start("adversary.eps_low=0.05", "adversary.num_steps=20")
    distance = (perturb(parts, batch, Progress(0, 0.0)) - batch.x).flatten(1).abs().amax(1)
    assert distance.min() >= 0.05 - 1e-6
    assert distance.max() <= 0.1 + 1e-6
    assert distance.std() > 0.01
    everyone, full, _ = start("adversary.start=none", "adversary.eps_low=0.1")
    constant, parts, _ = start("adversary.start=none")
    ours = perturb(full, batch, Progress(0, 0.0))
    assert torch.allclose(ours, perturb(parts, batch, Progress(0, 0.0)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adversary.name=free", "adversary.fraction=0.5"], "leave out fraction"),
        (["adversary.name=free", "optimizer.sam_rho=0.1"], "one pass"),
        (["adversary.name=free", "objective={clean_ce: 1}"], "every adversarial term used has zero gradient"),
        (["adversary.eps_low=0.2"], "above eps"),
        (["evaluation.attack={name: n_fgsm}"], "not for evaluation"),
        (["evaluation.validation.friendly=1"], "not for evaluation"),
        (["objective={adv_mse: 1}"], "does not suit a regression"),
        (["adversary.loss=mae"], "does not suit a classification"),
        (
            ["adversary.name=free", "objective={clean_ce: 1, trades_kl: 6}"],
            "every adversarial term used has zero gradient",
        ),
        (["adversary.name=free", "adversary.batch_norm=train"], "must stay eval"),
        (["adversary.friendly=1", "adversary.batch_norm=train"], "must stay eval"),
        (["evaluation.threat.eps=-0.1"], "greater than or equal to 0"),
    ],
)
def test_recipe_rejects_incompatible_methods(overrides, message):
    with pytest.raises(Exception, match=message):
        digits_recipe(*overrides)


def test_hat_teacher_is_best_model_of_named_run(tmp_path):
    standard = digits_recipe(*PLAIN, "objective={clean_ce: 1}", "training.epochs=1")
    model, taught = train_here(standard, tmp_path)
    overrides = [*PLAIN, f"objective={{clean_ce: 1, hat: 0.5, teacher: {taught.path}}}"]
    recipe = digits_recipe(*overrides)
    parts = build_components(recipe, digits_data(recipe), Session())
    teacher = parts.objective.teacher.network
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(teacher(x), model(x))
    assert all(not p.requires_grad for p in teacher.parameters())
    names = {name for name, _ in parts.objective.named_parameters()}
    assert len(names) == len(list(parts.model.parameters()))  # the teacher is not trained
    other_split = digits_recipe(*overrides, "data.split_seed=1")
    with pytest.raises(UserError, match="other data or another split"):
        build_components(other_split, digits_data(other_split), Session())
    nobody = digits_recipe(*PLAIN, "objective={clean_ce: 1, hat: 0.5, teacher: nowhere}")
    with pytest.raises(UserError, match="no run 'nowhere'"):
        build_components(nobody, digits_data(nobody), Session())
