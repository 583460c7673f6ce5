"""One adversarial step: perturb, forward, backward, clip, update. Nothing else happens here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from advtrain.attacks import GradientAttack
from advtrain.config import Recipe
from advtrain.data import Batch
from advtrain.objective import Objective
from advtrain.optim import clip_gradients, lr_factor
from advtrain.seeding import mix_seed, seed_default_generator
from advtrain.threat import ThreatModel
from advtrain.training.session import Session, average_buffers


@dataclass
class Parts:
    """What a recipe is built into."""

    model: nn.Module  # what is trained and saved
    network: nn.Module  # the model as it is run, in its precision: what is attacked and validated
    objective: Objective
    reduced: nn.Module  # the objective, behind DistributedDataParallel where there are several workers
    attack: GradientAttack
    threat: ThreatModel  # the training threat model at its full radius
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None  # of `model`
    ema_network: nn.Module | None  # the average as it is run
    device: torch.device


def adversarial_step(
    parts: Parts,
    batch: Batch,
    step: int,  # global, from 0
    epoch: float,  # position in the run, in epochs
    recipe: Recipe,
    session: Session,
) -> dict[str, Tensor]:
    """Train on one batch; return sums over this rank's samples (0-dim tensors, still on the device)."""
    for group in parts.optimizer.param_groups:
        group["lr"] = recipe.optimizer.lr * lr_factor(
            recipe.optimizer.schedule, epoch, recipe.training.epochs
        )
    seed_default_generator(parts.device, mix_seed("dropout", recipe.seed, step, session.rank))
    # ------------------------------------------------------------------ attack
    x_adv = perturb(parts, batch, step, epoch, recipe, session)
    # ----------------------------------------------------------------- descend
    parts.optimizer.zero_grad(set_to_none=True)
    loss, sums = parts.reduced(batch.x, x_adv, batch.y)
    # Each rank's sum over the global batch size, times the world size that DDP's mean divides by: the
    # gradient is that of the mean over the global batch, however unevenly it is shared out.
    (loss.sum() * (session.world_size / batch.total)).backward()
    parameters = [p for p in parts.model.parameters() if p.requires_grad]
    norm, clipped = clip_gradients(recipe.optimizer, parameters)
    parts.optimizer.step()
    # ------------------------------------------------------------------ follow
    average_buffers(parts.model, session)
    if parts.ema is not None:
        parts.ema.update_parameters(parts.model)
    samples = torch.tensor(float(len(batch.y)), device=parts.device)
    share = len(batch.y) / batch.total  # so that a sum over ranks counts each step once
    return {
        **sums,
        "samples": samples,
        "steps": samples / batch.total,
        "grad_norm": norm.detach() * share,
        "clipped": clipped * share,
    }


def perturb(
    parts: Parts, batch: Batch, step: int, epoch: float, recipe: Recipe, session: Session
) -> Tensor | None:
    """Return the batch with its share adversary.fraction attacked, or None if nothing is.

    The attacked samples are spread evenly over the global batch, so which ones they are does not depend
    on the number of workers.
    """
    adversary = recipe.adversary
    warm_up = adversary.eps_warmup_epochs
    scale = min(1.0, epoch / warm_up) if warm_up else 1.0
    if not parts.objective.adversarial or adversary.fraction == 0 or adversary.eps == 0 or scale == 0:
        return None
    generator = torch.Generator(parts.device)
    generator.manual_seed(mix_seed("attack", recipe.seed, step, session.rank))
    attack = parts.attack if scale == 1.0 else parts.attack.scaled(scale)
    threat = parts.threat.scaled(scale)
    if adversary.fraction == 1:
        return attack(parts.network, batch.x, batch.y, threat, generator)
    ends = [math.floor((batch.offset + i) * adversary.fraction + 1e-9) for i in range(len(batch.y) + 1)]
    chosen = [i for i in range(len(batch.y)) if ends[i + 1] > ends[i]]
    x_adv = batch.x.clone()
    if chosen:
        rows = torch.tensor(chosen, device=parts.device)
        x_adv[rows] = attack(parts.network, batch.x[rows], batch.y[rows], threat, generator)
    return x_adv
