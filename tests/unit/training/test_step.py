"""The training step: exact averaging over workers, limits of methods, attacked fraction, precision."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from advtrain.data import AugmentConfig, Batch, Place
from advtrain.recipe import Recipe
from advtrain.training import Session, build_components
from advtrain.training.step import Progress, perturb
from tests.kit import digits_data, digits_recipe


def steps(recipe: Recipe, session: Session, count: int = 3, batch_size: int = 50):
    """Train a few steps; return weights, last gradients, and the sums of the last step."""
    data = digits_data(recipe)
    parts = build_components(recipe, data, session)
    parts.ddp_objective.train()
    sums = {}
    batches = data.train.train_batches(batch_size, recipe.seed, 0, AugmentConfig(), session.place)
    for step, batch in zip(range(count), batches, strict=False):
        sums = parts.train_step(parts, batch, Progress(step, step / 10))
    weights = {k: v.clone() for k, v in parts.model.state_dict().items()}
    gradients = {k: p.grad.clone() for k, p in parts.model.named_parameters()}
    return weights, gradients, session.sum(sums)


def count(recipe: Recipe) -> int:
    """Return the number of steps to compare: one for free training, whose perturbations are per worker."""
    return 1 if recipe.adversary.name == "free" else 3


def _rank(rank: int, world: int, port: int, recipe_values: dict, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    recipe = Recipe.model_validate(recipe_values)
    torch.save(steps(recipe, Session(rank, world), count(recipe), 51), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "overrides",
    [
        ("adversary.name=fgsm", "adversary.num_steps=1", "optimizer.clip_norm=0.5"),
        (
            "adversary.name=fgsm",
            "adversary.num_steps=1",
            "adversary.fraction=0.3",
            "objective.clean_ce=0.5",
            "objective.trades_kl=2",
            "training.accumulate=3",
        ),
        (
            "objective={clean_ce: 1, input_gradient: 1, llr_gap: 2, llr_slope: 1}",
            "adversary.name=fgsm",
            "adversary.num_steps=1",
            "optimizer.awp_gamma=0.01",
        ),
        ("adversary.name=free", "adversary.num_steps=2"),
        (
            "adversary={name: freelb, eps: 0.1, num_steps: 3, start: none, fraction: 0.6}",
            "objective.clean_ce=0.5",
            "training.accumulate=2",
        ),
    ],
    ids=["fgsm", "mixed, in parts", "second derivatives", "free", "freelb, in parts"],
)
def test_two_workers_give_gradients_of_one_worker_for_same_global_batch(overrides, tmp_path, free_port):
    """51 rows over 2 workers give shares of different size, so a mean of means would be wrong."""
    recipe = digits_recipe("optimizer.name=sgd", "optimizer.lr=0.1", *overrides)
    mp.spawn(
        _rank, (2, free_port, recipe.model_dump(mode="json", exclude_none=True), str(tmp_path)), nprocs=2
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    weights, gradients, sums = steps(recipe, Session(), count(recipe), 51)
    for name, gradient in gradients.items():
        assert torch.equal(ranks[0][1][name], ranks[1][1][name])
        assert torch.allclose(ranks[0][1][name], gradient, atol=1e-6), name
        assert torch.allclose(ranks[0][0][name], weights[name], atol=1e-6), name
    assert ranks[0][2] == pytest.approx(sums, rel=1e-4, abs=1e-5)


@pytest.fixture
def free_port() -> int:
    """Return a free loopback port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[k], other[k]) for k in one)


def test_trades_at_weight_zero_is_standard_training():
    trades = steps(digits_recipe("objective={clean_ce: 1, trades_kl: 0}"), Session())
    standard = steps(digits_recipe("objective={clean_ce: 1}", "adversary.fraction=0"), Session())
    assert same(trades[0], standard[0])


def test_madry_at_fraction_or_radius_zero_is_standard_training():
    standard = steps(digits_recipe("objective={clean_ce: 1}"), Session())[0]
    assert same(steps(digits_recipe("adversary.fraction=0"), Session())[0], standard)
    assert same(steps(digits_recipe("adversary.eps=0"), Session())[0], standard)


def test_training_is_deterministic_and_follows_the_seed():
    recipe = digits_recipe("model.name=mlp")
    assert same(steps(recipe, Session())[0], steps(recipe, Session())[0])
    assert not same(
        steps(recipe, Session())[0], steps(digits_recipe("model.name=mlp", "seed=1"), Session())[0]
    )


@pytest.mark.parametrize(("fraction", "expected"), [(0.25, 10), (0.5, 20), (0.9, 36), (1.0, 40)])
@pytest.mark.parametrize("world", [1, 3])
def test_attacked_fraction_applies_to_global_batch_for_any_world_size(fraction, expected, world):
    recipe = digits_recipe(f"adversary.fraction={fraction}")
    data = digits_data(recipe)
    attacked = 0
    for rank in range(world):
        session = Session(rank, world)
        parts = replace(build_components(recipe, data, Session()), session=session)
        batch = next(data.train.train_batches(40, 0, 0, AugmentConfig(), Place(rank, world)))
        batch = Batch(batch.x, batch.y, batch.offset, batch.total)
        x_adv = perturb(parts, batch, Progress(0, 0.0))
        attacked += int((x_adv != batch.x).flatten(1).any(1).sum())
    size = next(data.train.train_batches(40, 0, 0, AugmentConfig(), Place())).total
    assert attacked == int(size * fraction)
    assert abs(attacked - expected) <= 1


def test_epsilon_and_step_size_warm_up_linearly():
    recipe = digits_recipe(
        "adversary.eps_warmup_epochs=1", "adversary.step_size=0.1", "adversary.num_steps=10"
    )
    data = digits_data(recipe)
    parts = build_components(recipe, data, Session())
    batch = next(data.train.train_batches(40, 0, 0, AugmentConfig(), Place()))
    assert perturb(parts, batch, Progress(0, 0.0)) is None
    for epoch, eps in ((0.25, 0.025), (0.5, 0.05), (1.0, 0.1), (1.5, 0.1)):
        x_adv = perturb(parts, batch, Progress(0, epoch))
        assert float((x_adv - batch.x).abs().max()) == pytest.approx(eps, abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "scales"),
    [
        ((), {0: 1.0, 5: 1.0}),
        (("adversary.eps_warmup_epochs=4",), {0: 0.0, 1: 0.25, 4: 1.0, 5: 1.0}),
        (("adversary.eps_delay_epochs=2",), {0: 0.0, 1.9: 0.0, 2: 1.0}),
        (
            ("adversary.eps_delay_epochs=1", "adversary.eps_warmup_epochs=2"),
            {0.9: 0, 1: 0, 2: 0.5, 3: 1, 4: 1},
        ),
        (
            ("adversary.eps_warmup_epochs=4", "adversary.eps_schedule=cosine"),
            {0: 0.0, 1: 0.146447, 2: 0.5, 3: 0.853553, 4: 1.0, 9: 1.0},
        ),
    ],
)
def test_eps_scale_is_zero_in_the_delay_and_then_rises(overrides, scales):
    config = build_components(
        digits_recipe("training.epochs=10", *overrides), digits_data(), Session()
    ).config
    assert {epoch: config.eps_scale(epoch) for epoch in scales} == pytest.approx(scales, abs=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        ("objective={adv_ce: 1}",),
        ("objective={clean_ce: 1, trades_kl: 6, llr_gap: 2, llr_slope: 1, cure: 1, grad_align: 0.2}",),
        ("objective={mart_bce: 1, mart_kl: 5, alp: 0.5}",),
        ("adversary.name=free", "adversary.num_steps=2"),
    ],
)
def test_delay_trains_on_clean_inputs(method):
    """At radius 0 an attack makes no difference, and no term has a gradient that is not finite."""
    recipe = (*method, "training.epochs=4")
    delayed = steps(digits_recipe(*recipe, "adversary.eps_delay_epochs=3"), Session())[0]
    clean = steps(digits_recipe(*recipe, "adversary.eps=0", "adversary.step_size=0.01"), Session())[0]
    assert all(torch.isfinite(value).all() for value in delayed.values())
    assert all(torch.allclose(delayed[name], clean[name], atol=1e-6) for name in clean)


def test_bf16_keeps_losses_and_perturbations_in_fp32():
    recipe = digits_recipe("training.precision=bf16")
    data = digits_data(recipe)
    parts = build_components(recipe, data, Session())
    batch = next(data.train.train_batches(40, 0, 0, AugmentConfig(), Place()))
    x_adv = perturb(parts, batch, Progress(0, 1.0))
    assert x_adv.dtype == torch.float32
    loss, _ = parts.ddp_objective(batch.x, x_adv, batch.y)
    assert loss.dtype == torch.float32
    full = build_components(digits_recipe(), data, Session())
    exact, _ = full.ddp_objective(batch.x, x_adv, batch.y)
    assert torch.allclose(loss, exact, atol=0.02)
    assert not torch.equal(loss, exact)


def test_batch_norm_networks_train_in_bf16_and_channels_last():
    recipe = digits_recipe(
        "model={name: wide_resnet, args: {depth: 10, width: 1, activation: silu}}",
        "training.precision=bf16",
        "adversary.num_steps=2",
        "optimizer.ema_decay=0.9",
    )
    weights, _, sums = steps(recipe, Session(), count=2)
    assert all(torch.isfinite(v).all() for v in weights.values())
    assert sums["steps"] == 1


TOKENS = "model={name: 'tests.kit:Tokens', args: {trained: true}}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "terms"),
    [("model.name=mlp", "adv_ce: 1"), ("model.name=mlp", "adv_ce: 1, cure: 1"), (TOKENS, "adv_ce: 1")],
    ids=["plain", "second derivative", "embedding"],
)
def test_compiled_network_trains_like_eager_network(model, terms):
    """CURE differentiates a gradient, so its passes run eagerly. The other passes are compiled."""
    recipe = (model, f"objective={{{terms}}}")
    plain = steps(digits_recipe(*recipe), Session(), count=2)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = steps(digits_recipe(*recipe, "training.compile=true"), Session(), count=2)
    frames = torch._dynamo.utils.counters["frames"]
    # attack and training, recompiled for a batch with one row less
    assert 0 < frames["ok"] == frames["total"] <= 4
    assert plain[0].keys() == compiled[0].keys()
    assert all(torch.allclose(plain[0][k], compiled[0][k], atol=1e-4) for k in plain[0])
