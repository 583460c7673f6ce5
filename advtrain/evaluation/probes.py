"""Masking checks, accuracy curve and gallery, as work items of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from advtrain.data import Split
from advtrain.evaluation.figures import (
    CURVE_FACTORS,
    GALLERY_POOL,
    curve_rows,
    nearest_failures,
    robust_at,
)
from advtrain.evaluation.masking import CHECKS, NUM_SAMPLES
from advtrain.evaluation.worst_case import (
    Evaluator,
    Progress,
    Rows,
    Runner,
    SampleResults,
    WorkItem,
    WorkResult,
    spread_rows,
)

#: Probes by the first word of their names.
PROBES: dict[str, Callable[[Evaluator, WorkItem, torch.Generator], WorkResult]] = {
    **CHECKS,
    "curve": robust_at,
    "gallery": nearest_failures,
}


def run_probes(
    run: Runner, samples: SampleResults, split: Split, seed: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the masking checks, the curve and the gallery; return their results by name."""
    curve, shape = curve_rows(split, seed), split.shape
    items = [WorkItem(curve, probe=f"curve {factor}") for factor in CURVE_FACTORS]
    if samples.clean.any():
        rows = _check_rows(samples)
        standing = {kind: np.intersect1d(rows[kind], np.flatnonzero(samples.robust)) for kind in rows}
        items = [
            WorkItem(rows[check.rows], probe=name, standing=standing[check.rows])
            for name, check in CHECKS.items()
            if len(rows[check.rows])
        ] + items
    fallen = np.flatnonzero(samples.clean & ~samples.robust)
    if len(fallen) and len(shape) == 3 and shape[0] in (1, 3):
        items.append(WorkItem(spread_rows(fallen, GALLERY_POOL), probe="gallery"))
    found = {}
    for done, (item, result) in enumerate(run(items), start=1):
        found[item.key] = result
        if progress is not None:
            progress("checks", done, len(items), None)
    return found


def _check_rows(samples: SampleResults) -> dict[str, Rows]:
    """Return the rows of the samples of the checks, by `MaskingCheck.rows`."""
    right, robust = np.flatnonzero(samples.clean), np.flatnonzero(samples.robust)
    confidence = samples.clean_confidences
    assert confidence is not None

    def weakest(rows: Rows) -> Rows:
        return np.sort(rows[np.argsort(confidence[rows], kind="stable")[:NUM_SAMPLES]])

    return {"spread": spread_rows(right, NUM_SAMPLES), "weakest": weakest(right), "robust": weakest(robust)}
