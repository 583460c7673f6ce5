"""Two pictures: accuracy against epsilon with its interval, and what the attack does to single images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advtrain.attacks import REGRESSION_LOSSES, GradientAttack, attacked
from advtrain.data import Place, Split, stratified
from advtrain.evaluation.errors import Estimate, attack_targets
from advtrain.evaluation.report import Share
from advtrain.evaluation.suite import attack_samples
from advtrain.threat import ThreatModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Radii of the curve, in multiples of the threat model's.
CURVE_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def robustness_curve(
    model: nn.Module,
    split: Split,
    attack: GradientAttack,
    threat: ThreatModel,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    num_samples: int = 500,
) -> list[tuple[float, Share | Estimate]]:
    """Return (radius, accuracy), or of a regression worst-case MAE, from 0 to twice the threat model's radius."""
    subset = stratified(split, num_samples, seed)
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "device": device}
    points: list[tuple[float, Share | Estimate]] = []
    for factor in CURVE_FACTORS:
        clean: Share | Estimate
        robust: Share | Estimate
        if attack.config.loss in REGRESSION_LOSSES:
            errors = attack_targets(model, subset, attack, threat.scaled(factor), **how)
            clean, robust = Estimate.of(errors.clean, "mae"), Estimate.of(errors.robust, "mae")
        else:
            samples = attack_samples(model, subset, [attack], threat.scaled(factor), **how)
            clean, robust = Share.of(samples.clean), Share.of(samples.robust)
        points += [(threat.eps * factor, robust)] if points else [(0.0, clean), (threat.eps * factor, robust)]
    return points


def draw_curve(
    points: Sequence[tuple[float, Share | Estimate]],
    threat: ThreatModel,
    attack: GradientAttack,
    path: Path,
) -> None:
    """Draw accuracy, or worst-case MAE, against epsilon, with the judge's radius marked."""
    figure, axes = new_figure(6.4, 4.2)
    eps = [e for e, _ in points]
    accuracy = isinstance(points[0][1], Share)
    unit = 100 if accuracy else 1
    low, value, high = ([unit * getattr(s, k) for _, s in points] for k in ("low", "value", "high"))
    axes.fill_between(eps, low, high, alpha=0.2, linewidth=0)
    axes.plot(eps, value, marker="o")
    axes.axvline(threat.eps, color="0.4", linestyle="--", linewidth=1)
    top = 102 if accuracy else 1.1 * max(high)
    axes.annotate(f" judged at {threat}", (threat.eps, 0.95 * top), color="0.3", fontsize=9)
    label = "accuracy, %" if accuracy else "worst-case MAE, in the target's units"
    axes.set(xlabel=f"epsilon ({threat.norm})", ylabel=label, ylim=(0, top), xlim=(0, None))
    axes.set_title(f"{attack.name}, test samples, 95 % interval", fontsize=10)
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
    """Draw clean image, amplified perturbation and adversarial image, with both predictions, side by side."""
    subset = stratified(split, num_columns, seed)
    batch = next(iter(subset.batches(num_columns, Place(device=device))))
    generator = torch.Generator(device).manual_seed(seed)
    x_adv, _ = attack.find_failures(model, batch.x, batch.y, threat, generator)
    with attacked(model), torch.no_grad():
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
    figure.suptitle(f"{attack.name} at {threat}; predictions green where right", fontsize=10)
    figure.savefig(path, dpi=120)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=rows * columns == 1)


def _pixels(image: Tensor) -> Any:
    """Return (H, W) or (H, W, 3) for imshow."""
    array = image.detach().cpu().numpy()
    return array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
