"""Recipe sections: adversary, training, guard and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from advtrain.errors import UserError
from advtrain.recipe.attack import AttackConfig, BatchNormMode
from advtrain.recipe.edit_attack import EditAttackConfig
from advtrain.recipe.edits import AnyThreat, EditThreatConfig, is_edited
from advtrain.recipe.suites import check_norm, split_suite
from advtrain.schema import Config, Length, Norm, Number, Relative, Seconds, parse_number

if TYPE_CHECKING:
    from advtrain.threat import ThreatModel


def rounded_radii(radii: Mapping[str, object]) -> list[str]:
    """Return remarks on radii that look like rounded gray levels, such as 0.031 for 8/255.

    `radii` maps the name of each radius to its value.
    """
    remarks = []
    for name, value in radii.items():
        eps = parse_number(value)
        if not isinstance(eps, float) or isinstance(eps, Relative):
            continue
        levels = round(eps * 255)
        if 0 < levels <= 25 and eps != levels / 255 and abs(eps * 255 / levels - 1) < 0.015:
            remarks.append(
                f"{name} = {eps:g} is not {levels}/255 = {levels / 255:.6f}, which 8-bit data suggests; "
                f"write {levels}/255 if that is meant"
            )
    return remarks


#: Suffixes of files with a state dict.
STATE_DICTS = (".pt", ".pth", ".safetensors")


class AdversaryConfig(EditAttackConfig):
    """Training attack. Its radius is a hyperparameter, independent of evaluation.threat."""

    norm: Norm = "linf"
    """norm of the training attack: linf, l2 or l1"""
    per: Literal["sequence", "token"] = "sequence"
    """what has a ball of radius eps: the whole sample (sequence), or each token of a network that embeds its inputs"""
    eps: Length = Field(ge=0)
    """radius of the training attack in input units; 0.5x: half of embedding_norm, for networks of texts"""
    eps_low: Length | None = Field(default=None, ge=0)
    """smallest radius: if set, each step draws each sample's radius from [eps_low, eps] (Kurakin et al. 2017)"""
    init_mag: Length | None = Field(default=None, gt=0)
    """freelb: largest norm of the uniform start, U(-1, 1) init_mag / sqrt(n) at n coordinates (l1: / n; linf: not
    divided), which may be above eps; null: eps"""
    fraction: Number = Field(default=1.0, ge=0, le=1)
    """share of each batch that is attacked; 0: standard training"""
    eps_delay_epochs: Number = Field(default=0.0, ge=0)
    """number of epochs at the start with radius 0, on clean inputs; the rise over eps_warmup_epochs follows"""
    eps_warmup_epochs: Number = Field(default=0.0, ge=0)
    """epochs over which eps and step_size, or at_most (rounded down), rise from 0; 0: no rise"""
    eps_schedule: Literal["linear", "cosine"] = "linear"
    """shape of this rise: linear, or half a cosine, which is slow at both ends"""
    batch_norm: BatchNormMode = "eval"
    """batch norm mode during the attack: eval (running statistics) or train (batch statistics)"""

    @model_validator(mode="after")
    def _check_adversary(self) -> Self:
        if self.eps_low is not None and isinstance(self.eps_low, Relative) != isinstance(self.eps, Relative):
            raise ValueError(
                f"eps_low = {self.eps_low:g} and eps = {self.eps:g} must both be absolute, or both relative, as 0.5x"
            )
        if self.eps_low is not None and self.eps_low > self.eps:
            raise ValueError(f"eps_low = {self.eps_low:g} is above eps = {self.eps:g}")
        if self.name == "free" and (self.fraction != 1 or self.eps_low is not None):
            raise ValueError("free perturbs every sample at the same radius: leave out fraction and eps_low")
        if self.eps_schedule != "linear" and not self.eps_warmup_epochs:
            raise ValueError(f"eps_schedule: {self.eps_schedule} does nothing without eps_warmup_epochs")
        if self.init_mag is not None and (self.name != "freelb" or self.start == "none"):
            raise ValueError("init_mag belongs to freelb with start: uniform")
        if self.init_mag is not None and self.eps == 0:
            raise ValueError(
                "init_mag does nothing at eps = 0, which attacks nothing; to move without a bound, set eps to "
                "init_mag + (num_steps - 1) step_size"
            )
        if self.batch_norm == "train" and (self.climbs_objective or self.friendly is not None):
            kind = (
                f"{self.name} makes no passes of its own"
                if self.climbs_objective
                else "friendly shrinks the batch"
            )
            raise ValueError(f"{kind}, so batch_norm must stay eval")
        if self.name == "noise" and self.batch_norm == "train":
            raise ValueError("noise makes no passes, so batch_norm must stay eval")
        if self.name == "noise" and self.start == "gaussian" and self.norm != "linf":
            raise ValueError(
                "noise with start: gaussian has the standard deviation eps in each value, whatever the norm; leave "
                f"out norm (now {self.norm})"
            )
        return self

    @property
    def has_loss(self) -> bool:
        """True if the attack maximizes `loss`."""
        return not (self.name in ("noise", "edits") or self.custom or self.climbs_objective)

    @property
    def one_step(self) -> bool:
        """True if the attack may take a single step, which can cause catastrophic overfitting."""
        most = 2 if self.name == "freelb" else 1  # freelb ascends between its points
        return 1 <= self.num_steps <= most or self.name == "free" or self.custom

    @property
    def epochs_to_full_eps(self) -> float:
        """Number of epochs after which the radius is eps."""
        return self.eps_delay_epochs + self.eps_warmup_epochs

    @property
    def radius(self) -> float:
        """Radius as it is written: eps, or the largest number of edits."""
        return float(self.eps) if self.at_most is None else float(self.at_most)

    @property
    def threat(self) -> ThreatModel:
        """Training threat model at its full radius; raises a UserError as `absolute` does."""
        from advtrain.threat import ThreatModel  # slow: imports torch

        return ThreatModel(self.norm, self.absolute.eps, group="token" if self.per == "token" else "sample")


class Change(Config):
    """Settings that take effect during a run, set by hand or by population-based training."""

    epoch: int = Field(ge=1)
    """number of finished epochs after which the settings take effect"""
    settings: dict[str, Any] = Field(min_length=1)
    """new values by recipe path"""


class TrainingConfig(Config):
    """Training loop and its distribution over processes."""

    epochs: int = Field(ge=1)
    """passes over the training split"""
    batch_size: int = Field(ge=1)
    """samples in a global batch, over all workers and all parts of `accumulate`"""
    accumulate: int = Field(default=1, ge=1)
    """parts of each batch that are attacked and differentiated one after another, for less memory; their gradients are
    summed for one optimizer step (batch norm uses the statistics of each part)"""
    num_workers: int | list[int] = 0
    """number of Ray Train workers; 0: train in this process; [min, max]: elastic"""
    accelerator: str = Field(default="auto", pattern="^(auto|cpu|gpu)$")
    """device of each worker; auto: a GPU if the cluster has any, and missing resources are an error; cpu, gpu: wait 30
    minutes for a cluster's autoscaler to add nodes"""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores reserved for each Ray worker, and its number of threads"""
    precision: str = Field(default="fp32", pattern="^(fp32|bf16)$")
    """fp32, or bf16 autocast (losses and perturbations stay in fp32)"""
    compile: bool = False
    """compile the network with torch.compile"""
    channels_last: bool = True
    """use the NHWC memory layout, which is faster for convolutions on GPUs and with bf16"""
    max_failures: int = Field(default=3, ge=0)
    """maximum number of restarts of a failed worker group, each from the last checkpoint"""
    sharding: str = Field(default="none", pattern="^(none|fsdp)$")
    """none: each worker has the whole model (DDP); fsdp: weights, gradients and optimizer state are sharded"""
    timeout_s: Seconds = Field(default=300, ge=1)
    """seconds that a worker waits for another before it fails and the group is restarted"""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """steps between checkpoints within an epoch; null: at the end of each epoch only"""
    keep_checkpoints: int = Field(default=2, ge=1)
    """number of newest checkpoints kept, in addition to the best one"""
    changes: list[Change] = Field(default_factory=list)
    """settings that take effect during the run, each {epoch: finished epochs, settings: {path: value}}"""

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
        if self.batch_size < self.accumulate * max(1, self.max_workers):
            raise ValueError(
                f"batch_size {self.batch_size} has too few samples for accumulate = {self.accumulate} parts on each of "
                f"{max(1, self.max_workers)} workers"
            )
        return self

    @property
    def min_workers(self) -> int:
        """Smallest number of workers."""
        return self.num_workers[0] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def max_workers(self) -> int:
        """Maximum number of workers."""
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers


def why_not_sharded(recipe: Any) -> str:
    """Return why a recipe cannot use training.sharding fsdp; "" if it can.

    Every rank must run the same passes, because each pass gathers weights from all ranks. Averages and copies of the
    weights would have to be sharded too.
    """
    adversary, objective, optimizer = recipe.adversary, recipe.objective, recipe.optimizer
    used = {
        "adversary.name free": adversary.name == "free",
        "adversary.name edits": adversary.name == "edits",
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
        "objective.l2_sp": any(t.anchor for t in objective.used.values()),
        "objective.feature_match": any(t.features for t in objective.used.values()),
    }
    found = [name for name, there in used.items() if there]
    return f"training.sharding fsdp cannot be combined with {', '.join(found)}" if found else ""


class GuardConfig(Config):
    """Guard against catastrophic overfitting, the loss of multi-step robustness."""

    max_drop: Number | None = Field(default=0.2, gt=0, le=1)
    """drop of validation robust accuracy below its best that counts as a collapse, in (0, 1] (Wong et al. 2020: 0.2);
    checked only with one-step attacks; null: off"""
    stronger: list[dict[str, Any]] = Field(default_factory=list)
    """settings, each {path: value}; after a collapse the run resumes from the last good epoch with the next entry, or
    ends if none is left"""


class EvaluationConfig(Config):
    """Evaluation of models; runs that are compared must use the same threat model."""

    threat: AnyThreat
    """evaluation threat model: norm and radius of a ball, or the edits of a text"""
    suite: str | None = None
    """attacks on the finished model, on the test split: quick, standard, autoattack, rand, or a list such as
    apgd-ce,apgd-t,square; autoattack if neither suite nor attack is set"""
    attack: AttackConfig | None = None
    """one attack instead of a suite; required for regression"""
    validation: AttackConfig = AttackConfig.model_validate({"num_steps": 10})
    """attack on the validation split, which selects the best checkpoint"""
    validation_samples: int | None = Field(default=None, ge=1)
    """number of validation samples attacked (a fixed stratified subset); null: all"""
    validation_every: int = Field(default=1, ge=1)
    """epochs between validations; the last epoch is always validated"""
    batch_size: int = Field(default=250, ge=1)
    """samples per batch; in validation, over all workers"""
    seed: int = Field(default=0, ge=0)
    """seed of the random starts of attacks"""

    @model_validator(mode="before")
    @classmethod
    def _has_a_judge(cls, values: Any) -> Any:
        if not isinstance(values, dict) or is_edited(values.get("threat")):
            return values
        if values.get("suite") is None and values.get("attack") is None:
            return {**values, "suite": "autoattack"}
        return values

    @model_validator(mode="after")
    def _judges_within_the_ball(self) -> Self:
        if isinstance(self.threat, EditThreatConfig):
            return self._searches_edits()
        if self.suite is not None and self.attack is not None:
            raise ValueError("suite and attack cannot both be set; set one of them to null")
        for path in ("attack", "validation"):
            attack: AttackConfig | None = getattr(self, path)
            if attack is None:
                continue
            if attack.training_only:
                kind = "friendly" if attack.friendly is not None else attack.name
                kind = "loss kl_teacher" if attack.loss == "kl_teacher" else kind
                raise ValueError(f"{path}: {kind} is for training only, not for evaluation; use pgd")
        if self.suite is not None:
            try:
                for attack_name, _ in split_suite(self.suite, self.threat.norm):
                    check_norm(attack_name, self.threat.norm)
            except UserError as error:
                raise ValueError(f"suite: {error}") from error
        return self

    def _searches_edits(self) -> Self:
        """Reject attacks on tensors: texts are searched with the budgets of the threat model."""
        for name in ("suite", "attack", "validation"):
            if getattr(self, name) != type(self).model_fields[name].default:
                budget = "validation_budget" if name == "validation" else "budget"
                raise ValueError(f"{name} does not apply to edits of texts; set threat.{budget}")
        return self

    @property
    def edits(self) -> EditThreatConfig | None:
        """Edits of the texts if they are the threat model; None: a ball."""
        return self.threat if isinstance(self.threat, EditThreatConfig) else None

    @property
    def judged_with(self) -> AttackConfig | str:
        """Attack or suite that evaluates the finished model; "" if the edits of texts are searched."""
        if self.edits is not None:
            return ""
        judge = self.attack or self.suite
        assert judge is not None
        return judge

    @property
    def threat_model(self) -> ThreatModel | EditThreatConfig:
        """Evaluation threat model."""
        from advtrain.threat import ThreatModel  # slow: imports torch

        if isinstance(self.threat, EditThreatConfig):
            return self.threat
        return ThreatModel(self.threat.norm, self.threat.eps)
