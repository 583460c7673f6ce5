"""Figures of a report: accuracy against epsilon with its 95 % band, and attacked images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advtrain.attacks import AttackConfig, FastAdaptiveBoundary, GradientAttack, attack_mode, predictions
from advtrain.data import Place, Split, stratified, stratified_rows
from advtrain.evaluation.regression import Estimate, RegressionReport, attack_targets
from advtrain.evaluation.report import CurvePoint, ReportBase
from advtrain.evaluation.statistics import wilson
from advtrain.evaluation.worst_case import Evaluator, WorkItem, WorkResult
from advtrain.models.network import attack_view, embeds
from advtrain.threat import ThreatModel, alongside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Radii of the curve, as multiples of the threat model's radius.
CURVE_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
CURVE_SAMPLES = 500
#: The gallery shows the GALLERY_SIZE nearest failures among GALLERY_POOL samples, found by FAB with few steps.
GALLERY_SIZE, GALLERY_POOL = 8, 48


def curve_rows(split: Split, seed: int) -> NDArray[np.int64]:
    """Return the row numbers of the CURVE_SAMPLES samples for the accuracy curve, stratified."""
    return stratified_rows(split, CURVE_SAMPLES, seed)


def robust_at(evaluator: Evaluator, item: WorkItem, generator: torch.Generator) -> WorkResult:
    """Run probe `curve F`: flag samples that stay correct under PGD-20 at F times the radius."""
    threat = evaluator.threat.scaled(float(item.probe.split(" ")[1]))
    attack = GradientAttack(AttackConfig.model_validate({"num_steps": 20}))
    standing: list[int] = []
    for batch in evaluator.split.take(item.rows).batches(
        evaluator.batch_size, Place(device=evaluator.device)
    ):
        with attack_mode(evaluator.model), torch.no_grad():
            right = predictions(evaluator.model(batch.x).float()) == batch.y
        if threat.eps > 0 and right.any():
            model, z, ball = attack_view(evaluator.model, batch.x[right], threat)
            _, fooled = attack.find_failures(model, z, batch.y[right], ball, generator)
            right[right.clone()] = ~fooled
        standing += right.int().tolist()
    return {"standing": standing}


def build_curve(standing: Sequence[Sequence[int]], threat: ThreatModel) -> list[CurvePoint]:
    """Return the accuracy and its 95 % band at each radius of CURVE_FACTORS.

    The band comes from 2,000 seeded bootstrap draws of the samples, shared by all radii. If all samples are robust or
    none is, it is Wilson's interval.

    Args:
        standing: (R, N) flags, 1 for a sample that is robust at the radius.
        threat: threat model at factor 1.
    """
    flags = np.asarray(standing, np.float64)
    n = flags.shape[1]
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000)
    bands = np.quantile(draws @ flags.T / n, [0.025, 0.975], axis=0).T
    points = []
    for factor, row, (low, high) in zip(CURVE_FACTORS, flags, bands, strict=True):
        if row.min() == row.max():
            low, high = wilson(int(row.sum()), n)
        points.append(CurvePoint(eps=factor * threat.eps, value=row.mean(), low=low, high=high))
    return points


def error_curve(
    model: nn.Module, split: Split, threat: ThreatModel, *, seed: int, batch_size: int, device: torch.device
) -> list[CurvePoint]:
    """Return the worst-case MAE of a regression at each radius under PGD-20."""
    subset = split.take(curve_rows(split, seed))
    attack = GradientAttack(AttackConfig.model_validate({"num_steps": 20, "loss": "mae"}))
    points = []
    for factor in CURVE_FACTORS:
        at = threat.scaled(factor)
        errors = attack_targets(model, subset, attack, at, seed=seed, batch_size=batch_size, device=device)
        points.append(CurvePoint(eps=at.eps, **Estimate.of(errors.robust, "mae").model_dump()))
    return points


def nearest_failures(evaluator: Evaluator, item: WorkItem, generator: torch.Generator) -> WorkResult:
    """Run probe `gallery`: return the broken samples with the smallest perturbations as PNG.

    `item.rows` are samples that the suite broke. A model that embeds its inputs has no gallery, since no image is
    perturbed.
    """
    if embeds(evaluator.model):
        return {"failures": []}
    search = FastAdaptiveBoundary(num_steps=30, num_targets=3)
    place = Place(device=evaluator.device)
    found: list[dict[str, Any]] = []
    first = 0
    for batch in evaluator.split.take(item.rows).batches(evaluator.batch_size, place):
        best, distance = batch.x, torch.full((len(batch.y),), float("inf"), device=evaluator.device)
        for number in range(search.num_rounds):
            z, size = search.find_nearest(evaluator.model, batch.x, batch.y, evaluator.threat, number)
            nearer = size < distance
            best = torch.where(alongside(nearer, z), z, best)
            distance = torch.where(nearer, size, distance)
        with attack_mode(evaluator.model), torch.no_grad():
            predicted_as = predictions(evaluator.model(best).float())
        for i in distance.isfinite().nonzero().flatten().tolist():
            delta = best[i] - batch.x[i]
            change = 0.5 + 0.5 * delta / delta.abs().amax().clamp_min(1e-12)
            found.append(
                {
                    "row": int(item.rows[first + i]),
                    "label": int(batch.y[i]),
                    "predicted_as": int(predicted_as[i]),
                    "distance": float(distance[i]),
                    "images": [_png(image) for image in (batch.x[i], change, best[i])],
                }
            )
        first += len(batch.y)
    found.sort(key=lambda failure: (failure["distance"], failure["row"]))
    return {"failures": found[:GALLERY_SIZE]}


def _png(image: Tensor) -> str:
    """Return an image (C, H, W) in [0, 1] as a base64-encoded PNG."""
    from PIL import Image

    levels = (_pixels(image).clip(0, 1) * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def draw_curve(report: ReportBase, path: Path) -> None:
    """Draw accuracy or worst-case MAE against the radius, and mark the evaluation radius."""
    points, accuracy = report.curve, not isinstance(report, RegressionReport)
    figure, axes = new_figure(6.4, 4.2)
    eps, scale = [p.eps for p in points], 100 if accuracy else 1
    low, value, high = ([scale * getattr(p, k) for p in points] for k in ("low", "value", "high"))
    axes.fill_between(eps, low, high, alpha=0.2, linewidth=0)
    axes.plot(eps, value, marker="o")
    axes.axvline(report.eps, color="0.4", linestyle="--", linewidth=1)
    top = 102 if accuracy else 1.1 * max((h for h in high if isfinite(h)), default=0.0) or 1.0
    axes.annotate(f" evaluated at {report.threat}", (report.eps, 0.95 * top), color="0.3", fontsize=9)
    label = "accuracy, %" if accuracy else "worst-case MAE, in the target's units"
    axes.set(xlabel=report.radius_name, ylabel=label, ylim=(0, top), xlim=(0, None))
    axes.set_title(f"{report.curve_attack}, 95 % interval", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_examples(
    model: nn.Module,
    split: Split,
    attack: GradientAttack,
    threat: ThreatModel,
    class_names: list[str] | None,
    *,
    seed: int,
    device: torch.device,
    path: Path,
    num_columns: int = 8,
) -> None:
    """Draw clean images, amplified perturbations and adversarial images, with predictions."""
    subset = stratified(split, num_columns, seed)
    batch = next(iter(subset.batches(num_columns, Place(device=device))))
    generator = torch.Generator(device).manual_seed(seed)
    x_adv, _ = attack.find_failures(model, batch.x, batch.y, threat, generator)
    with attack_mode(model), torch.no_grad():
        before, after = (model(x).argmax(1).tolist() for x in (batch.x, x_adv))
    delta = x_adv - batch.x
    scale = delta.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
    rows = [batch.x, 0.5 + 0.5 * delta / scale, x_adv]
    figure, axes = new_figure(1.35 * len(batch.y), 4.6, 3, len(batch.y))
    names = class_names or [str(k) for k in range(1 + max(*before, *after, *batch.y.tolist()))]
    for column, label in enumerate(batch.y.tolist()):
        for row, images in enumerate(rows):
            cell = axes[row, column]
            cell.imshow(_pixels(images[column]), cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
        for row, guess in ((0, before[column]), (2, after[column])):
            colour = "tab:green" if guess == label else "tab:red"
            axes[row, column].set_title(names[guess], fontsize=9, color=colour)
    for row, title in enumerate(("clean", "change, amplified", "adversarial")):
        axes[row, 0].set_ylabel(title, fontsize=9)
    figure.suptitle(f"{attack.name} at {threat}; correct predictions are green", fontsize=10)
    figure.savefig(path, dpi=120)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure and its axes, which use no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=rows * columns == 1)


def _pixels(image: Tensor) -> Any:
    """Return an image as an array (H, W) or (H, W, 3) for imshow."""
    array = image.detach().cpu().numpy()
    return array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
