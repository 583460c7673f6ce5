"""Predictions of a registered model, and comparison of two models on the same inputs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from advtrain.data import Inputs, read_inputs
from advtrain.data.inputs import text_inputs
from advtrain.errors import UserError
from advtrain.evaluation import Paired, Share
from advtrain.registry.predictor import BATCH, Predictor, Served, load_served, predict_all, records_of
from pipelines.records import check_suffix, record_file
from pipelines.workspace import Workspace

#: Number of records that a result keeps in memory.
NUM_RECORDS = 20


@dataclass(frozen=True)
class PredictionResult:
    """Summary of the predictions on all inputs, with the first records."""

    model: Served
    total: int
    seconds: float
    records: list[
        dict[str, Any]
    ]  # the first ones: input, label, name, probability, probabilities; or prediction
    counts: dict[str, int]  # samples by the name of the predicted class
    out: Path | None  # file with all records


@dataclass(frozen=True)
class ShadowResult:
    """Comparison of champion and challenger on the same inputs."""

    models: tuple[Served, Served]
    total: int
    ms_per_sample: tuple[float, float]  # median over batches
    agreement: Share
    disagreements: list[
        tuple[str, str, int]
    ]  # most frequent ones: class of the champion, class of the challenger, count
    accuracy: Paired | None = field(default=None)  # None: unlabeled inputs


def predict(
    uri: str,
    path: Path | None,
    workspace: Workspace,
    *,
    texts: Sequence[str] = (),
    out: Path | None = None,
    workers: int = 0,
) -> PredictionResult:
    """Predict on all inputs with a registered model; verify its files first.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        path: an image, a folder of images, .npz, .npy, .csv or .parquet; for a model of texts .txt, .csv, .tsv, .jsonl
            or .parquet. None: the inputs are `texts`.
        texts: list of texts for a model of texts, instead of a path.
        out: .parquet, .csv or .jsonl file for all records; None: only the first ones are kept, in the result.
        workers: number of Ray actors; 0: predict in this process.
    """
    if (path is None) == (not texts):
        raise UserError("pass either INPUT, a file or folder, or texts with --text")
    if out is not None:
        check_suffix(out)  # raise before the model is loaded
        if path is not None and out.resolve() == path.resolve():
            raise UserError(f"--out would overwrite the input '{path}'")
    served = load_served(uri, workspace.tracking_uri)
    inputs = _read(served, path, texts)
    started = time.perf_counter()
    first: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with record_file(out) as add:
        for rows, outputs in predict_all(served, inputs, workers, workspace.address):
            records = records_of(served, inputs, rows, outputs)
            add(records)
            first += records[: max(0, NUM_RECORDS - len(first))]
            counts.update(record["name"] for record in records if "name" in record)
    return PredictionResult(served, len(inputs), time.perf_counter() - started, first, dict(counts), out)


def _read(served: Served, path: Path | None, texts: Sequence[str]) -> Inputs:
    """Return the inputs of a model from a path, or from texts."""
    if path is not None:
        return read_inputs(path, served.shape, served.class_names, served.table, served.text)
    if served.text is None:
        raise UserError(f"--text is for models of texts; {served.uri} has inputs {served.shape}")
    return text_inputs(texts, served.text, "--text")


def shadow(name: str, path: Path, workspace: Workspace, *, challenger: str = "challenger") -> ShadowResult:
    """Compare predictions and latency of champion and challenger on the same inputs.

    Args:
        name: name of the registered model.
        path: an image, a folder of images, .npz, .npy, .csv or .parquet.
        challenger: a version or an alias.
    """
    one = load_served(f"models:/{name}@champion", workspace.tracking_uri)
    reference = f"models:/{name}/{challenger}" if challenger.isdigit() else f"models:/{name}@{challenger}"
    other = load_served(reference, workspace.tracking_uri)
    if one.text != other.text:
        raise UserError(f"{one.uri} and {other.uri} have different tokenizers")
    if one.shape != other.shape or one.class_names is None or other.class_names is None:
        raise UserError(f"{one.uri} and {other.uri} are not classifiers with the same input shape")
    inputs = _read(one, path, ())
    predictors = [Predictor(served.content, served.shape) for served in (one, other)]
    warm = next(inputs.tasks(BATCH))
    for predictor in predictors:
        predictor(warm)  # the first pass of each is slower
    labels: list[list[int]] = [[], []]
    times: list[list[float]] = [[], []]
    for number, task in enumerate(inputs.tasks(BATCH)):
        for which in (0, 1) if number % 2 else (1, 0):  # take turns: the second finds the samples cached
            start = time.perf_counter()
            result = predictors[which](task)
            if result["error"]:
                raise UserError(result["error"])
            times[which].append((time.perf_counter() - start) / len(task["row"]))
            labels[which] += result["outputs"].argmax(1).tolist()
    first, second = (np.array(found) for found in labels)
    pairs = Counter(zip(first[first != second], second[first != second], strict=True)).most_common(5)
    accuracy = None
    if inputs.labels is not None:
        accuracy = Paired.of(first == inputs.labels, second == inputs.labels)
    return ShadowResult(
        (one, other),
        len(inputs),
        (1000 * float(np.median(times[0])), 1000 * float(np.median(times[1]))),
        Share.of(first == second),
        [(one.class_names[a], other.class_names[b], count) for (a, b), count in pairs],
        accuracy,
    )
