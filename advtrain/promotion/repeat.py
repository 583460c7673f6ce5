"""Repetition of a random part of an evaluation.

Whoever registers a model brings its report along, so the gate does not take it on trust.
"""

from __future__ import annotations

import secrets

import numpy as np

from advtrain.attacks import build_suite
from advtrain.cluster import default_device
from advtrain.data import Dataset
from advtrain.evaluation import Report
from advtrain.evaluation.worst_case import Evaluator, WorkItem, blocks_of
from advtrain.models.serialized import ModelSource
from advtrain.promotion.evidence import Outcomes, Repetition
from advtrain.promotion.repeat_edits import repeat_edits
from advtrain.threat import ThreatModel


def repeat(
    source: ModelSource, dataset: Dataset, report: Report, outcomes: Outcomes, units: int, batch_size: int
) -> Repetition:
    """Run random work items of an evaluation again, and compare them with the recorded samples.

    The first item is one of the clean pass. Each other one is of the first round of a random attack: the samples that
    were still robust before it are known from the record, so the item is the same, with the same random numbers.

    Args:
        source: model that was evaluated.
        dataset: data whose test split was evaluated.
        report: report with the seed, threat model and attacks.
        outcomes: recorded result of each sample.
        units: number of work items.
        batch_size: batch size of the evaluation.
    """
    if report.space == "embedding":
        return Repetition(0, 0, "attacks on embeddings cannot be repeated on an archive, which takes inputs")
    if report.edits is not None:
        return repeat_edits(source, dataset, report.edits, report.seed, outcomes, units)
    split, names = dataset.test, [attack.name for attack in report.attacks]
    if len(outcomes.labels) != len(split) or not np.array_equal(outcomes.labels, split.labels):
        return Repetition(
            0, 0, f"its {len(outcomes.labels):,} samples are not the test split of {len(split):,}"
        )
    attacks, threat = build_suite(",".join(names)), ThreatModel(report.norm, report.eps)  # type: ignore[arg-type]
    device = default_device()
    evaluator = Evaluator(source.load().to(device), split, attacks, threat, report.seed, batch_size, device)
    draw = secrets.SystemRandom()
    compared = differing = 0
    for unit in range(units):
        number = draw.randrange(len(attacks)) if unit else None
        before = np.ones(len(split), bool) if number is None else outcomes.standing(names[:number])
        blocks = blocks_of(np.flatnonzero(before), split, batch_size)
        if not blocks:
            continue
        block = draw.randrange(len(blocks))
        rows = blocks[block]
        found = evaluator.do(WorkItem(rows, number, 0, block))
        if number is None:
            wrong = np.not_equal(found["predictions"], outcomes.predictions[rows])
        else:
            broken = np.zeros(len(rows), bool)
            broken[found["fallen"]] = True
            recorded = np.array([outcomes.broken_by[row] == names[number] for row in rows], bool)
            # Later rounds of an attack may break more samples than its first.
            wrong = broken & ~recorded if attacks[number].num_rounds > 1 else broken != recorded
        compared, differing = compared + len(rows), differing + int(wrong.sum())
    return Repetition(compared, differing)
