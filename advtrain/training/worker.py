"""recipe -> parts -> loop: the page to read first. One call of `run_worker` is one rank of one attempt."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from advtrain.attacks import build_attack
from advtrain.data import Dataset
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.objective import Objective
from advtrain.optim import build_optimizer, load_optimizer_tensors
from advtrain.optim.averaging import build_average
from advtrain.recipe import Recipe, load_recipe
from advtrain.runs.checkpoint import TrainState, best_checkpoint, latest_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.seeding import mix_seed
from advtrain.training.guard import describe, roll_back
from advtrain.training.loop import Epochs, Outcome, TrainingLoop
from advtrain.training.session import Session
from advtrain.training.sharded import load_whole, shard, whole
from advtrain.training.step import Components


class Execution(nn.Module):
    """The network as it is run: precision and memory layout. Logits leave in float32."""

    def __init__(self, model: nn.Module, precision: str, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) in [0, 1] to logits (N, K) float32."""
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if not self.bf16:
            logits: Tensor = self.model(x)
            return logits
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = self.model(x)
        return logits.float()


def build_components(recipe: Recipe, dataset: Dataset, session: Session) -> Components:
    """Build every part of the recipe on this rank's device, identically on every rank."""
    torch.manual_seed(mix_seed("initialisation", recipe.seed))
    model = build_model(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale).to(
        session.device
    )
    sharded = recipe.training.sharding == "fsdp" and session.world_size > 1
    if sharded:
        shard(model, session.device, session.world_size)
    elif recipe.training.channels_last and len(dataset.shape) == 3:
        model = model.to(memory_format=torch.channels_last)
    how = (recipe.training.precision, recipe.training.channels_last)
    network, average = Execution(model, *how), build_average(recipe.optimizer, model)
    if recipe.training.compile:
        model.compile()
    objective = Objective(
        recipe.objective,
        network,
        target_scale=dataset.target_scale,
        teacher=build_teacher(recipe, dataset, session.device),
    )
    reduced: nn.Module = objective
    if session.world_size > 1 and not sharded:
        with warnings.catch_warnings():  # the option's new name is not in every torch that we support
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            # Buffers are averaged once a step instead (`average_buffers`); see there.
            reduced = DistributedDataParallel(
                objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    return Components(
        model=model,
        network=network,
        objective=objective,
        reduced=reduced,
        attack=build_attack(recipe.adversary, recipe.adversary.batch_norm),
        threat=recipe.adversary.threat,
        optimizer=build_optimizer(recipe.optimizer, model),
        average=average,
        average_network=Execution(average.module, *how) if average is not None else None,
        device=session.device,
        judged=(lambda: _whole_copy(model, recipe, dataset, session.device)) if sharded else None,
    )


def _whole_copy(model: nn.Module, recipe: Recipe, dataset: Dataset, device: torch.device) -> nn.Module:
    """Return the network as it is run, with whole weights: a validation's passes are not the same on all ranks."""
    with torch.random.fork_rng([]):
        copy = build_model(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale)
    copy.load_state_dict(whole(model.state_dict()))
    return Execution(copy.to(device), recipe.training.precision, recipe.training.channels_last)


def build_teacher(recipe: Recipe, dataset: Dataset, device: torch.device) -> nn.Module | None:
    """Load the best model of the run that `objective.hat_teacher` names, frozen; None without one."""
    if recipe.objective.hat_teacher is None:
        return None
    run = RunFolder.find(Path(), recipe.objective.hat_teacher)
    facts = run.facts()
    if facts.get("data_digest") != dataset.digest:
        raise UserError(
            f"objective.hat_teacher '{run.name}' was trained on other data or another split than {dataset.name}; "
            "train a standard model with the same data section"
        )
    theirs = load_recipe(run.path / "recipe.yaml", allow_code=facts.get("allow_code", False))
    teacher = build_model(theirs.model, dataset.shape, dataset.num_classes, dataset.target_scale)
    teacher.load_state_dict(best_checkpoint(run.checkpoints).best_weights())
    return teacher.to(device).eval().requires_grad_(False)


def restore(parts: Components, state: TrainState, recipe: Recipe, session: Session) -> None:
    """Put a saved state back into freshly built parts."""
    expected = recipe.until(state.epoch + bool(state.step_in_epoch)).digest()
    if state.recipe_digest != expected:
        raise UserError(
            f"the checkpoint at step {state.step} belongs to another recipe ({state.recipe_digest[:6]}, "
            f"not {expected[:6]}); resume with the recipe that the run folder holds"
        )
    load_whole(parts.model, state.model)
    load_optimizer_tensors(parts.optimizer, state.optimizer)
    if parts.average is not None and state.average is not None:
        parts.average.load_state_dict(state.average)
    if state.replayed is not None:
        parts.replayed = session.own_rows(state.replayed["delta"], recipe.training.batch_size)


def build_loop(recipe: Recipe, dataset: Dataset, run: RunFolder, session: Session) -> TrainingLoop:
    """Build the parts and the loop, at the newest sound checkpoint or at the start.

    The recipe is as the user wrote it; training.changes that are due and the settings that the guard has put in
    force come on top here.
    """
    records = run.recoveries()
    state, passed = latest_checkpoint(run.checkpoints)
    epoch = state.epoch if state is not None else 0
    in_force = recipe.in_force(epoch, min(len(records), len(recipe.guard.stronger)))
    parts = build_components(in_force, dataset, session)
    if state is not None:
        restore(parts, state, recipe, session)
    remarks = [*map(describe, records), *passed]
    return TrainingLoop(recipe, in_force, dataset, run, session, parts, state, remarks)


def run_guarded(recipe: Recipe, loop: TrainingLoop) -> Epochs:
    """Run the loop to its end; after a change go on with it, after a collapse from the last good epoch."""
    run, session = loop.run_folder, loop.session
    while not (records := run.recoveries()) or records[-1]["settings"] is not None:
        outcome = yield from loop.epochs()
        if outcome.status not in ("collapsed", "changed"):
            return outcome
        if session.rank == 0 and outcome.line is not None:
            roll_back(recipe, run, outcome.line)
        if session.rank == 0:
            run.fetch()
        session.agree("go on")  # the others read what rank 0 has written after it has
        if session.rank != 0:
            run.fetch()
        loop = build_loop(recipe, loop.dataset, run, session)
    return Outcome("finished", describe(records[-1]))


def train_epochs(recipe: Recipe, dataset: Dataset, run: RunFolder, session: Session) -> Epochs:
    """Train in this process, an epoch at each `next`; its random generators are put back in the end."""
    devices = [session.device] if session.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        return (yield from run_guarded(recipe, build_loop(recipe, dataset, run, session)))


def drain(epochs: Epochs, report: Callable[[dict[str, Any]], None] = lambda line: None) -> Outcome:
    """Train to the end, a stop or a failure; each epoch's metrics go to `report`."""
    while True:
        try:
            report(next(epochs))
        except StopIteration as ended:
            outcome: Outcome = ended.value
            return outcome


def run_worker(recipe: Recipe, dataset: Dataset, run: RunFolder, session: Session) -> Outcome:
    """Train in this process until the end, a stop or a failure; its random generators are left alone."""
    return drain(train_epochs(recipe, dataset, run, session))
