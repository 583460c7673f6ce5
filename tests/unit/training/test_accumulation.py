"""Gradient accumulation: parts of a batch give the numbers of the whole batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from advtrain.data import AugmentConfig, Batch
from advtrain.training import Session, build_components
from advtrain.training.sharded import gradient_reduction
from advtrain.training.step import Progress, perturb
from tests.kit import digits_data, digits_recipe

PLAIN = ("model.name=mlp", "optimizer={name: sgd, lr: 0.1}", "adversary.num_steps=2", "adversary.start=none")


def train(*overrides: str, rows: int = 51):
    """Train three steps; return the weights, the averaged weights and the sums of the last step."""
    recipe = digits_recipe(*PLAIN, "training.batch_size=51", *overrides)
    data = digits_data(recipe)
    parts = build_components(recipe, data, Session())
    parts.train_mode()
    for step, batch in zip(
        range(3), data.train.train_batches(rows, 0, 0, AugmentConfig(), Session().place), strict=False
    ):
        sums = parts.train_step(parts, batch, Progress(step, step / 10))
    average = parts.average.state_dict() if parts.average is not None else {}
    return parts.model.state_dict(), average, sums


@pytest.mark.parametrize(
    "method",
    [
        ("objective={clean_ce: 1, trades_kl: 2}", "optimizer.clip_norm=0.5"),
        ("adversary.fraction=0.3", "objective.clean_ce=0.5"),
        ("objective={clean_ce: 1, input_gradient: 1, cure: 1}", "optimizer.awp_gamma=0.01"),
        ("optimizer.sam_rho=0.05", "optimizer.ema_decay=0.9"),
        ("adversary.eps_low=0.02",),
        ("adversary.friendly=1",),
        ("adversary.name=free",),
        ("adversary={name: freelb, eps: 0.1, norm: l2}", "optimizer.ema_decay=0.9"),
        ("model={name: 'tests.kit:Tokens', args: {trained: true}}", "adversary.eps=0.5"),
    ],
    ids=["trades", "fraction", "awp", "sam", "radii", "friendly", "free", "freelb", "embedding"],
)
def test_accumulated_parts_give_the_numbers_of_the_whole_batch(method):
    whole, parts = train(*method), train(*method, "training.accumulate=4")
    for one, other in zip(whole, parts, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.allclose(one[name].float(), other[name].float(), rtol=1e-5, atol=2e-6), name


@pytest.mark.parametrize(
    ("accumulate", "rows", "sizes"), [(1, 47, [47]), (4, 47, [11, 12, 12, 12]), (4, 2, [1, 1])]
)
def test_each_part_is_one_pass_with_draws_of_its_own(accumulate, rows, sizes):
    recipe = digits_recipe(*PLAIN, f"training.accumulate={accumulate}")
    data = digits_data(recipe)
    components = build_components(recipe, data, Session())
    passes, objective = [], components.ddp_objective

    def record(x, z_adv, y, threat, generator, dropout_seed):
        passes.append((len(x), dropout_seed))
        return objective(x, z_adv, y, threat, generator, dropout_seed)

    batch = next(data.train.train_batches(51, 0, 0, AugmentConfig(), Session().place))
    batch = Batch(batch.x[:rows], batch.y[:rows], 0, rows)
    components.train_step(replace(components, ddp_objective=record), batch, Progress(0, 0.0))
    assert [size for size, _ in passes] == sizes
    assert len({seed for _, seed in passes}) == len(sizes)


def test_random_starts_of_parts_differ():
    recipe = digits_recipe("adversary={num_steps: 1, eps: 0.1}", "training.accumulate=2")
    data = digits_data(recipe)
    components = build_components(recipe, data, Session())
    batch = next(data.train.train_batches(20, 0, 0, AugmentConfig(), Session().place))
    twice = Batch(batch.x[:10].repeat(2, 1, 1, 1), batch.y[:10].repeat(2), 0, 20)
    first, second = perturb(components, twice, Progress(0, 0.0)).chunk(2)
    assert not torch.allclose(first, second)


def test_every_rank_has_the_same_number_of_parts():
    components = build_components(digits_recipe("training.accumulate=4"), digits_data(), Session())
    for total in (7, 8, 11, 20):
        shares = [total * (rank + 1) // 3 - total * rank // 3 for rank in range(3)]
        for rank, share in enumerate(shares):
            batch = Batch(torch.zeros(share, 1), torch.zeros(share), 0, total)
            found = replace(components, session=Session(rank, 3)).parts(batch)
            assert len(found) == min(4, total // 3)
            assert all(rows.start < rows.stop for rows in found)


def test_gradients_add_up_without_reduction_until_the_last_part(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        wrapped = DistributedDataParallel(model)
        with gradient_reduction(wrapped, model, False):
            assert not wrapped.require_backward_grad_sync
        with gradient_reduction(wrapped, model, True):
            assert wrapped.require_backward_grad_sync
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("training.accumulate=0",), "greater than or equal to 1"),
        (("training.batch_size=8", "training.accumulate=9"), "too few samples for accumulate = 9 parts"),
        (
            ("training.batch_size=8", "training.accumulate=3", "training.num_workers=[1,3]"),
            "accumulate = 3 parts on each of 3 workers",
        ),
    ],
)
def test_recipe_rejects_parts_without_samples(overrides, message):
    with pytest.raises(Exception, match=message):
        digits_recipe(*overrides)
