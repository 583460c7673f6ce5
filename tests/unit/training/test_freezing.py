"""Frozen blocks, learning rates per block, and unfreezing (LP-FT)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from advtrain.attacks import attack_mode
from advtrain.data import AugmentConfig, Dataset, Place
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.blocks import block_parameters
from advtrain.optim import OPTIMIZERS, OptimizerConfig, build_optimizer
from advtrain.recipe.model import ModelConfig
from advtrain.runs.checkpoint import load_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.training import Session, build_components, run_worker
from advtrain.training.contract import check_contract
from advtrain.training.step import Progress
from tests.kit import Linear, digits_data, digits_recipe
from tests.unit.training.test_loop import equal, last_weights, stop_at

#: Two blocks of a convolution and batch norm, and a head: modules 0, 3 and 7.
NET = "model={name: 'tests.unit.training.test_freezing:small_net', freeze: backbone}"
#: Three steps an epoch, see `few`.
FEW = (
    NET,
    "adversary.num_steps=1",
    "training.batch_size=20",
    "training.epochs=3",
    "evaluation.validation.num_steps=1",
)


def small_net(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.SiLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.SiLU()),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )


@cache
def few() -> Dataset:
    """Return the digits with 60 samples to train on and 20 to validate on."""
    data = digits_data()
    return replace(data, train=data.train.take(np.arange(60)), validation=data.validation.take(np.arange(20)))


def train(tmp_path, recipe, name="runs") -> RunFolder:
    run = folder(tmp_path, recipe, name)
    assert run_worker(recipe, few(), run, Session()).status == "finished"
    return run


def folder(tmp_path, recipe, name="runs") -> RunFolder:
    return RunFolder.create(
        tmp_path / name, recipe.name, recipe.digest(), recipe.to_yaml(), {"status": "running"}
    )


def components_of(*overrides: str):
    recipe = digits_recipe(*overrides)
    return build_components(recipe, few(), Session())


def steps(components, count: int = 2) -> None:
    components.train_mode()
    batches = few().train.train_batches(20, 0, 0, AugmentConfig(), Place())
    for step, batch in zip(range(count), batches, strict=False):
        components.train_step(components, batch, Progress(step, step / 10))


def changed(state, before) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(state[name], tensor)}


HEAD = {"network.7.weight", "network.7.bias"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_tensors_never_change_and_have_no_state(tmp_path, name):
    """Three epochs with a frozen backbone: weights and batch norm statistics."""
    recipe = digits_recipe(*FEW, f"optimizer={{name: {name}, lr: 0.01, weight_decay: 0.1}}")
    before = build_components(recipe, few(), Session()).model.state_dict()
    saved = last_weights(train(tmp_path, recipe))
    assert saved.step == 9
    assert changed(saved.model, before) == HEAD
    assert {key.partition(".")[0] for key in saved.optimizer} <= {"0", "1"}


@pytest.mark.parametrize(
    "extra",
    [
        ("optimizer.swa_start_epoch=0",),
        ("optimizer.ema_decay=0.5",),
        ("optimizer.sam_rho=0.05",),
        ("optimizer.awp_gamma=0.05",),
        ("adversary.name=free",),
        ("adversary.batch_norm=train",),
        ("optimizer.weight_decay=0.1", "optimizer.decay_all=false"),
    ],
)
def test_methods_change_every_tensor_of_trained_blocks_only(tmp_path, extra):
    recipe = digits_recipe(*FEW, "model.freeze=['0']", *extra)
    before = build_components(recipe, few(), Session()).model.state_dict()
    saved = last_weights(train(tmp_path, recipe))
    trained = {name for name in before if not name.startswith(("network.0.", "network.1."))}
    assert changed(saved.model, before) == trained
    if saved.average is not None:
        average = {name: saved.average[f"module.{name}"] for name in before}
        assert changed(average, before) == trained


@pytest.mark.parametrize("kind", ["sam_rho", "awp_gamma"])
def test_weight_perturbation_leaves_frozen_tensors_alone(kind, monkeypatch):
    components = components_of(NET, "adversary.num_steps=1", f"optimizer.{kind}=0.05")
    before, seen = copy.deepcopy(components.model.state_dict()), []
    objective = components.ddp_objective.forward

    def forward(*args):
        seen.append(changed(components.model.state_dict(), before))
        return objective(*args)

    monkeypatch.setattr(components.ddp_objective, "forward", forward)
    steps(components, 1)
    assert seen == [set(), {"network.7.weight"} if kind == "awp_gamma" else HEAD]


def test_attack_with_batch_statistics_leaves_frozen_batch_norm_in_evaluation_mode():
    components = components_of(NET, "model.freeze=['0']")
    components.train_mode()
    network = components.model.network
    with attack_mode(components.network, "train"):
        assert (network[1].training, network[4].training) == (False, True)
    assert (network[1].training, network[4].training) == (False, True)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("objective", ["{adv_ce: 1}", "{clean_ce: 1, trades_kl: 6}"])
def test_loss_of_a_linear_probe_is_not_differentiated_in_the_backbone(objective):
    """The attack's passes go back to the input; the pass for the weights ends at the head."""
    components = components_of(NET, f"objective={objective}", "adversary.num_steps=2")
    passes = {"0": 0, "7": 0}
    for name in passes:
        module = components.model.network.get_submodule(name)
        module.register_full_backward_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))
    steps(components, 1)
    used = 1 if "adv_ce" in objective else 2  # the clean and the adversarial outputs
    assert passes == {"0": 2, "7": 2 + used}
    assert all(p.grad is None for p in components.model.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mlp", {}),
        ("cnn2", {}),
        ("cnn4", {}),
        ("wide_resnet", {"depth": 10, "width": 1}),
        ("preact_resnet18", {}),
    ],
)
def test_layer_decay_is_the_hand_calculation(name, args):
    """Of n blocks, block k has lr decay^(n - k), and the head its own rate."""
    model = build_model(ModelConfig(name=name, args=args), (1, 28, 28), 10)
    owned = block_parameters(model)
    config = OptimizerConfig(
        name="adamw", lr=0.1, layer_decay=0.5, head_lr=0.3, weight_decay=0.1, decay_all=False
    )
    optimizer = build_optimizer(config, model, owned)
    parameters = dict(model.named_parameters())
    expected = {
        parameters[parameter]: 0.3 if k == len(owned) else 0.1 * 0.5 ** (len(owned) - k)
        for k, names in enumerate(owned.values(), 1)
        for parameter in names
    }
    groups = optimizer.param_groups
    assert {p: group["lr"] for group in groups for p in group["params"]} == pytest.approx(expected)
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {p for p in model.parameters() if p.dim() > 1}


def test_schedule_multiplies_the_learning_rate_of_every_block():
    schedule = "schedule: {kind: multistep, milestones: [0.05], gamma: 0.1}"
    components = components_of(
        f"optimizer={{name: adam, lr: 0.1, layer_decay: 0.5, head_lr: 0.3, {schedule}}}"
    )
    steps(components, 1)
    assert [group["lr"] for group in components.optimizer.param_groups] == [
        0.1 * 0.5**3,
        0.1 * 0.5**2,
        0.05,
        0.3,
    ]
    steps(components, 2)  # the second step is after the milestone
    assert [group["lr"] for group in components.optimizer.param_groups] == pytest.approx(
        [0.01 * 0.5**3, 0.01 * 0.5**2, 0.005, 0.03]
    )


def test_layer_decay_of_one_block_to_the_next_scales_the_update():
    """One step of SGD moves each weight by its rate times the gradient."""
    moves = []
    for extra in ("", ", layer_decay: 0.5, head_lr: 0.2"):
        components = components_of("model.name=mlp", f"optimizer={{name: sgd, lr: 0.1{extra}}}")
        before = [p.detach().clone() for p in components.model.parameters()]
        steps(components, 1)
        moves.append([p - old for p, old in zip(components.model.parameters(), before, strict=True)])
    for factor, plain, ours in zip([0.25, 0.25, 0.5, 0.5, 2, 2], *moves, strict=True):
        assert torch.allclose(ours, factor * plain, atol=1e-6)


def test_layer_decay_with_frozen_blocks_counts_all_blocks():
    components = components_of(NET, "model.freeze=['0']", "optimizer={name: adam, lr: 0.1, layer_decay: 0.5}")
    rates = [group["lr"] for group in components.optimizer.param_groups]
    assert rates == pytest.approx([0.05, 0.1])


LP_FT = (*FEW, "model.unfreeze_epoch=1")


@pytest.mark.parametrize(
    ("extra", "stops"),
    [
        (("optimizer={name: adam, lr: 0.01}",), (2, 3, 5)),
        (("optimizer={name: momentum, lr: 0.01, layer_decay: 0.7, head_lr: 0.05, ema_decay: 0.5}",), (3, 4)),
        (("optimizer={name: adam, lr: 0.01, swa_start_epoch: 0, sam_rho: 0.05}",), (3,)),
        (("adversary.name=free", "adversary.num_steps=2"), (3,)),
    ],
    ids=["adam", "layer_decay and ema", "swa and sam", "free"],
)
def test_lp_ft_resumes_bit_for_bit(tmp_path, monkeypatch, extra, stops):
    """Stopped before, at and after the end of the first epoch of three steps, which unfreezes the backbone."""
    monkeypatch.setattr("advtrain.training.loop.CHECK_STEPS", 1)
    recipe = digits_recipe(*LP_FT, *extra)
    whole = last_weights(train(tmp_path, recipe))
    for stop in stops:
        run = folder(tmp_path, recipe, str(stop))
        assert stop_at(recipe, run, stop, few()).status == "stopped"
        assert last_weights(run).step == stop
        assert run_worker(recipe, few(), run, Session()).status == "finished"
        resumed = last_weights(run)
        assert equal(resumed, whole)
        assert (resumed.average is None) == (whole.average is None)
        assert all(torch.equal(v, whole.average[k]) for k, v in (resumed.average or {}).items())


def test_unfreezing_trains_all_blocks_with_a_new_optimizer_state(tmp_path):
    recipe = digits_recipe(
        *LP_FT, "optimizer={name: adam, lr: 0.01, ema_decay: 0.5}", "training.keep_checkpoints=9"
    )
    before = build_components(recipe, few(), Session()).model.state_dict()
    first, second, _ = map(load_checkpoint, sorted(train(tmp_path, recipe).checkpoints.glob("step-*")))
    assert changed(first.model, before) == HEAD
    assert changed(second.model, before) == set(before)
    assert [len(state.optimizer) for state in (first, second)] == [3 * 2, 3 * 10]
    assert float(second.optimizer["9.step"]) == 3
    assert [int(state.average["n_averaged"]) for state in (first, second)] == [3, 6]


def test_averages_across_the_unfreezing_are_those_of_the_weights(tmp_path):
    """SWA averages the weights at the end of each epoch, also of the epochs before the unfreezing."""
    recipe = digits_recipe(
        *LP_FT, "optimizer={name: adam, lr: 0.01, swa_start_epoch: 0}", "training.keep_checkpoints=9"
    )
    saved = [load_checkpoint(p) for p in sorted(train(tmp_path, recipe).checkpoints.glob("step-*"))]
    for name in ("network.0.weight", "network.7.weight"):
        mean = torch.stack([state.model[name] for state in saved]).mean(0)
        assert torch.allclose(saved[-1].average[f"module.{name}"], mean, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.freeze=head"], r"'model.freeze': takes backbone or a list of different block names.*'head'"),
        (["model.freeze=[]"], "takes backbone or a list"),
        (["model.freeze=[0.2]"], "in quotes where they look like numbers"),
        (["model.freeze=['1', 1]"], "different block names"),
        (["model.unfreeze_epoch=1"], "unfreeze_epoch does nothing without freeze"),
        (
            ["model.freeze=backbone", "model.unfreeze_epoch=2"],
            "model.unfreeze_epoch = 2 must be below training.epochs",
        ),
        (["model.freeze=backbone", "model.unfreeze_epoch=0"], "greater than or equal to 1"),
        (["optimizer.layer_decay=1.5"], "less than or equal to 1"),
        (["optimizer.head_lr=0"], "greater than 0"),
        (
            ["training.changes=[{epoch: 1, settings: {model.freeze: backbone}}]"],
            "'model.freeze' cannot change",
        ),
        (
            ["training.changes=[{epoch: 1, settings: {optimizer.head_lr: 1}}]"],
            "'optimizer.head_lr' cannot change",
        ),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        digits_recipe(*settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.freeze=['3', '9']"], "unknown block '9'"),
        (["model={name: 'tests.unit.training.test_freezing:headless', freeze: backbone}"], "no head"),
        (
            ["model={name: 'tests.unit.training.test_freezing:headless'}", "optimizer.layer_decay=0.5"],
            "no head",
        ),
    ],
)
def test_blocks_are_checked_before_a_run_is_created(settings, message):
    recipe = digits_recipe(*settings)
    data = digits_data(recipe)
    model = build_model(recipe.model, data.shape, data.num_classes)
    with pytest.raises(UserError, match=message):
        check_contract(model, recipe, data)


def headless(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Linear(64)


def test_frozen_batch_norm_may_get_one_row():
    """Batch norm in training mode needs two rows, frozen batch norm one."""
    for freeze, refused in (("backbone", False), ("['0']", True)):
        recipe = digits_recipe(NET, f"model.freeze={freeze}", "training.batch_size=1")
        data = digits_data(recipe)
        model = build_model(recipe.model, data.shape, data.num_classes)
        if refused:
            with pytest.raises(UserError, match="needs two rows"):
                check_contract(model, recipe, data)
        else:
            check_contract(model, recipe, data)


def test_settings_that_are_not_set_keep_the_digest():
    assert (
        digits_recipe().digest() == digits_recipe("model.freeze=null", "optimizer.layer_decay=null").digest()
    )
    assert digits_recipe().digest() != digits_recipe("optimizer.head_lr=0.1").digest()
    assert digits_recipe("model.freeze=['1', 3]").model.freeze == ["1", "3"]
