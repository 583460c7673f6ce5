"""FSDP on two processes against DDP: equal losses, full checkpoints, resume, also in one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from advtrain.errors import UserError
from advtrain.models.small import mlp
from advtrain.recipe import Recipe
from advtrain.runs.checkpoint import load_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.training import Session, build_components, run_worker
from advtrain.training.sharded import BLOCK_SIZE
from tests.kit import digits_data, digits_recipe
from tests.servers import free_port

SETTINGS = ["training.epochs=3", "model.name=mlp", "training.num_workers=2", "optimizer.clip_norm=1"]


def recipe_of(sharding: str, *more: str) -> Recipe:
    return digits_recipe(*SETTINGS, f"training.sharding={sharding}", *more)


def begin(folder: Path, name: str, recipe: Recipe) -> RunFolder:
    return RunFolder.create(folder, name, recipe.digest(), recipe.to_yaml(), {"status": "running"})


class SpareHeads(nn.Module):
    """Network whose forward pass uses neither a small head nor a large one, which is sharded as a block of its own."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.network = mlp(shape, num_classes)
        self.small, self.large = nn.Linear(32, 5), nn.Linear(BLOCK_SIZE // 100, 101)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


SPARE = (
    "model={name: 'tests.unit.training.test_sharded:SpareHeads'}",
    "training.epochs=2",
    "training.accumulate=2",
)
TOKENS = ("model={name: 'tests.kit:Tokens', args: {trained: true}}", "training.epochs=1")
FREELB = ("adversary={name: freelb, norm: l2, eps: 0.5}", "training.accumulate=2")
LP_FT = (
    "model.freeze=backbone",
    "model.unfreeze_epoch=1",
    "training.epochs=2",
    "optimizer.layer_decay=0.5",
    "optimizer.head_lr=0.01",
)
#: name -> recipe. "straight" equals "resumed", which is stopped after one epoch and resumed, as is "spare-fsdp".
#: FSDP gathers weights in forward(), and the "tokens" and "freelb" recipes also call embed().
RECIPES = {
    "ddp": recipe_of("none"),
    "fsdp": recipe_of("fsdp"),
    "straight": recipe_of("fsdp", "optimizer.schedule.kind=constant"),
    "resumed": recipe_of("fsdp", "optimizer.schedule.kind=constant"),
    "spare-ddp": recipe_of("none", *SPARE),
    "spare-fsdp": recipe_of("fsdp", *SPARE),
    "tokens-ddp": recipe_of("none", *TOKENS),
    "tokens-fsdp": recipe_of("fsdp", *TOKENS),
    "freelb-ddp": recipe_of("none", *TOKENS, *FREELB),
    "freelb-fsdp": recipe_of("fsdp", *TOKENS, *FREELB),
    "lp-ft-ddp": recipe_of("none", *LP_FT),
    "lp-ft-fsdp": recipe_of("fsdp", *LP_FT),
}


def ranks(rank: int, port: int, folder: str) -> None:
    """Train every recipe as one of two ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    session = Session(rank, 2)
    parameters = list(build_components(RECIPES["fsdp"], digits_data(), session).model.parameters())
    held = [p.to_local().numel() for p in parameters]
    assert sum(held) < 0.6 * sum(p.numel() for p in parameters)  # rows are not always split evenly
    for name, recipe in RECIPES.items():
        run = RunFolder(Path(folder) / f"{name}-{recipe.digest()[:6]}-1")
        if name in ("resumed", "spare-fsdp"):
            run_stopped(recipe, run, session)
        outcome = run_worker(recipe, digits_data(recipe), run, session)
        assert outcome.status == "finished", outcome.message
    dist.barrier()  # rank 0 holds the store of the group
    dist.destroy_process_group()


def run_stopped(recipe: Recipe, run: RunFolder, session: Session) -> None:
    if session.rank == 0:
        run.request_stop()
    dist.barrier()
    outcome = run_worker(recipe, digits_data(recipe), run, session)
    assert outcome.status == "stopped"
    dist.barrier()
    if session.rank == 0:
        run.clear_stop()
    dist.barrier()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, RunFolder]:
    folder = tmp_path_factory.mktemp("sharded")
    runs = {name: begin(folder, name, recipe) for name, recipe in RECIPES.items()}
    mp.spawn(ranks, (free_port(), str(folder)), nprocs=2)
    return runs


def last(run: RunFolder):
    return load_checkpoint(sorted(run.checkpoints.glob("step-*"))[-1])


@pytest.mark.parametrize(
    ("prefix", "epochs"), [("", 3), ("spare-", 2), ("tokens-", 1), ("freelb-", 1), ("lp-ft-", 2)]
)
def test_fsdp_losses_match_ddp(trained, prefix, epochs):
    curves = [
        [
            (line["train_loss"], line["train_grad_norm"], line["val_robust_accuracy"])
            for line in trained[f"{prefix}{n}"].metrics()
        ]
        for n in ("ddp", "fsdp")
    ]
    assert torch.allclose(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-3, atol=2e-3)
    assert len(curves[0]) == epochs


def test_fsdp_checkpoint_is_complete_and_matches_ddp(trained):
    one, other = last(trained["fsdp"]), last(trained["ddp"])
    for part in ("model", "optimizer"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.allclose(one.model[k], v, rtol=1e-2, atol=1e-3) for k, v in other.model.items())


def test_parameters_without_gradient_keep_their_values_and_have_no_optimizer_state(trained):
    one, other = last(trained["spare-fsdp"]), last(trained["spare-ddp"])
    spare = [name for name in one.model if ".small." in name or ".large." in name]
    assert len(spare) == 4
    assert all(torch.equal(one.model[name], other.model[name]) for name in spare)
    with_state = {key.partition(".")[0] for key in one.optimizer}
    assert len(with_state) == len([name for name in one.model if name.endswith(("weight", "bias"))]) - len(
        spare
    )


@pytest.mark.parametrize("name", ["lp-ft-ddp", "lp-ft-fsdp"])
def test_frozen_blocks_are_unchanged_until_they_are_trained(trained, name):
    """The state of the optimizer is of the head only, then of all layers."""
    start = build_components(RECIPES[name], digits_data(), Session()).model.state_dict()
    first, second = map(load_checkpoint, sorted(trained[name].checkpoints.glob("step-*")))
    changed = [
        {key for key, tensor in start.items() if not torch.equal(tensor, state.model[key])}
        for state in (first, second)
    ]
    assert changed == [{"network.5.weight", "network.5.bias"}, set(start)]
    assert [{key.partition(".")[0] for key in state.optimizer} for state in (first, second)] == [
        {"0", "1"},
        set("012345"),
    ]


def test_fsdp_resume_is_bit_identical(trained):
    one, other = last(trained["resumed"]), last(trained["straight"])
    assert one.step == other.step == 63
    for part in ("model", "optimizer"):
        assert all(torch.equal(getattr(one, part)[k], v) for k, v in getattr(other, part).items())


def test_fsdp_run_resumes_in_one_process(trained):
    """A checkpoint of two sharded ranks resumes in one process."""
    run = trained["fsdp"]
    recipe = recipe_of("none", "training.num_workers=0")
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    (newest / "state.json").unlink()  # resume from the epoch before
    assert run_worker(recipe, digits_data(recipe), run, Session()).status == "finished"
    assert [line["epoch"] for line in run.metrics()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("adversary.fraction=0.5", "adversary.fraction below 1"),
        ("optimizer.ema_decay=0.9", "optimizer.ema_decay"),
        ("optimizer.awp_gamma=0.01", "optimizer.awp_gamma"),
        ("training.compile=true", "training.compile"),
        ("objective.cure=1", "differentiate a gradient"),
    ],
)
def test_fsdp_rejects_unsupported_settings(setting, named):
    with pytest.raises(UserError, match=f"fsdp cannot be combined with .*{named}"):
        recipe_of("fsdp", setting)


def test_recipe_digest_does_not_depend_on_sharding():
    assert recipe_of("fsdp").digest() == recipe_of("none").digest()
