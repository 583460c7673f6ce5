"""The sections of a recipe that belong to no single part: adversary, training, guard, evaluation."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from advtrain.attacks import AttackConfig, BatchNormMode, build_suite, check_suite
from advtrain.errors import UserError
from advtrain.schema import Config, Number
from advtrain.threat import Norm, ThreatConfig, ThreatModel


class AdversaryConfig(AttackConfig):
    """The attack trained against. Its radius is a hyperparameter; the judge's is evaluation.threat."""

    norm: Norm = "linf"
    """linf, l2 or l1"""
    eps: Number = Field(ge=0)
    """radius of the training attack in input units"""
    eps_low: Number | None = Field(default=None, ge=0)
    """if set, each sample's radius is drawn anew from [eps_low, eps] at each step (Kurakin et al. 2017)"""
    fraction: Number = Field(default=1.0, ge=0, le=1)
    """share of each batch that is attacked: 0 is standard training"""
    eps_warmup_epochs: Number = Field(default=0.0, ge=0)
    """epochs over which eps (and step_size with it) rises linearly from 0; 0: constant"""
    batch_norm: BatchNormMode = "eval"
    """mode of batch norm while attacking: eval (running statistics) or train (the attacked batch's own)"""

    @model_validator(mode="after")
    def _check_adversary(self) -> Self:
        if self.eps_low is not None and self.eps_low > self.eps:
            raise ValueError(f"eps_low = {self.eps_low:g} is above eps = {self.eps:g}")
        if self.name == "free" and (self.fraction != 1 or self.eps_low is not None):
            raise ValueError("free perturbs every sample at the same radius: leave out fraction and eps_low")
        if self.batch_norm == "train" and (self.name == "free" or self.friendly is not None):
            kind = "free makes no passes of its own" if self.name == "free" else "friendly shrinks the batch"
            raise ValueError(f"{kind}, so batch_norm must stay eval")
        return self

    @property
    def one_step(self) -> bool:
        """Whether it may take a single gradient step: such training can overfit catastrophically."""
        return self.num_steps == 1 or self.name == "free" or self.custom

    @property
    def threat(self) -> ThreatModel:
        """The training threat model at its full radius."""
        return ThreatModel(self.norm, self.eps)


class Change(Config):
    """Settings that come into force in mid-run, as a schedule by hand or one that population-based training found."""

    epoch: int = Field(ge=1)
    """epochs done before"""
    settings: dict[str, Any] = Field(min_length=1)
    """path -> value"""


class TrainingConfig(Config):
    """The loop, and how it is spread over processes."""

    epochs: int = Field(ge=1)
    """passes over the training split"""
    batch_size: int = Field(ge=1)
    """rows of a global batch, over all workers together"""
    num_workers: int | list[int] = 0
    """0: in this process; N: that many Ray Train workers; [min, max]: elastic"""
    accelerator: str = Field(default="auto", pattern="^(auto|cpu|gpu)$")
    """of a worker; auto: a GPU if the cluster has any, and what it lacks is refused at once; cpu, gpu: that, waited for
    half an hour while an autoscaler brings nodes"""
    cpus_per_worker: int = Field(default=1, ge=1)
    """cores reserved for, and threads used by, each Ray worker"""
    precision: str = Field(default="fp32", pattern="^(fp32|bf16)$")
    """fp32, or bf16 autocast (losses and perturbations stay in fp32)"""
    compile: bool = False
    """run the network through torch.compile"""
    channels_last: bool = True
    """memory layout NHWC, faster for convolutions on GPUs and with bf16"""
    max_failures: int = Field(default=3, ge=0)
    """how often a failed worker group is restarted from the last checkpoint"""
    sharding: str = Field(default="none", pattern="^(none|fsdp)$")
    """none: each worker has the whole model (DDP); fsdp: weights, gradients and optimizer state are cut over them"""
    timeout_s: int = Field(default=300, ge=1)
    """seconds after which a worker that waits for another in vain fails, so that the group is restarted"""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """steps between checkpoints within an epoch; null: at the end of each epoch only"""
    keep_checkpoints: int = Field(default=2, ge=1)
    """newest checkpoints kept, beside the best one"""
    changes: list[Change] = Field(default_factory=list)
    """settings that come into force in mid-run, each {epoch: epochs done before, settings: {path: value}}"""

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        workers = self.num_workers
        if isinstance(workers, list):
            if len(workers) != 2 or not 1 <= workers[0] <= workers[1]:
                raise ValueError(f"num_workers must be N or [min, max] with 1 <= min <= max, not {workers}")
        elif workers < 0:
            raise ValueError(f"num_workers must be at least 0, not {workers}")
        epochs = [change.epoch for change in self.changes]
        if epochs != sorted(set(epochs)) or max(epochs, default=0) >= self.epochs:
            raise ValueError(
                f"changes must come at rising epochs below epochs = {self.epochs}, not at {epochs}"
            )
        if self.batch_size < self.max_workers:
            raise ValueError(f"batch_size {self.batch_size} is smaller than the number of workers {workers}")
        return self

    @property
    def max_workers(self) -> int:
        """The largest number of workers."""
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers


def why_not_sharded(recipe: Any) -> str:
    """Return what of a recipe does not go with training.sharding fsdp; "" if all does.

    Every rank must make the same passes, since each gathers weights from all; and averages or copies of the weights
    would have to be cut as well.
    """
    adversary, objective, optimizer = recipe.adversary, recipe.objective, recipe.optimizer
    used = {
        "adversary.name free": adversary.name == "free",
        "adversary.friendly": adversary.friendly is not None,
        "a custom adversary": adversary.custom,
        "adversary.fraction below 1": 0 < adversary.fraction < 1,
        "objective terms that differentiate a gradient": any(t.gradient for t in objective.used.values()),
        "optimizer.sam_rho": optimizer.sam_rho is not None,
        "optimizer.awp_gamma": optimizer.awp_gamma is not None,
        "optimizer.ema_decay": optimizer.ema_decay is not None,
        "optimizer.swa_start_epoch": optimizer.swa_start_epoch is not None,
        "optimizer.clip_value": optimizer.clip_value is not None,
        "training.compile": recipe.training.compile,
    }
    found = [name for name, there in used.items() if there]
    return f"training.sharding fsdp does not go with {', '.join(found)}" if found else ""


class GuardConfig(Config):
    """What to do about catastrophic overfitting: robustness to many steps lost while training with one."""

    max_drop: Number | None = Field(default=0.2, gt=0, le=1)
    """fall of the validation robust accuracy below its best so far that counts as a collapse, watched while
    training with a one-step attack (Wong et al. 2020 use 0.2); null: not watched"""
    stronger: list[dict[str, Any]] = Field(default_factory=list)
    """settings, each a map path: value, with which the run goes on from the last good epoch, one after each
    collapse; when none is left it ends there"""


class EvaluationConfig(Config):
    """How models are judged: the same threat model for every run that is to be compared."""

    threat: ThreatConfig
    """norm and radius of the judge"""
    suite: str | None = None
    """attacks on the test split, once, on the finished model: quick, standard, autoattack, rand, or a list such as
    apgd-ce,apgd-t,square; if neither suite nor attack is set: autoattack"""
    attack: AttackConfig | None = None
    """one attack in the place of a suite; a regression needs it"""
    validation: AttackConfig = AttackConfig.model_validate({"num_steps": 10})
    """attack on the validation split, which selects the checkpoint"""
    validation_samples: int | None = Field(default=None, ge=1)
    """validation samples attacked each time (a fixed stratified draw); null: all"""
    validation_every: int = Field(default=1, ge=1)
    """epochs between validations; the last epoch is always validated"""
    batch_size: int = Field(default=250, ge=1)
    """samples that the model sees together; in a validation, over all workers"""
    seed: int = Field(default=0, ge=0)
    """seed of random starts"""

    @model_validator(mode="before")
    @classmethod
    def _has_a_judge(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("suite") is None and values.get("attack") is None:
            return {**values, "suite": "autoattack"}
        return values

    @model_validator(mode="after")
    def _judges_within_the_ball(self) -> Self:
        if self.suite is not None and self.attack is not None:
            raise ValueError("suite and attack are two judges; set one of them to null")
        for path in ("attack", "validation"):
            attack: AttackConfig | None = getattr(self, path)
            if attack is None:
                continue
            if attack.training_only:
                kind = "friendly" if attack.friendly is not None else attack.name
                raise ValueError(f"{path}: {kind} is to train against, not to judge with; use pgd")
        if self.suite is not None:
            try:
                check_suite(build_suite(self.suite), self.threat_model)
            except UserError as error:
                raise ValueError(f"suite: {error}") from error
        return self

    @property
    def judged_with(self) -> AttackConfig | str:
        """What the finished model is judged with."""
        judge = self.attack or self.suite
        assert judge is not None
        return judge

    @property
    def threat_model(self) -> ThreatModel:
        """The evaluation threat model."""
        return ThreatModel(self.threat.norm, self.threat.eps)
