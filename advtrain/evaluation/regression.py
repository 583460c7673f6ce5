"""Evaluation of regressions: the worst-case error of each sample, in the target's units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import nn

from advtrain.attacks import GradientAttack, attack_mode
from advtrain.data import Place, Split
from advtrain.evaluation.report import Report, ReportBase
from advtrain.models.network import attack_view
from advtrain.models.outputs import check_outputs
from advtrain.seeding import mix_seed
from advtrain.threat import ThreatModel

Errors = NDArray[np.float64]


@dataclass
class ErrorResults:
    """Per-sample errors, in the order of the split; every array has N rows."""

    targets: NDArray[np.float32]
    clean: Errors  # |f(x) - y|
    robust: Errors  # the largest |f(z) - y| found inside the ball, at least the clean error
    attack: str

    def columns(self) -> dict[str, Any]:
        """Return the columns of samples.parquet."""
        return {"target": self.targets, "clean_error": self.clean, "robust_error": self.robust}


def directions(attack: GradientAttack) -> list[GradientAttack]:
    """Return the attacks to run: one for each sign of the error if the loss is mae or mse.

    The gradient of |f - y| only increases the error with the sign that it has at the start. An attack with another
    loss is returned as it is.
    """
    if attack.config.loss in ("mae", "mse"):
        return [attack.changed(loss="over"), attack.changed(loss="under")]
    return [attack]


def worst_errors(
    model: nn.Module,
    split: Split,
    attack: GradientAttack,
    threat: ThreatModel,
    *,
    purpose: str,
    seed: int,
    batch_size: int,
    place: Place,
) -> tuple[Errors, Errors]:
    """Return the clean and worst-case absolute errors of this rank's share of `split`.

    The worst case is the largest error over all restarts and directions.
    """
    generator = torch.Generator(place.device).manual_seed(
        mix_seed(purpose, seed, place.rank, place.world_size)
    )
    clean, worst = [], []
    for batch in split.batches(batch_size, place):
        if len(batch.y) == 0:
            continue
        with attack_mode(model), torch.no_grad():
            outputs = check_outputs(model(batch.x), len(batch.y), regression=True)
            error = (outputs.float().squeeze(1) - batch.y).abs()
            error = error.nan_to_num(nan=float("inf"), posinf=float("inf"))
        clean.append(error)
        view, z, ball = attack_view(model, batch.x, threat)
        for _ in range(attack.config.num_restarts):
            for climb in directions(attack):
                error = torch.maximum(error, climb.find_worst(view, z, batch.y, ball, generator)[1])
        worst.append(error)
    if not clean:
        return np.zeros(0), np.zeros(0)
    return torch.cat(clean).double().cpu().numpy(), torch.cat(worst).double().cpu().numpy()


class Estimate(BaseModel):
    """A value with its 95 % bootstrap interval."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, errors: Errors, kind: Literal["mae", "rmse"]) -> Estimate:
        """Return the MAE or RMSE of absolute errors (N,) with its bootstrap interval.

        The interval is the percentile interval of 2,000 seeded draws.
        """
        powers = errors if kind == "mae" else errors**2
        if not np.isfinite(powers).all():  # a prediction is not finite, so the error is unbounded
            return cls(value=float("inf"), low=float("inf"), high=float("inf"))
        rng, n = np.random.default_rng(0), len(errors)
        figures = np.array([powers[rng.integers(0, n, n)].mean() for _ in range(2000)])
        low, high = np.quantile(figures, [0.025, 0.975])
        power = 1.0 if kind == "mae" else 0.5
        value, low, high = (float(v) ** power for v in (powers.mean(), low, high))
        return cls(value=value, low=low, high=high)

    def __str__(self) -> str:
        return f"{self.value:.4g}  [{self.low:.4g}, {self.high:.4g}]"


class RegressionReport(ReportBase):
    """Report on one regression on one split under one threat model, in the target's units."""

    task: Literal["regression"] = "regression"
    num_samples: int
    clean_mae: Estimate
    clean_rmse: Estimate
    robust_mae: Estimate
    robust_rmse: Estimate
    attack: str

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the test split for MLflow."""
        names = ("clean_mae", "clean_rmse", "robust_mae", "robust_rmse")
        return {name: getattr(self, name).value for name in names}

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the model in the registry."""
        return {k: f"{v:.6g}" for k, v in self.metrics.items()} | {"attacks": self.attack}

    @property
    def title(self) -> str:
        """Title of the table, one line."""
        return f"{self.model}: {self.which(self.num_samples)} of {self.data_title}, {self.threat}"

    @property
    def rows(self) -> list[list[str]]:
        """Rows of the table: names, and values with intervals."""
        return [
            ["clean MAE", str(self.clean_mae)],
            ["clean RMSE", str(self.clean_rmse)],
            [f"worst-case MAE, {self.attack}", str(self.robust_mae)],
            [f"worst-case RMSE, {self.attack}", str(self.robust_rmse)],
        ]


AnyReport = Report | RegressionReport


def attack_targets(
    model: nn.Module,
    split: Split,
    attack: GradientAttack,
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> ErrorResults:
    """Find the worst-case error of every sample, in both directions from each restart."""
    clean, worst = worst_errors(
        model,
        split,
        attack,
        threat,
        purpose="evaluation",
        seed=seed,
        batch_size=batch_size,
        place=Place(device=device),
    )
    targets = split.labels.astype(np.float32)
    return ErrorResults(targets, clean, worst, attack.name)


def build_error_report(samples: ErrorResults, **facts: Any) -> RegressionReport:
    """Build the report from per-sample errors; `facts` are the fields of ReportBase."""
    return RegressionReport(
        **facts,
        num_samples=len(samples.targets),
        clean_mae=Estimate.of(samples.clean, "mae"),
        clean_rmse=Estimate.of(samples.clean, "rmse"),
        robust_mae=Estimate.of(samples.robust, "mae"),
        robust_rmse=Estimate.of(samples.robust, "rmse"),
        attack=samples.attack,
    )


def validation_errors(
    model: nn.Module,
    split: Split,
    attack: GradientAttack,
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int,
    place: Place,
) -> dict[str, float]:
    """Return the number of samples of this rank's share of `split`, and their error sums."""
    clean, worst = worst_errors(
        model,
        split,
        attack,
        threat,
        purpose="validation",
        seed=seed,
        batch_size=batch_size,
        place=place,
    )
    return {"clean_mae": clean.sum(), "robust_mae": worst.sum(), "samples": len(clean)}
