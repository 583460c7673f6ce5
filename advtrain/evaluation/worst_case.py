"""Worst-case evaluation: a sample is robust only if no attack, restart or iterate breaks it.

The work is split into items: a clean pass or one round of one attack, over one block of the samples that are still
robust. The result of an item depends only on the item, so items may run in any order, on any worker, and be cached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advtrain.attacks import (
    FailureSearch,
    GradientAttack,
    attack_mode,
    check_inputs,
    check_suite,
    predictions,
)
from advtrain.attacks.active_batches import parts
from advtrain.data import Batch, Place, Split
from advtrain.evaluation.time_left import TimeLeft
from advtrain.models.network import attack_view, embeds
from advtrain.models.outputs import check_outputs, reject_probabilities
from advtrain.seeding import mix_seed, seeded
from advtrain.threat import ThreatModel

#: A round of an attack is cut into one work item for each batch, up to MAX_ITEMS items. Larger rounds put several
#: batches into an item: at most MOST_BATCHES, and at most MOST_BYTES of inputs, since an attack's state takes up to ten
#: times as much.
MAX_ITEMS, MOST_BATCHES, MOST_BYTES = 32, 4, 128 * 2**20

Rows = NDArray[np.int64]
#: Called with (name of the pass, number of finished items, number of all items, seconds left or None).
Progress = Callable[[str, int, int, float | None], None]


@dataclass(frozen=True)
class WorkItem:
    """Unit of work: index of the attack, its round, and the rows of the samples in the split.

    `attack` is None in the clean pass, and in a probe. A probe is a masking check (`masking/`), a point of the
    accuracy curve or the gallery (`figures.py`); `probe` is its name.
    """

    rows: Rows
    attack: int | None = None
    round: int = 0
    block: int = 0
    probe: str = ""
    standing: Rows | None = None  # for probes: the robust samples among `rows`
    is_cached: bool = False  # whether the result was read from a cache

    @property
    def key(self) -> str:
        """Key of the item, unique within an evaluation."""
        if self.probe:
            return self.probe
        return f"clean {self.block}" if self.attack is None else f"{self.attack}.{self.round}.{self.block}"


#: JSON-serializable result of a work item.
WorkResult = dict[str, Any]
#: Runs items in any order, and yields each item with its result.
Runner = Callable[[Sequence[WorkItem]], Iterator[tuple[WorkItem, WorkResult]]]


@dataclass
class Evaluator:
    """Model, samples and attacks of an evaluation; runs work items.

    `probes` maps names to functions of (evaluator, item, generator), see `masking.CHECKS`. `fresh` returns a copy of
    the model that was never asked, or None. `other` holds images that were held back, for the check `other_images`.
    """

    model: nn.Module  # (N, ...) float in [0, 1] -> logits (N, K)
    split: Split
    attacks: Sequence[FailureSearch]
    threat: ThreatModel
    seed: int
    batch_size: int
    device: torch.device
    probes: dict[str, Callable[[Evaluator, WorkItem, torch.Generator], WorkResult]] = field(
        default_factory=dict
    )
    num_classes: int | None = None  # K; None: any
    fresh: Callable[[], nn.Module | None] = lambda: None
    other: Split | None = None

    def do(self, item: WorkItem) -> WorkResult:
        """Run one item.

        The global generator, from which a stochastic model draws, is seeded and restored afterwards.
        """
        number = -1 if item.attack is None else item.attack
        place = [number + 1, item.round, item.block, *item.probe.encode()]
        seed = mix_seed("evaluation", self.seed, *place)
        generator = torch.Generator(self.device).manual_seed(seed)
        with seeded(self.device, seed):
            if item.probe:
                return self.probes[item.probe.split(" ")[0]](self, item, generator)
            if item.attack is None:
                return self._predict(item)
            return self._attack(item, self.attacks[item.attack], generator)

    def run(self, items: Sequence[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
        """Run items one after another, as a `Runner`."""
        for item in items:
            yield item, self.do(item)

    def _predict(self, item: WorkItem) -> WorkResult:
        found: list[int] = []
        confidence: list[float] = []
        with attack_mode(self.model), torch.no_grad():
            for batch in self.split.take(item.rows).batches(self.batch_size, Place(device=self.device)):
                logits = self._clean_logits(batch)
                found += predictions(logits).tolist()
                confidence += logits.softmax(1).amax(1).nan_to_num(nan=1.0).tolist()
        return {"predictions": found, "confidences": confidence}

    def _clean_logits(self, batch: Batch) -> Tensor:
        """Return logits (n, K) float32; raise a UserError for invalid inputs, labels or outputs."""
        num_labels = 0 if embeds(self.model) else check_inputs(batch.x, batch.y, self.threat)
        outputs = self.model(batch.x)
        logits = check_outputs(outputs, len(batch.y), num_labels=num_labels, num_classes=self.num_classes)
        reject_probabilities(logits)
        return logits.float()

    def _attack(self, item: WorkItem, attack: FailureSearch, generator: torch.Generator) -> WorkResult:
        (whole,) = self.split.take(item.rows).batches(len(item.rows), Place(device=self.device))
        model, z, threat = attack_view(self.model, whole.x, self.threat)
        check_suite(self.attacks, threat)  # check all attacks before the first one runs
        z_adv, fooled = attack.find_failures(
            model, z, whole.y, threat, generator, item.round, self.batch_size
        )
        predicted_as: list[int] = []
        with attack_mode(model), torch.no_grad():
            fallen = fooled.nonzero().flatten()
            for part in parts(fallen, self.batch_size) if len(fallen) else ():
                predicted_as += predictions(model(z_adv[fallen[part]]).float()).tolist()
        return {"fallen": fallen.tolist(), "predictions": predicted_as}


@dataclass
class AttackRecord:
    """Result of one attack on the samples that were still robust before it."""

    name: str
    num_attacked: int
    num_broken: int
    num_standing: int  # still robust after the attack


@dataclass
class SampleResults:
    """Per-sample results, in the order of the split; every array has N rows."""

    labels: NDArray[np.int64]
    clean_predictions: NDArray[np.int64]
    adv_predictions: NDArray[np.int64]  # for the input that fooled the model, else the clean input
    broken_by: NDArray[np.int64]  # index into `attacks`; -1: robust, -2: misclassified without attack
    attacks: list[AttackRecord] = field(default_factory=list)
    clean_confidences: NDArray[np.float64] | None = (
        None  # probability of the clean prediction; None: not computed
    )

    def columns(self) -> dict[str, Any]:
        """Return the columns of samples.parquet."""
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
        """Flags (N,) of the samples that are classified correctly without an attack."""
        return np.equal(self.clean_predictions, self.labels)

    @property
    def robust(self) -> NDArray[np.bool_]:
        """Flags (N,) of the samples that are correct and that no attack broke."""
        return np.equal(self.broken_by, -1)


def evaluate_samples(
    run: Runner,
    split: Split,
    attacks: Sequence[FailureSearch],
    batch_size: int,
    progress: Progress | None = None,
) -> SampleResults:
    """Attack every sample with every attack, and drop a sample as soon as it is broken.

    Attacks run in the given order, each from the clean input. In each round, the samples that are still robust are
    split into items again. The model sees `batch_size` samples of an item at a time. Broken samples are removed, and
    the remaining ones are merged into fewer batches (`attacks/active_batches.py`).
    """
    labels = split.labels.astype(np.int64)
    clean, confidences = np.empty_like(labels), np.zeros(len(labels))
    blocks = blocks_of(np.arange(len(labels)), split, batch_size)
    items = [WorkItem(rows, block=k) for k, rows in enumerate(blocks)]
    for done, (item, result) in enumerate(run(items), start=1):
        if progress is not None:
            progress("clean", done, len(items), None)
        clean[item.rows] = result["predictions"]
        confidences[item.rows] = result["confidences"]
    broken_by = np.where(clean == labels, -1, -2).astype(np.int64)
    results = SampleResults(labels, clean, clean.copy(), broken_by, clean_confidences=confidences)
    time_left = TimeLeft(attacks)
    for number, attack in enumerate(attacks):
        before = int(results.robust.sum())
        for round_ in range(attack.num_rounds):
            robust_rows = np.flatnonzero(results.robust)
            blocks = blocks_of(robust_rows, split, batch_size)
            items = [WorkItem(rows, number, round_, k) for k, rows in enumerate(blocks)]
            waiting = len(robust_rows)
            for done, (item, result) in enumerate(run(items), start=1):
                newly_broken = item.rows[np.asarray(result["fallen"], np.int64)]
                results.broken_by[newly_broken] = number
                results.adv_predictions[newly_broken] = result["predictions"]
                waiting -= len(item.rows)
                attacked = 0 if item.is_cached else len(item.rows)
                seconds = time_left.after(number, round_, attacked, waiting, int(results.robust.sum()))
                if progress is not None:
                    progress(f"{attack.name} {round_ + 1}/{attack.num_rounds}", done, len(items), seconds)
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
    """Attack `model` on every sample of `split` in this process; a seed fixes the result."""
    evaluator = Evaluator(model, split, attacks, threat, seed, batch_size, device)
    return evaluate_samples(evaluator.run, split, attacks, batch_size)


def blocks_of(rows: Rows, split: Split, batch_size: int) -> list[Rows]:
    """Return the rows of each work item of one round."""
    most = max(1, min(MOST_BATCHES, MOST_BYTES // (4 * math.prod(split.shape) * batch_size)))
    return cut_work_items(rows, batch_size, most)


def spread_rows(rows: Rows, most: int) -> Rows:
    """Return at most `most` rows, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64))]


def cut_work_items(rows: Rows, batch_size: int, most: int) -> list[Rows]:
    """Split rows into items of whole batches, as evenly as possible, larger items first.

    If there are at most MAX_ITEMS batches, each item has one batch. No item has more than `most` batches.
    """
    batches = math.ceil(len(rows) / batch_size)
    number = max(1, min(batches, MAX_ITEMS), math.ceil(batches / most))
    each, larger = divmod(batches, number)
    starts = [batch_size * (k * each + min(k, larger)) for k in range(1, number)]
    return np.split(rows, starts) if batches else []


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
    """Count all samples, correct samples and robust samples in this rank's share of `split`."""
    generator = torch.Generator(place.device).manual_seed(
        mix_seed("validation", seed, place.rank, place.world_size)
    )
    clean = robust = total = 0
    for batch in split.batches(batch_size, place):
        if len(batch.y) == 0:  # fewer samples than ranks in the last batch
            continue
        with attack_mode(model), torch.no_grad():
            right = predictions(model(batch.x)) == batch.y
        clean += int(right.sum())
        total += len(batch.y)
        view, z, ball = attack_view(model, batch.x, threat)
        z, y, ball = z[right], batch.y[right], ball.rows(right)
        for number in range(attack.num_rounds):
            if len(y):
                _, fooled = attack.find_failures(view, z, y, ball, generator, number)
                z, y, ball = z[~fooled], y[~fooled], ball.rows(~fooled)
        robust += len(y)
    return {"clean_accuracy": clean, "robust_accuracy": robust, "samples": total}
