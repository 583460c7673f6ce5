"""Which samples survive: a sample counts as robust only if no attack, restart or iterate fooled the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from advtrain.attacks import FailureSearch, GradientAttack, attacked, predictions
from advtrain.data import Place, Split
from advtrain.seeding import mix_seed
from advtrain.threat import ThreatModel

#: Called with (samples done, samples in all) of the pass under way.
Progress = Callable[[int, int], None]


@dataclass
class AttackRecord:
    """What one attack did to the samples that were still standing before it."""

    name: str
    num_attacked: int
    num_broken: int
    num_standing: int  # after it
    seconds: float


@dataclass
class SampleResults:
    """Per-sample outcome, in the split's order; every array has N rows."""

    labels: NDArray[np.int64]
    clean_predictions: NDArray[np.int64]
    adv_predictions: NDArray[np.int64]  # of the input that fooled the model, else of the clean one
    broken_by: NDArray[np.int64]  # index into `attacks`, -1: standing, -2: wrong without any attack
    attacks: list[AttackRecord] = field(default_factory=list)

    def columns(self) -> dict[str, Any]:
        """Return what samples.parquet holds."""
        names = [attack.name for attack in self.attacks]
        return {
            "label": self.labels,
            "clean_prediction": self.clean_predictions,
            "adv_prediction": self.adv_predictions,
            "robust": self.robust,
            "broken_by": ["clean" if b == -2 else None if b == -1 else names[b] for b in self.broken_by],
        }

    @property
    def clean(self) -> NDArray[np.bool_]:
        """Whether the clean sample is classified correctly."""
        return np.equal(self.clean_predictions, self.labels)

    @property
    def robust(self) -> NDArray[np.bool_]:
        """Whether the sample is correct and survived every attack."""
        return np.equal(self.broken_by, -1)


def attack_samples(
    model: nn.Module,
    split: Split,
    attacks: Sequence[FailureSearch],
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    progress: Progress | None = None,
) -> SampleResults:
    """Attack every sample of `split` with every attack, dropping each as soon as it falls.

    Args:
        model: maps (N, ...) float in [0, 1] to logits (N, K).
        attacks: run in this order, each from the clean input.
        seed: of the random starts; the same seed gives the same result.
    """
    place = Place(device=device)
    clean = _predict(model, split, batch_size, place)
    result = SampleResults(
        split.labels.astype(np.int64),
        clean,
        clean.copy(),
        np.where(clean == split.labels, -1, -2).astype(np.int64),
    )
    for number, attack in enumerate(attacks):
        started = time.perf_counter()
        before = int(result.robust.sum())
        for round_ in range(attack.num_rounds):
            standing = np.flatnonzero(result.robust)
            if len(standing) == 0:
                break
            generator = torch.Generator(device).manual_seed(mix_seed("evaluation", seed, number, round_))
            first = 0
            for batch in split.take(standing).batches(batch_size, place):
                x_adv, fooled = attack.find_failures(model, batch.x, batch.y, threat, generator, round_)
                rows = standing[first : first + len(batch.y)]
                first += len(batch.y)
                if fooled.any():
                    fallen = rows[fooled.cpu().numpy()]
                    result.broken_by[fallen] = number
                    with attacked(model), torch.no_grad():
                        result.adv_predictions[fallen] = predictions(model(x_adv[fooled])).cpu().numpy()
                if progress:
                    progress(round_ * before + first, before * attack.num_rounds)
        after = int(result.robust.sum())
        seconds = time.perf_counter() - started
        result.attacks.append(AttackRecord(attack.name, before, before - after, after, seconds))
    return result


def validation_accuracy(
    model: nn.Module,
    split: Split,
    attack: GradientAttack,
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int,
    place: Place,
) -> dict[str, float]:
    """Return how many samples of this rank's share of `split` there are, and how many are right and robust."""
    generator = torch.Generator(place.device).manual_seed(
        mix_seed("validation", seed, place.rank, place.world_size)
    )
    clean = robust = total = 0
    for batch in split.batches(batch_size, place):
        if len(batch.y) == 0:  # fewer samples than ranks in the last batch
            continue
        with attacked(model), torch.no_grad():
            right = predictions(model(batch.x)) == batch.y
        clean += int(right.sum())
        total += len(batch.y)
        x, y = batch.x[right], batch.y[right]
        for number in range(attack.num_rounds):
            if len(y):
                _, fooled = attack.find_failures(model, x, y, threat, generator, number)
                x, y = x[~fooled], y[~fooled]
        robust += len(y)
    return {"clean_accuracy": clean, "robust_accuracy": robust, "samples": total}


def _predict(model: nn.Module, split: Split, batch_size: int, place: Place) -> NDArray[np.int64]:
    with attacked(model), torch.no_grad():
        parts = [predictions(model(batch.x)).cpu() for batch in split.batches(batch_size, place)]
    return torch.cat(parts).numpy()
