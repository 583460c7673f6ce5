"""Optimizer settings, schedules against those of torch, gradient clipping and optimizer state."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from advtrain.errors import UserError
from advtrain.optim import (
    OPTIMIZERS,
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    lr_factor,
    optimizer_tensors,
)
from advtrain.recipe.optimizer import OPTIMIZER_OPTIONS


def config(**values):
    return OptimizerConfig.model_validate({"name": "sgd", "lr": 0.1} | values)


SET = {
    "weight_decay": 0.03,
    "momentum": 0.7,
    "dampening": 0.2,
    "beta1": 0.8,
    "beta2": 0.95,
    "eps": 1e-5,
    "amsgrad": True,
    "alpha": 0.6,
    "centered": True,
    "lr_decay": 0.04,
    "initial_accumulator_value": 0.05,
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_settings_reach_torch_optim(name):
    values = {key: SET[key] for key in OPTIMIZER_OPTIONS[name] if key in SET}
    if name == "nesterov":
        values.pop("dampening")
    optimizer = build_optimizer(config(name=name, lr=0.02, **values), nn.Linear(2, 2))
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.02
    if "beta1" in values:
        assert group["betas"] == (values.pop("beta1"), values.pop("beta2"))
    for key, value in values.items():
        assert group[key] == value, key
    if name == "nesterov":
        assert group["nesterov"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
    ],
)
def test_optimizer_step_equals_torch_step_with_defaults(name, plain):
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        build_optimizer(config(name=name, lr=0.05), ours),
        plain(theirs.parameters(), lr=0.05),
    ]
    for _ in range(5):
        x = torch.rand(4, 3)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def torch_factors(make, steps):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler, factors = make(optimizer), []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("values", "make"),
    [
        ({"kind": "constant"}, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
        (
            {"kind": "multistep", "milestones": [3, 7], "gamma": 0.2},
            lambda o: lr_scheduler.MultiStepLR(o, [30, 70], 0.2),
        ),
        (
            {"kind": "cosine", "final_fraction": 0.1},
            lambda o: lr_scheduler.CosineAnnealingLR(o, 100, eta_min=0.1),
        ),
    ],
    ids=str,
)
def test_schedule_matches_torch_scheduler(values, make):
    ours = [lr_factor(ScheduleConfig.model_validate(values), step / 10, 10) for step in range(100)]
    assert ours == pytest.approx(torch_factors(make, 100), abs=1e-9)


def test_one_cycle_is_the_triangle_of_wong_et_al():
    """Oracle: numpy.interp through (0, 0), (2/5 of the run, 1) and (end of the run, 0), as in their code."""
    import numpy as np

    schedule = ScheduleConfig(kind="one_cycle")
    ours = [lr_factor(schedule, e, 15) for e in np.linspace(0, 15, 61)]
    assert ours == pytest.approx(np.interp(np.linspace(0, 15, 61), [0, 6, 15], [0, 1, 0]))


def test_lr_warm_up_is_linear_before_schedule():
    schedule = ScheduleConfig(kind="cosine", warmup_epochs=2.0)
    assert [lr_factor(schedule, e, 10) for e in (0, 1, 2)] == [0, 0.5, 1]
    assert lr_factor(schedule, 10, 10) == pytest.approx(0)


def with_gradient(*values):
    parameters = [nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(parameters, values, strict=True):
        p.grad = torch.tensor(v)
    return parameters


def test_clip_norm_scales_gradient_and_reports_clipping():
    parameters = with_gradient([3.0, 0.0], [4.0])
    norm, clipped = clip_gradients(config(clip_norm=1.0), parameters)
    assert norm == 5
    assert clipped
    assert torch.allclose(torch.cat([p.grad for p in parameters]), torch.tensor([0.6, 0.0, 0.8]), atol=1e-5)
    assert not clip_gradients(config(clip_norm=1.1), parameters)[1]


def test_clip_value_bounds_each_entry():
    parameters = with_gradient([3.0, -0.2], [-4.0])
    norm, clipped = clip_gradients(config(clip_value=0.5), parameters)
    assert norm == pytest.approx((9 + 0.04 + 16) ** 0.5)
    assert clipped
    assert torch.equal(torch.cat([p.grad for p in parameters]), torch.tensor([0.5, -0.2, -0.5]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_norm_is_non_finite_when_gradient_is(bad):
    norm, _ = clip_gradients(config(), with_gradient([1.0, bad]))
    assert not torch.isfinite(norm)


def test_norms_and_biases_skip_weight_decay_when_configured():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)
    )
    (everything,) = build_optimizer(config(weight_decay=0.1), model).param_groups
    assert len(everything["params"]) == len(list(model.parameters()))
    decayed, spared = build_optimizer(config(weight_decay=0.1, decay_all=False), model).param_groups
    assert [p is q for p, q in zip(decayed["params"], (model[0].weight, model[4].weight), strict=True)] == [
        True
    ] * 2
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ema_decay": 0.9, "swa_start_epoch": 1}, "exclude each other"),
        ({"sam_rho": 0.1, "awp_gamma": 0.1}, "exclude each other"),
        ({"awp_warmup_epochs": 2}, "belongs to awp_gamma"),
        ({"decay_all": False}, "without weight_decay"),
    ],
)
def test_optimizer_config_rejects_unused_or_conflicting_settings(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_state_round_trips_through_named_tensors(name):
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    values = {"momentum": 0.5} if name == "sgd" else {}
    ours = build_optimizer(config(name=name, **values), model)

    def step(m, o, seed):
        o.zero_grad()
        m(torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        o.step()

    for seed in range(3):
        step(model, ours, seed)
    twin.load_state_dict(model.state_dict())
    theirs = build_optimizer(config(name=name, **values), twin)
    load_optimizer_tensors(theirs, {k: v.clone() for k, v in optimizer_tensors(ours).items()})
    for seed in range(3, 6):
        step(model, ours, seed)
        step(twin, theirs, seed)
    assert torch.equal(model.weight, twin.weight)


def test_optimizer_state_of_earlier_versions_is_converted():
    """Earlier versions stored the moments of a hidden layer as (units, H W, channels)."""
    layer = nn.Linear(6, 2)
    optimizer = build_optimizer(config(name="adam"), layer)
    layer(torch.rand(4, 6)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer)
    earlier = tensors["0.exp_avg"].unflatten(1, (3, 2)).transpose(1, 2).contiguous()
    load_optimizer_tensors(optimizer, tensors | {"0.exp_avg": earlier})
    assert torch.equal(optimizer_tensors(optimizer)["0.exp_avg"], tensors["0.exp_avg"])


def test_optimizer_state_with_wrong_shape_is_rejected():
    """Fused kernels read parameter and state by memory order and do not compare their shapes."""
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(config(name="adam"), model)
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer)
    tensors["0.exp_avg"] = tensors["0.exp_avg"].view(3, 2)
    with pytest.raises(
        UserError, match=r"'0\.exp_avg' has shape \(3, 2\), but its parameter has shape \(2, 3\)"
    ):
        load_optimizer_tensors(optimizer, tensors)
