"""recipe -> parts -> loop: the page to read first. One call of `run_worker` is one rank of one attempt."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from advtrain.attacks import build_attack
from advtrain.checkpoint import TrainState, latest_checkpoint
from advtrain.config import Recipe
from advtrain.data import Dataset
from advtrain.lookup import UserError
from advtrain.models import build_model
from advtrain.objective import build_objective
from advtrain.optim import build_ema, build_optimizer, load_optimizer_tensors
from advtrain.runfolder import RunFolder
from advtrain.seeding import mix_seed
from advtrain.training.loop import Outcome, TrainingLoop
from advtrain.training.session import Session
from advtrain.training.step import Parts


class Execution(nn.Module):
    """The network as it is run: precision and memory layout. Logits leave in float32."""

    def __init__(self, model: nn.Module, precision: str, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) in [0, 1] to logits (N, K) float32."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if not self.bf16:
            logits: Tensor = self.model(x)
            return logits
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = self.model(x)
        return logits.float()


def build_parts(recipe: Recipe, dataset: Dataset, session: Session) -> Parts:
    """Build every part of the recipe on this rank's device, identically on every rank."""
    torch.manual_seed(mix_seed("initialisation", recipe.seed))
    model = build_model(recipe.model, dataset.shape, dataset.num_classes).to(session.device)
    if recipe.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    how = (recipe.training.precision, recipe.training.channels_last)
    network, ema = Execution(model, *how), build_ema(recipe.optimizer, model)
    if recipe.training.compile:
        model.compile()
    objective = build_objective(recipe.objective, network)
    reduced: nn.Module = objective
    if session.world_size > 1:
        with warnings.catch_warnings():  # the option's new name is not in every torch that we support
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            # Buffers are averaged once a step instead (`average_buffers`); see there.
            reduced = DistributedDataParallel(
                objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    return Parts(
        model=model,
        network=network,
        objective=objective,
        reduced=reduced,
        attack=build_attack(recipe.adversary, recipe.adversary.batch_norm),
        threat=recipe.adversary.threat,
        optimizer=build_optimizer(recipe.optimizer, model.parameters()),
        ema=ema,
        ema_network=Execution(ema.module, *how) if ema is not None else None,
        device=session.device,
    )


def restore(parts: Parts, state: TrainState, recipe: Recipe) -> None:
    """Put a saved state back into freshly built parts."""
    if state.recipe_digest != recipe.digest():
        raise UserError(
            f"the checkpoint at step {state.step} belongs to another recipe ({state.recipe_digest[:6]}, "
            f"not {recipe.digest()[:6]}); resume with the recipe that the run folder holds"
        )
    parts.model.load_state_dict(state.model)
    load_optimizer_tensors(parts.optimizer, state.optimizer)
    if parts.ema is not None and state.ema is not None:
        parts.ema.load_state_dict(state.ema)


def build_loop(recipe: Recipe, dataset: Dataset, run: RunFolder, session: Session) -> TrainingLoop:
    """Build the parts and the loop, at the newest sound checkpoint or at the start."""
    parts = build_parts(recipe, dataset, session)
    state, passed = latest_checkpoint(run.checkpoints)
    if state is not None:
        restore(parts, state, recipe)
    return TrainingLoop(recipe, dataset, run, session, parts, state, passed)


def run_worker(recipe: Recipe, dataset: Dataset, run: RunFolder, session: Session) -> Outcome:
    """Train in this process until the end, a stop or a failure; its random generators are left alone."""
    devices = [session.device] if session.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        return build_loop(recipe, dataset, run, session).run()
