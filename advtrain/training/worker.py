"""Worker: recipe -> components -> loop; read this module first.

`run_worker` runs one attempt in this process. `on_ray.py` runs one rank of a group of Ray Train workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from advtrain.attacks import Attack, build_attack
from advtrain.data import Dataset
from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.blocks import block_parameters, freeze_blocks
from advtrain.models.network import Network, embeds
from advtrain.models.start import FROM_SCRATCH, StartWeights
from advtrain.objective import Anchor, ObjectiveModule, Teacher
from advtrain.optim import build_optimizer, load_optimizer_tensors
from advtrain.optim.averaging import build_average
from advtrain.recipe import Recipe
from advtrain.runs.checkpoint import TrainState, latest_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.runs.start import read_start
from advtrain.runs.teacher import read_teacher
from advtrain.seeding import mix_seed
from advtrain.training.contract import runs_channels_last, unused_parameters
from advtrain.training.edits import EditAttack
from advtrain.training.free import choose_step
from advtrain.training.guard import describe, roll_back, watched_drop
from advtrain.training.loop import Epochs, LoopConfig, LoopState, Outcome, TrainingLoop
from advtrain.training.session import Session
from advtrain.training.sharded import load_whole, shard, whole
from advtrain.training.step import Components, StepConfig
from advtrain.training.teacher import find_teacher
from advtrain.training.trained_model import require_recipe


def build_components(
    recipe: Recipe,
    dataset: Dataset,
    session: Session,
    start: StartWeights = FROM_SCRATCH,
    teacher: nn.Module | None = None,
) -> Components:
    """Build every component of the recipe on this rank's device, identically on every rank.

    Without `teacher`, a teacher that the recipe names as a run is read from that run's folder.
    """
    torch.manual_seed(mix_seed("initialisation", recipe.seed))
    training = recipe.training
    model = build_model(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale).to(
        session.device
    )
    start.apply(model)
    # By name: sharding replaces the parameters.
    blocks = block_parameters(model) if recipe.optimizer.per_block else None
    frozen = freeze_blocks(model, recipe.model.freeze) if recipe.model.freeze is not None else []
    layout = (training.precision, runs_channels_last(model, recipe, dataset))
    has_unused = session.world_size > 1 and _has_unused(model, recipe, dataset)
    sharded = training.sharding == "fsdp" and session.world_size > 1
    if sharded:
        shard(model, session.device, session.world_size)
    elif layout[1] and len(dataset.shape) == 3:
        model = model.to(memory_format=torch.channels_last)
    network, average = Network(model, *layout), build_average(recipe.optimizer, model)
    if training.compile:
        model.compile()
    taught_by = build_teacher(recipe, dataset, network, teacher)
    objective = _build_objective(recipe, dataset, network, start, taught_by)
    config = StepConfig.of(recipe)
    return Components(
        config=config,
        session=session,
        model=model,
        network=network,
        objective=objective,
        ddp_objective=objective if sharded else _in_ddp(objective, session, has_unused),
        attack=_build_attack(config, dataset, taught_by),
        optimizer=build_optimizer(recipe.optimizer, model, blocks),
        train_step=choose_step(config),
        frozen=frozen,
        average=average,
        average_network=Network(average.module, *layout) if average is not None else None,
        validation_model=lambda: _whole_copy(model, recipe, dataset, session.device) if sharded else network,
    )


def _build_attack(config: StepConfig, dataset: Dataset, teacher: Teacher | None) -> Attack | EditAttack:
    adversary = config.adversary
    if adversary.name == "edits":
        return EditAttack(adversary, dataset)
    return build_attack(adversary, adversary.batch_norm, check_inputs=False, teacher=teacher)


def _build_objective(
    recipe: Recipe, dataset: Dataset, network: Network, start: StartWeights, teacher: Teacher | None
) -> ObjectiveModule:
    return ObjectiveModule(
        recipe.objective,
        network,
        target_scale=dataset.target_scale,
        teacher=teacher,
        anchor=Anchor(network.model, start.weights) if "l2_sp" in recipe.objective.used else None,
    )


def _has_unused(model: nn.Module, recipe: Recipe, dataset: Dataset) -> bool:
    """Return whether some trainable parameters do not affect the loss."""
    if not recipe.objective.reads_outputs:
        return True
    return ":" in recipe.model.name and bool(unused_parameters(model, dataset.shape))


def _in_ddp(objective: ObjectiveModule, session: Session, has_unused: bool) -> nn.Module:
    """Return the objective in DistributedDataParallel; with one worker, the objective itself.

    `has_unused`: some parameters get no gradient, and DDP must not wait for it.
    """
    if session.world_size == 1:
        return objective
    with warnings.catch_warnings():  # the option's new name is not in every torch that we support
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        # Buffers are averaged once a step instead (`average_buffers`); see there.
        return DistributedDataParallel(
            objective,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=has_unused,
        )


def _whole_copy(model: nn.Module, recipe: Recipe, dataset: Dataset, device: torch.device) -> nn.Module:
    """Return an unsharded copy of the network for validation.

    FSDP needs the same number of forward passes on all ranks, but in validation it differs between ranks.
    """
    with torch.random.fork_rng([]):
        copy = build_model(recipe.model, dataset.shape, dataset.num_classes, dataset.target_scale)
    copy.load_state_dict(whole(model.state_dict()))
    layout = runs_channels_last(copy, recipe, dataset)
    return Network(copy.to(device), recipe.training.precision, layout)


def build_teacher(
    recipe: Recipe, dataset: Dataset, model: nn.Module, teacher: nn.Module | None = None
) -> Teacher | None:
    """Return the teacher of the recipe on the model's device; None if there is none.

    If it is not given, it is the best model of the run that `objective.teacher` names. That is the case for runs of
    earlier versions, whose recipes have no digest of it.
    """
    if recipe.objective.teacher is None:
        return None
    if recipe.adversary.loss == "kl_teacher" and embeds(model):
        raise UserError("adversary.loss kl_teacher runs the teacher on inputs; this model perturbs embed(x)")
    teacher = find_teacher(recipe, dataset) if teacher is None else teacher
    return Teacher(teacher.to(next(model.parameters()).device).eval().requires_grad_(False))


def restore(components: Components, state: TrainState, recipe: Recipe) -> None:
    """Load a checkpoint into newly built components.

    The checkpoint at the end of epoch model.unfreeze_epoch has the state of the optimizer before it, which is left out.
    """
    require_recipe(state, recipe)
    load_whole(components.model, state.model)
    if state.step_in_epoch or state.epoch != recipe.model.unfreeze_epoch:
        load_optimizer_tensors(components.optimizer, state.optimizer)
    if components.average is not None and state.average is not None:
        components.average.load_state_dict(state.average)
    if state.replayed is not None:
        rows = components.session.own_rows(state.replayed["delta"], recipe.training.batch_size)
        components.replayed = rows


def build_loop(
    recipe: Recipe, dataset: Dataset, run: RunFolder, session: Session, start: StartWeights = FROM_SCRATCH
) -> TrainingLoop:
    """Build the components and the loop; resume from the newest intact checkpoint, if any.

    Without a checkpoint, the model loads the weights in the run's start folder, if it has one.

    `recipe` is the user's recipe. The entries of training.changes up to the current epoch are applied to it. Then the
    first entries of guard.stronger are applied, one for each collapse that the guard detected.
    """
    records = run.recoveries()
    saved, passed = latest_checkpoint(run.checkpoints)
    epoch = saved.epoch if saved is not None else 0
    in_force = recipe.in_force(epoch, min(len(records), len(recipe.guard.stronger)))
    if not start.weights and (saved is None or "l2_sp" in in_force.objective.used):
        start = read_start(run.path, recipe.model)
    teacher = None if recipe.objective.teacher_digest is None else read_teacher(run.path, recipe)
    components = build_components(in_force, dataset, session, start, teacher)
    if saved is not None:
        restore(components, saved, recipe)
    changes = recipe.training.changes
    changed_paths = {path for change in changes for path in change.settings}
    config = LoopConfig(
        training=in_force.training,
        evaluation=in_force.evaluation,
        augment=in_force.data.augment,
        max_drop=watched_drop(in_force),
        # for the checkpoints up to the next change
        recipe_digest=recipe.until(epoch + 1).digest(),
        last_epoch=recipe.next_change(epoch),
        changed_settings={
            f"set/{path}": value
            for path, value, _ in in_force.leaves()
            if path in changed_paths and isinstance(value, int | float)
        },
    )
    remarks = [*map(describe, records), *passed]
    return TrainingLoop(config, dataset, run, components, LoopState.resume(saved, session), remarks)


def run_guarded(recipe: Recipe, loop: TrainingLoop, start: StartWeights = FROM_SCRATCH) -> Epochs:
    """Run the loop to its end; rebuild it after a change, an unfreezing or a roll-back."""
    run, session = loop.run_folder, loop.components.session
    while not (records := run.recoveries()) or records[-1]["settings"] is not None:
        outcome = yield from loop.epochs()
        if outcome.status not in ("collapsed", "changed"):
            return outcome
        if session.rank == 0 and outcome.line is not None:
            roll_back(recipe, run, outcome.line, loop.components.config.adversary)
        if session.rank == 0:
            run.fetch()
        session.agree("rolled back")  # barrier: the other ranks read what rank 0 has written
        if session.rank != 0:
            run.fetch()
        loop = build_loop(recipe, loop.dataset, run, session, start)
    return Outcome("finished", describe(records[-1]))


def train_epochs(recipe: Recipe, dataset: Dataset, run: RunFolder, session: Session) -> Epochs:
    """Train in this process, one epoch per `next`; restore its random generators at the end."""
    devices = [session.device] if session.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        return (yield from run_guarded(recipe, build_loop(recipe, dataset, run, session)))


def drain(epochs: Epochs, report: Callable[[dict[str, Any]], None] = lambda line: None) -> Outcome:
    """Train until finished, stopped or failed; pass each epoch's metrics to `report`."""
    while True:
        try:
            report(next(epochs))
        except StopIteration as ended:
            outcome: Outcome = ended.value
            return outcome


def run_worker(recipe: Recipe, dataset: Dataset, run: RunFolder, session: Session) -> Outcome:
    """Train in this process until finished, stopped or failed; random generators are restored."""
    return drain(train_epochs(recipe, dataset, run, session))
