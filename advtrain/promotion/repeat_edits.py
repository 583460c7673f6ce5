"""Repetition of a random part of an evaluation under edits."""

from __future__ import annotations

import secrets

import numpy as np

from advtrain.cluster import default_device
from advtrain.data import Dataset
from advtrain.evaluation.edit_figures import EditFigures, edit_facts
from advtrain.evaluation.edits import EditFactory, edit_items
from advtrain.models.serialized import ModelSource
from advtrain.promotion.evidence import Outcomes, Repetition


def repeat_edits(
    source: ModelSource, dataset: Dataset, edits: EditFigures, seed: int, outcomes: Outcomes, units: int
) -> Repetition:
    """Run random work items of an evaluation again, and compare them with the record.

    Args:
        source: model that was evaluated.
        dataset: data whose test split was evaluated, with the table of the edits.
        edits: settings of the search.
        seed: seed of the evaluation.
        outcomes: recorded result of each sample.
        units: number of work items.

    Raises:
        UserError: the settings are invalid, the samples are no texts, or the table is not loaded.
    """
    config, split = edits.settings, dataset.test
    if len(outcomes.labels) != len(split) or not np.array_equal(outcomes.labels, split.labels):
        return Repetition(
            0, 0, f"its {len(outcomes.labels):,} samples are not the test split of {len(split):,}"
        )
    # Refuses data without texts or without the table, which `edit_facts` takes for granted.
    factory = EditFactory.of(source, split, dataset, config, seed, {})
    facts = edit_facts(config, dataset, split)
    if facts["table_digest"] != edits.table_digest:
        return Repetition(0, 0, f"the table {edits.table} is not the one of its report")
    if facts["texts_digest"] != edits.texts_digest:
        return Repetition(0, 0, "the texts of the test split are not those of its report")
    evaluator = factory(default_device())
    items = edit_items(len(split))
    compared = differing = 0
    for item in secrets.SystemRandom().sample(items, min(units, len(items))):
        result = evaluator.do(item)
        broken = np.array([verdict["broken_at"] is not None for verdict in result["verdicts"]], bool)
        proven = np.array([verdict["proven"] for verdict in result["verdicts"]], np.int64)
        wrong = np.not_equal(result["predictions"], outcomes.predictions[item.rows])
        wrong |= broken & outcomes.robust[item.rows]
        wrong |= ~broken & outcomes.clean[item.rows] & ~outcomes.robust[item.rows]
        if outcomes.proven_edits is not None:
            wrong |= proven != outcomes.proven_edits[item.rows]
        compared, differing = compared + len(item.rows), differing + int(wrong.sum())
    return Repetition(compared, differing)
