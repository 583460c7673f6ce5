"""Predictions of a registered model, in this process or on Ray actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advtrain.cluster import build_actor_class, default_device, start_ray
from advtrain.data import Inputs, decode
from advtrain.data.tables import TableSpec
from advtrain.data.texts import TextSpec
from advtrain.errors import UserError
from advtrain.evaluation import Report, load_report
from advtrain.models.serialized import ModelSource
from advtrain.recipe.data import TextShape
from advtrain.registry.export import shape_of
from advtrain.registry.facts import facts_of, table_of, text_of
from advtrain.registry.versions import opened, resolve
from advtrain.tracking.store import open_client

#: Batch size of predictions.
BATCH = 256


@dataclass(frozen=True)
class Served:
    """A registered model loaded for prediction: archive, input shape and class names."""

    uri: str
    content: bytes
    shape: tuple[int, ...]
    class_names: list[str] | None  # None for a regression
    table: TableSpec | None = None  # columns of a table
    text: TextSpec | None = None  # tokenizer of texts


def load_served(uri: str, tracking_uri: str) -> Served:
    """Load a model by URI after checking its files against their digests.

    Raises:
        UserError: the version does not exist, or a file was changed.
    """
    if not uri.startswith("models:/"):
        raise UserError(
            f"'{uri}' is not the URI of a registered version; use models:/NAME@champion or models:/NAME/1"
        )
    client = open_client(tracking_uri, must_exist=True)
    version = resolve(client, uri)
    with opened(client, version) as folder:
        report = load_report(folder / "report")
        content = (folder / "model" / "data" / "model.pt2").read_bytes()
        shape, outputs = shape_of(folder / "model" / "MLmodel")
        facts, text = facts_of(folder / "model" / "MLmodel"), text_of(folder / "model")
    if text is not None:
        shape = TextShape(text.max_length, text.vocabulary)
    names = None
    if isinstance(report, Report):
        # Earlier versions have the names in the report alone, which omits classes without test samples.
        names = [str(name) for name in facts.get("class_names") or [c.name for c in report.per_class]]
        if len(names) != outputs[0]:
            names = [str(label) for label in range(outputs[0])]
    return Served(f"models:/{version.name}/{version.version}", content, shape, names, table_of(facts), text)


class Predictor:
    """Callable from a task (`Inputs.tasks`) to the model's outputs; one per process."""

    def __init__(self, content: bytes, shape: tuple[int, ...]) -> None:
        self.device, self.shape = default_device(), shape
        self.model = ModelSource(content).load().to(self.device)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return {row (n,), outputs (n, K) float32, error}; `error` is set if decoding failed."""
        try:
            x = torch.from_numpy(decode(task, self.shape)).to(self.device)
        except UserError as error:
            return {"row": task["row"], "outputs": np.zeros((0, 1), np.float32), "error": str(error)}
        with torch.no_grad():
            outputs = self.model(x).float().cpu().numpy()
        return {"row": task["row"], "outputs": outputs, "error": ""}


def predict_all(
    served: Served, inputs: Inputs, workers: int, address: str | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield (rows, outputs) per batch in input order; with workers, on Ray actors."""
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
    """Yield results in input order. Actors take batches in turn, each at most two at a time."""
    start_ray(address)
    import ray

    have = ray.cluster_resources()
    if workers > (cores := int(have.get("CPU", 0))):
        raise UserError(f"--workers {workers} needs a core per worker, but there are {cores} cores")
    kind_of_actor = build_actor_class(_RayPredictor, on_gpu=have.get("GPU", 0) >= workers)
    actors = [kind_of_actor.remote() for _ in range(workers)]
    content = [ray.put(served.content)]  # in a list: Ray passes the reference, not the object
    running: deque[Any] = deque()
    for number, task in enumerate(inputs.tasks(BATCH)):
        if len(running) == 2 * workers:
            yield ray.get(running.popleft())
        running.append(actors[number % workers].predict.remote(content, served.shape, task))
    while running:
        yield ray.get(running.popleft())


class _RayPredictor:
    """Ray actor with one core or one GPU, which loads the model before its first task, also after a restart."""

    predictor: Predictor | None = None

    def predict(self, content: list[Any], shape: tuple[int, ...], task: dict[str, Any]) -> dict[str, Any]:
        import ray

        if self.predictor is None:
            torch.set_num_threads(1)
            self.predictor = Predictor(ray.get(content[0]), shape)
        return self.predictor(task)


def records_of(
    served: Served, inputs: Inputs, rows: NDArray[np.int64], outputs: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """Return one record per sample."""
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
