"""A registered model -> labels and probabilities, here or by Ray Data on many workers; and two models side by side."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advtrain.cluster import default_device, start_ray
from advtrain.data import Inputs, decode, read_inputs
from advtrain.errors import UserError
from advtrain.evaluation import Paired, Report, Share, load_report
from advtrain.models.serialized import ModelSource
from advtrain.promotion.evidence import shape_of
from advtrain.registry import opened, resolve
from advtrain.tracking.store import open_client
from pipelines.console import console, table
from pipelines.records import check_suffix, record_file
from pipelines.workspace import Workspace

BATCH = 256
#: Predictions that are printed where no file is asked for.
SHOWN = 20


@dataclass(frozen=True)
class Served:
    """A registered model as it is used: its archive, what it takes, and the names of what it tells apart."""

    uri: str
    content: bytes
    shape: tuple[int, ...]
    class_names: list[str] | None  # None: a regression


def load_served(uri: str, tracking_uri: str) -> Served:
    """Read a model by URI; its files are checked against their digests.

    Raises:
        UserError: no such version, or a changed file.
    """
    if not uri.startswith("models:/"):
        raise UserError(
            f"'{uri}' does not name a registered model's version; write models:/NAME@champion or models:/NAME/1"
        )
    client = open_client(tracking_uri, must_exist=True)
    version = resolve(client, uri)
    with opened(client, version) as folder:
        report = load_report(folder / "report")
        names = [figure.name for figure in report.per_class] if isinstance(report, Report) else None
        content = (folder / "model" / "data" / "model.pt2").read_bytes()
        shape, outputs = shape_of(folder / "model" / "MLmodel")
    if names is not None and len(names) != outputs[0]:  # a class without test samples has no figure
        names = [str(label) for label in range(outputs[0])]
    return Served(f"models:/{version.name}/{version.version}", content, shape, names)


class Predictor:
    """Maps a task (`Inputs.tasks`) to the model's outputs; made once in each process that predicts."""

    def __init__(self, content: bytes, shape: tuple[int, ...]) -> None:
        self.device, self.shape = default_device(), shape
        self.model = ModelSource(content).load().to(self.device)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return {row (n,), outputs (n, K) float32, error}: one that cannot be decoded comes back as a message."""
        try:
            x = torch.from_numpy(decode(task, self.shape)).to(self.device)
        except UserError as error:
            return {"row": task["row"], "outputs": np.zeros((0, 1), np.float32), "error": str(error)}
        with torch.no_grad():
            outputs = self.model(x).float().cpu().numpy()
        return {"row": task["row"], "outputs": outputs, "error": ""}


def predict(uri: str, path: Path, workspace: Workspace, *, out: Path | None, workers: int) -> int:
    """Predict on all inputs; write them to `out`, or print the first; return the exit code."""
    if out is not None:
        check_suffix(out)  # before anything takes its time
        if out.resolve() == path.resolve():
            raise UserError(f"--out would overwrite the input '{path}'")
    served = load_served(uri, workspace.tracking_uri)
    inputs = read_inputs(path, served.shape)
    started = time.perf_counter()
    shown: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with record_file(out) as add:
        for rows, outputs in run(served, inputs, workers, workspace.address):
            lines = _lines(served, inputs, rows, outputs)
            add(lines)
            shown += lines[: max(0, SHOWN - len(shown))]
            counts.update(line["name"] for line in lines if "name" in line)
    seconds = time.perf_counter() - started
    if out is None:
        _show(served, shown, len(inputs))
    summary = ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items()))
    console.print(
        f"{served.uri}: {len(inputs):,} samples, {len(inputs) / seconds:,.0f} a second. {summary}".rstrip()
    )
    if out is not None:
        console.print(f"written to {out}", markup=False)
    return 0


def run(
    served: Served, inputs: Inputs, workers: int, address: str | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield (rows, outputs) batch by batch in the inputs' order; with workers, by actors of Ray Data."""
    results: Iterator[dict[str, Any]]
    if workers == 0:
        predictor = Predictor(served.content, served.shape)
        results = (predictor(task) for task in inputs.tasks(BATCH))
    else:
        results = _on_ray(served, inputs, workers, address)
    for result in results:
        if result["error"]:
            raise UserError(result["error"])
        yield np.asarray(result["row"]), np.asarray(result["outputs"], np.float32)


def _on_ray(served: Served, inputs: Inputs, workers: int, address: str | None) -> Iterator[dict[str, Any]]:
    # Ray Data warns of an actor's arguments that may get lost, and keeps them itself.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    start_ray(address)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    tasks = list(inputs.tasks(BATCH))
    cores = int(ray.cluster_resources().get("CPU", 0))
    if workers > cores:
        raise UserError(f"--workers {workers} on a cluster of {cores} cores: each takes one")
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= workers else 0
    content = [
        ray.put(served.content)
    ]  # in a list: Ray would put the bytes of an argument into every actor's record
    yield from (
        ray.data.from_items(tasks, override_num_blocks=len(tasks))
        .map(
            _RayPredictor,
            fn_constructor_args=(content, served.shape),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=0 if gpus else 1,
            num_gpus=gpus,
        )
        .iter_rows()
    )


class _RayPredictor:
    """A Predictor in an actor of Ray Data, on one core or one GPU."""

    def __init__(self, content: list[Any], shape: tuple[int, ...]) -> None:
        import ray

        torch.set_num_threads(1)
        self.predictor = Predictor(ray.get(content[0]), shape)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.predictor(row)


def _lines(
    served: Served, inputs: Inputs, rows: NDArray[np.int64], outputs: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """Return one record a sample."""
    if served.class_names is None:
        return [
            {"input": inputs.names[row], "prediction": float(y)}
            for row, y in zip(rows, outputs[:, 0], strict=True)
        ]
    shares = np.exp(outputs - outputs.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    labels = outputs.argmax(1)
    return [
        {
            "input": inputs.names[row],
            "label": int(label),
            "name": served.class_names[label],
            "probability": float(share[label]),
            "probabilities": [float(p) for p in share],
        }
        for row, label, share in zip(rows, labels, shares, strict=True)
    ]


def _show(served: Served, lines: list[dict[str, Any]], total: int) -> None:
    names = (
        ["input", "prediction"] if served.class_names is None else ["input", "label", "name", "probability"]
    )
    cells = [[f"{v:.4f}" if isinstance(v := line[n], float) else str(v) for n in names] for line in lines]
    more = f", the first {SHOWN} of {total:,} (--out writes all)" if total > len(lines) else ""
    table(f"{served.uri}{more}", names, cells, fold=True)


def shadow(name: str, path: Path, workspace: Workspace, *, challenger: str) -> int:
    """Run champion and challenger on the same inputs: how often they agree, and how long each takes."""
    one = load_served(f"models:/{name}@champion", workspace.tracking_uri)
    reference = f"models:/{name}/{challenger}" if challenger.isdigit() else f"models:/{name}@{challenger}"
    other = load_served(reference, workspace.tracking_uri)
    if one.shape != other.shape or one.class_names is None or other.class_names is None:
        raise UserError(f"{one.uri} and {other.uri} are no classifiers of the same inputs")
    inputs = read_inputs(path, one.shape)
    models = [Predictor(served.content, served.shape) for served in (one, other)]
    warm = next(inputs.tasks(BATCH))
    for model in models:
        model(warm)  # the first pass of each is slower
    labels: list[list[int]] = [[], []]
    times: list[list[float]] = [[], []]
    for number, task in enumerate(inputs.tasks(BATCH)):
        for which in (0, 1) if number % 2 else (1, 0):  # in turns: the second finds the samples in the cache
            start = time.perf_counter()
            result = models[which](task)
            if result["error"]:
                raise UserError(result["error"])
            times[which].append((time.perf_counter() - start) / len(task["row"]))
            labels[which] += result["outputs"].argmax(1).tolist()
    first, second = (np.array(found) for found in labels)
    rows = [
        [f"{role}: {served.uri}", f"{1000 * float(np.median(took)):.3f}"]
        for role, served, took in zip(("champion", "challenger"), (one, other), times, strict=True)
    ]
    table(f"{len(inputs):,} samples of {path}", ["model", "ms a sample, median over batches"], rows)
    console.print(f"agreement {Share.of(first == second)}")
    for (a, b), count in Counter(
        zip(first[first != second], second[first != second], strict=True)
    ).most_common(5):
        console.print(f"  champion {one.class_names[a]}, challenger {other.class_names[b]}: {count:,} times")
    if inputs.labels is not None:
        paired = Paired.of(first == inputs.labels, second == inputs.labels)
        console.print(f"accuracy {paired.first}, the challenger {paired}")
    return 0
