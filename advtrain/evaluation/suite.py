"""Which samples survive: a sample counts as robust only if no attack, restart or iterate fooled the model.

The work is cut into units: a clean pass, or one round of one attack, over one block of the samples that still stand.
A unit's result depends on nothing but the unit, so units may be done in any order, on any worker, and stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from advtrain.attacks import FailureSearch, GradientAttack, attacked, predictions
from advtrain.attacks.together import parts
from advtrain.data import Place, Split
from advtrain.seeding import mix_seed, seed_default_generator
from advtrain.threat import ThreatModel

#: A round of an attack has a unit for each batch up to UNITS, and units of several batches beyond: at most so many, and
#: at most so many bytes of inputs (what attacks know of a sample takes up to ten times as much).
UNITS, MOST_BATCHES, MOST_BYTES = 32, 4, 128 * 2**20

Rows = NDArray[np.int64]
#: Called with (name of the pass, units of it done, units in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done at once: `attack` number, its round, and which samples of the split.

    `attack` is None in the clean pass; a `look` at the model as a whole (`masking.py`) has a name instead.
    """

    rows: Rows
    attack: int | None = None
    round: int = 0
    block: int = 0
    look: str = ""
    standing: Rows | None = None  # looks: those of `rows` that the suite left standing

    @property
    def key(self) -> str:
        """Its name, unique within an evaluation."""
        if self.look:
            return self.look
        return f"clean {self.block}" if self.attack is None else f"{self.attack}.{self.round}.{self.block}"


#: What a unit gave, ready for JSON.
UnitResult = dict[str, Any]
#: Does units, in any order, and yields each with its result.
Runner = Callable[[Sequence[Unit]], Iterator[tuple[Unit, UnitResult]]]


@dataclass
class Judge:
    """A model, the samples, and the attacks: does units.

    Looks are given by name: functions of (judge, unit, generator), see `masking.CHECKS`.
    """

    model: nn.Module  # (N, ...) float in [0, 1] -> logits (N, K)
    split: Split
    attacks: Sequence[FailureSearch]
    threat: ThreatModel
    seed: int
    batch_size: int
    device: torch.device
    looks: dict[str, Callable[[Judge, Unit, torch.Generator], UnitResult]] = field(default_factory=dict)

    def do(self, unit: Unit) -> UnitResult:
        """Do one unit. The global generator, from which a stochastic model draws, is seeded and put back."""
        number = -1 if unit.attack is None else unit.attack
        place = [number + 1, unit.round, unit.block, *unit.look.encode()]
        seed = mix_seed("evaluation", self.seed, *place)
        generator = torch.Generator(self.device).manual_seed(seed)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(seed)
            seed_default_generator(self.device, seed)
            if unit.look:
                return self.looks[unit.look.split(" ")[0]](self, unit, generator)
            if unit.attack is None:
                return self._predict(unit)
            return self._attack(unit, self.attacks[unit.attack], generator)

    def run(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, UnitResult]]:
        """Do units one after another: a `Runner`."""
        for unit in units:
            yield unit, self.do(unit)

    def _predict(self, unit: Unit) -> UnitResult:
        found: list[int] = []
        sure: list[float] = []
        with attacked(self.model), torch.no_grad():
            for batch in self.split.take(unit.rows).batches(self.batch_size, Place(device=self.device)):
                logits = self.model(batch.x).float()
                found += predictions(logits).tolist()
                sure += logits.softmax(1).amax(1).nan_to_num(nan=1.0).tolist()
        return {"predictions": found, "confidences": sure}

    def _attack(self, unit: Unit, attack: FailureSearch, generator: torch.Generator) -> UnitResult:
        (whole,) = self.split.take(unit.rows).batches(len(unit.rows), Place(device=self.device))
        x_adv, fooled = attack.find_failures(
            self.model, whole.x, whole.y, self.threat, generator, unit.round, self.batch_size
        )
        taken_for: list[int] = []
        with attacked(self.model), torch.no_grad():
            fallen = fooled.nonzero().flatten()
            for part in parts(fallen, self.batch_size) if len(fallen) else ():
                taken_for += predictions(self.model(x_adv[fallen[part]]).float()).tolist()
        return {"fallen": fallen.tolist(), "predictions": taken_for}


@dataclass
class AttackRecord:
    """What one attack did to the samples that were still standing before it."""

    name: str
    num_attacked: int
    num_broken: int
    num_standing: int  # after it


@dataclass
class SampleResults:
    """Per-sample outcome, in the split's order; every array has N rows."""

    labels: NDArray[np.int64]
    clean_predictions: NDArray[np.int64]
    adv_predictions: NDArray[np.int64]  # of the input that fooled the model, else of the clean one
    broken_by: NDArray[np.int64]  # index into `attacks`, -1: standing, -2: wrong without any attack
    attacks: list[AttackRecord] = field(default_factory=list)
    clean_confidences: NDArray[np.float64] | None = (
        None  # probability of the clean prediction; None: not taken
    )

    def columns(self) -> dict[str, Any]:
        """Return what samples.parquet holds."""
        names = [attack.name for attack in self.attacks]
        confidences = {} if self.clean_confidences is None else {"clean_confidence": self.clean_confidences}
        return {
            "label": self.labels,
            "clean_prediction": self.clean_predictions,
            **confidences,
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


def judge_samples(
    run: Runner,
    split: Split,
    attacks: Sequence[FailureSearch],
    batch_size: int,
    progress: Progress | None = None,
) -> SampleResults:
    """Attack every sample with every attack, dropping each as soon as it falls.

    Attacks run in their order, each from the clean input, and in each round the samples that still stand are cut
    into units anew. The model sees `batch_size` of a unit's samples at a time; as they fall, the batches are filled
    from the rest of the unit (`attacks/together.py`).
    """
    labels = split.labels.astype(np.int64)
    clean, confidences = np.empty_like(labels), np.zeros(len(labels))
    most = max(1, min(MOST_BATCHES, MOST_BYTES // (4 * math.prod(split.shape) * batch_size)))
    blocks = cut_units(np.arange(len(labels)), batch_size, most)
    units = [Unit(rows, block=k) for k, rows in enumerate(blocks)]
    for unit, result in _watched(run, units, "clean", progress):
        clean[unit.rows] = result["predictions"]
        confidences[unit.rows] = result["confidences"]
    broken_by = np.where(clean == labels, -1, -2).astype(np.int64)
    results = SampleResults(labels, clean, clean.copy(), broken_by, clean_confidences=confidences)
    for number, attack in enumerate(attacks):
        before = int(results.robust.sum())
        for round_ in range(attack.num_rounds):
            standing = np.flatnonzero(results.robust)
            blocks = cut_units(standing, batch_size, most)
            units = [Unit(rows, number, round_, k) for k, rows in enumerate(blocks)]
            for unit, result in _watched(
                run, units, f"{attack.name} {round_ + 1}/{attack.num_rounds}", progress
            ):
                fallen = unit.rows[np.asarray(result["fallen"], np.int64)]
                results.broken_by[fallen] = number
                results.adv_predictions[fallen] = result["predictions"]
        after = int(results.robust.sum())
        results.attacks.append(AttackRecord(attack.name, before, before - after, after))
    return results


def attack_samples(
    model: nn.Module,
    split: Split,
    attacks: Sequence[FailureSearch],
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> SampleResults:
    """Judge `model` on every sample of `split` in this process; the same seed gives the same result."""
    judge = Judge(model, split, attacks, threat, seed, batch_size, device)
    return judge_samples(judge.run, split, attacks, batch_size)


def cut_units(rows: Rows, batch_size: int, most: int) -> list[Rows]:
    """Cut samples into units of whole batches, as even as can be, larger ones first: a batch in each up to UNITS
    batches, and no more than `most` in any."""
    batches = math.ceil(len(rows) / batch_size)
    number = max(1, min(batches, UNITS), math.ceil(batches / most))
    each, larger = divmod(batches, number)
    starts = [batch_size * (k * each + min(k, larger)) for k in range(1, number)]
    return np.split(rows, starts) if batches else []


def _watched(
    run: Runner, units: list[Unit], name: str, progress: Progress | None
) -> Iterator[tuple[Unit, UnitResult]]:
    for done, pair in enumerate(run(units), start=1):
        if progress is not None:
            progress(name, done, len(units))
        yield pair


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
