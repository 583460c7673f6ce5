"""One training step: attack, gradients, update. Variants: SAM, AWP (and `free.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from advtrain.attacks import Attack, frozen_bn_stats
from advtrain.data import Batch
from advtrain.models.network import attack_view
from advtrain.objective import ObjectiveModule
from advtrain.optim import OptimizerConfig, clip_gradients, lr_factor, perturbed_weights
from advtrain.recipe import AdversaryConfig, Recipe
from advtrain.seeding import mix_seed
from advtrain.threat import ThreatModel
from advtrain.training.edits import EditAttack
from advtrain.training.session import Session, Stopwatch, average_buffers
from advtrain.training.sharded import gradient_reduction

#: Name of a metric ("loss", a loss term, "samples", ...) -> sum over this rank's samples, a 0-dim tensor.
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """Position in the run."""

    step: int  # optimizer steps done, over all epochs
    epoch: float  # finished epochs, plus the fraction done of the current epoch


@dataclass(frozen=True)
class StepConfig:
    """Settings of a training step."""

    adversary: AdversaryConfig
    optimizer: OptimizerConfig
    num_epochs: int
    batch_size: int  # global
    seed: int
    accumulate: int  # parts of a batch

    @classmethod
    def of(cls, recipe: Recipe) -> StepConfig:
        """Return the settings of a recipe's steps."""
        training = recipe.training
        return cls(
            adversary=recipe.adversary.absolute,
            optimizer=recipe.optimizer,
            num_epochs=training.epochs,
            batch_size=training.batch_size,
            seed=recipe.seed,
            accumulate=training.accumulate,
        )

    def lr(self, epoch: float) -> float:
        """Return the learning rate at a position in the run, in epochs."""
        return self.optimizer.lr * self.lr_factor(epoch)

    def lr_factor(self, epoch: float) -> float:
        """Return the schedule's factor on each learning rate, at a position in epochs."""
        return lr_factor(self.optimizer.schedule, epoch, self.num_epochs)

    def eps_scale(self, epoch: float) -> float:
        """Return the factor of the training radius and the step size, in [0, 1].

        It is 0 for eps_delay_epochs and then rises over eps_warmup_epochs (epsilon-scheduling, arXiv 2509.23325).
        """
        adversary = self.adversary
        since = epoch - adversary.eps_delay_epochs
        if since < 0 or not adversary.eps_warmup_epochs:
            return float(since >= 0)
        part = min(1.0, since / adversary.eps_warmup_epochs)
        return part if adversary.eps_schedule == "linear" else (1 - math.cos(math.pi * part)) / 2


@dataclass
class Components:
    """Components that are built from a recipe on one rank."""

    config: StepConfig
    session: Session
    model: nn.Module  # trained and saved
    network: nn.Module  # `model` in the recipe's precision and layout, for attacks and validation
    objective: ObjectiveModule
    ddp_objective: nn.Module  # the objective, wrapped in DistributedDataParallel if there are several ranks
    attack: Attack | EditAttack
    optimizer: torch.optim.Optimizer
    train_step: TrainStep  # `train_step` or one of its variants
    average: AveragedModel | None  # average of `model`
    average_network: nn.Module | None  # `average` in the recipe's precision and layout
    validation_model: Callable[[], nn.Module]  # `network`, or with FSDP a copy with whole weights
    frozen: Sequence[nn.Module] = ()  # parts of `model` that are not trained
    replayed: Tensor | None = None  # free training: this rank's perturbation, reused for the next batch
    attack_time: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self.attack_time = Stopwatch(self.session.device)

    def train_mode(self) -> None:
        """Put everything that is trained into training mode; frozen modules stay in evaluation mode."""
        self.ddp_objective.train()
        for module in self.frozen:
            module.eval()

    def parts(self, batch: Batch) -> list[slice]:
        """Return the rows of each part of a batch, see training.accumulate.

        Every rank has the same number of parts, at most one for each row of the smallest share.
        """
        count = max(1, min(self.config.accumulate, batch.total // self.session.world_size))
        ends = [len(batch.y) * number // count for number in range(count + 1)]
        return [slice(first, last) for first, last in pairwise(ends)]

    def is_attacked(self, progress: Progress) -> bool:
        """Return whether batches are attacked: a term needs it, and fraction and radius are not 0."""
        adversary, scale = self.config.adversary, self.config.eps_scale(progress.epoch)
        return self.objective.adversarial and min(adversary.fraction, adversary.radius, scale) > 0

    def generator(self, purpose: str, step: int) -> torch.Generator:
        """Return the random generator of one step and purpose, on this rank's device."""
        seed = mix_seed(purpose, self.config.seed, step, self.session.rank)
        return torch.Generator(self.session.device).manual_seed(seed)


#: Trains on one batch and returns the sums of its metrics.
TrainStep = Callable[[Components, Batch, Progress], Sums]


def train_step(components: Components, batch: Batch, progress: Progress) -> Sums:
    """Train on one batch (Madry et al. 2018, arXiv 1706.06083, eq. 2.1).

    Returns:
        Sums over this rank's samples, still on the device: the objective's, "samples", "steps", "grad_norm", "clipped".
    """
    # ------------------------------------------------------------------ attack
    with components.attack_time:
        z_adv = perturb(components, batch, progress)
    # --------------------------------------------------------------- gradients
    sums = compute_gradients(components, batch, z_adv, progress)
    # ------------------------------------------------------------------ update
    return sums | update(components, batch, progress)


def train_step_sam(components: Components, batch: Batch, progress: Progress) -> Sums:
    """Train on one batch with SAM (Foret et al. 2021, arXiv 2010.01412, alg. 1).

    The gradient is taken at perturbed weights. Batch norm's running statistics are updated at the unperturbed weights,
    as in the authors' code.
    """
    with components.attack_time:
        z_adv = perturb(components, batch, progress)
    sums = compute_gradients(components, batch, z_adv, progress)
    with perturbed_weights(components.config.optimizer, components.model), frozen_bn_stats(components.model):
        compute_gradients(components, batch, z_adv, progress)
    return sums | update(components, batch, progress)


def train_step_awp(components: Components, batch: Batch, progress: Progress) -> Sums:
    """Train on one batch with AWP after its warm-up (Wu et al. 2020, arXiv 2004.05884, alg. 1).

    AWP is adversarial weight perturbation. Batch norm's running statistics are updated at the perturbed weights, as in
    the authors' code.
    """
    if progress.epoch < components.config.optimizer.awp_warmup_epochs:
        return train_step(components, batch, progress)
    with components.attack_time:
        z_adv = perturb(components, batch, progress)
    with frozen_bn_stats(components.model):
        sums = compute_gradients(components, batch, z_adv, progress)
    with perturbed_weights(components.config.optimizer, components.model):
        compute_gradients(components, batch, z_adv, progress)
    return sums | update(components, batch, progress)


def perturb(components: Components, batch: Batch, progress: Progress) -> Tensor | None:
    """Attack a fraction of the batch, adversary.fraction; return None if nothing is attacked.

    The attacked samples are spread evenly over the run's batches, so their choice does not depend on the number of
    workers. If the fraction is below one sample per batch, some batches have no attacked sample.

    With training.accumulate each part is attacked on its own, so random starts differ from those of the whole batch.

    Returns:
        Inputs (n, ...) with perturbed samples; embeddings embed(x) instead if the network embeds its inputs, and token
        ids (n, L') of edited texts.
    """
    adversary, scale = components.config.adversary, components.config.eps_scale(progress.epoch)
    if not components.is_attacked(progress):
        return None
    if isinstance(components.attack, EditAttack):
        return edit(components, components.attack, batch, progress)
    generator = components.generator("attack", progress.step)
    attack, ball = components.attack.scaled(scale), training_threat(components, batch, progress)
    model, z, threat = attack_view(components.network, batch.x, ball)

    def attacked(rows: slice | Tensor) -> Tensor:
        return attack(model, z[rows], batch.y[rows], threat.rows(rows), generator)

    parts = components.parts(batch)
    if adversary.fraction == 1:
        return attacked(parts[0]) if len(parts) == 1 else torch.cat([attacked(rows) for rows in parts])
    z_adv = z.clone()
    for rows in attacked_rows(adversary.fraction, batch, progress).tensor_split(len(parts)):
        if len(rows):
            z_adv[rows] = attacked(rows)
    return z_adv


def edit(components: Components, attack: EditAttack, batch: Batch, progress: Progress) -> Tensor | None:
    """Return the token ids (n, L') of a batch with a fraction of its texts edited.

    None: no edit is allowed yet. The seed of a text depends on its place in the global batch, so edits do not depend on
    the number of workers.
    """
    config = components.config
    at_most = math.floor((config.adversary.at_most or 0) * config.eps_scale(progress.epoch) + 1e-9)
    if at_most == 0:
        return None
    rows = attacked_rows(config.adversary.fraction, batch, progress).cpu().numpy()
    seeds = [mix_seed("edits", config.seed, progress.step, batch.offset + row) for row in rows.tolist()]
    return attack(components.network, batch, rows, at_most, seeds)


def attacked_rows(fraction: float, batch: Batch, progress: Progress) -> Tensor:
    """Return the rows of a batch that are attacked, (n,) int64.

    They are `fraction` of the samples, spread evenly over the run's batches.
    """
    first = progress.step * batch.total + batch.offset
    ends = [math.floor((first + i) * fraction + 1e-9) for i in range(len(batch.y) + 1)]
    chosen = [i for i in range(len(batch.y)) if ends[i + 1] > ends[i]]
    return torch.tensor(chosen, dtype=torch.int64, device=batch.y.device)


def training_threat(components: Components, batch: Batch, progress: Progress) -> ThreatModel:
    """Return the threat model of a batch, with the warm-up factor applied to the radius.

    If eps_low is set, each sample has a random radius in [eps_low, eps].
    """
    adversary = components.config.adversary
    threat = adversary.threat.scaled(components.config.eps_scale(progress.epoch))
    if adversary.eps_low is None or adversary.eps == 0:
        return threat
    generator = components.generator("radius", progress.step)
    low = adversary.eps_low / adversary.eps
    draws = torch.rand(len(batch.y), generator=generator, device=batch.y.device)
    return threat.with_radius_scale(low + (1 - low) * draws)


def compute_gradients(
    components: Components,
    batch: Batch,
    z_adv: Tensor | None,  # (n, ...) float, or None: nothing was attacked
    progress: Progress,
    point: int = 0,
    points: int = 1,
) -> Sums:
    """Compute the gradients of the mean loss of the global batch; return the objective's sums.

    The gradients of the parts of the batch (training.accumulate) add up. They are reduced over the ranks once. With
    several `points`, successive calls with `point` 0, 1, ... give the mean of their gradients. The dropout masks and
    the random draws of the terms are the same in all of them.
    """
    session, parts, totals = components.session, components.parts(batch), Sums()
    threat = training_threat(components, batch, progress)
    generator = components.generator("terms", progress.step)
    dropout_seed = mix_seed("dropout", components.config.seed, progress.step, session.rank)
    if point == 0:
        components.optimizer.zero_grad(set_to_none=True)
    for number, rows in enumerate(parts):
        is_last = point == points - 1 and number == len(parts) - 1
        with gradient_reduction(components.ddp_objective, components.model, is_last):
            loss, sums = components.ddp_objective(
                batch.x[rows],
                None if z_adv is None else z_adv[rows],
                batch.y[rows],
                threat.rows(rows),
                generator,
                dropout_seed + number,
            )
            # DDP divides by the world size, so each rank's sum is scaled by world size / global batch size. The result
            # is the gradient of the mean over the global batch, even if ranks have different numbers of samples.
            (loss.sum() * (session.world_size / (batch.total * points))).backward()
        totals = {name: totals[name] + value if name in totals else value for name, value in sums.items()}
    return totals


def update(components: Components, batch: Batch, progress: Progress) -> Sums:
    """Clip the gradients, step the optimizer, and update batch norm and the moving average."""
    config, optimizer = components.config.optimizer, components.optimizer
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * components.config.lr_factor(progress.epoch)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm, clipped = clip_gradients(config, parameters)
    optimizer.step()
    average_buffers(components.model, components.session)
    if components.average is not None and config.ema_decay is not None:
        components.average.update_parameters(components.model)
    samples = torch.tensor(float(len(batch.y)), device=batch.y.device)
    share = len(batch.y) / batch.total  # shares of all ranks sum to 1: a step counts once
    return {
        "samples": samples,
        "steps": samples / batch.total,
        "grad_norm": norm.detach() * share,
        "clipped": clipped * share,
    }
