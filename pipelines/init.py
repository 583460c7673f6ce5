"""A first recipe for a data set, with the reason for each choice."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import yaml

from advtrain.data import DataConfig, Dataset
from advtrain.data.batches import ArraySplit
from advtrain.data.inputs import decode
from advtrain.data.summary import DataSummary
from advtrain.documents import parse_yaml
from advtrain.errors import UserError
from advtrain.recipe import Recipe, parse_recipe
from pipelines.data import data_settings
from pipelines.workspace import Workspace, open_data

#: Radii from which the first one is taken that the classes of the data allow.
RADII = ("0.1", "0.05", "8/255", "0.02", "4/255", "0.01", "2/255", "0.005", "1/255")
#: Largest share of samples that may lie within two radii of a sample of another class.
MOST_CLOSE = 0.05
#: Training samples whose distances are measured.
_MEASURED = 500
#: Optimizer steps of the training.
_STEPS = 4000


@dataclass(frozen=True)
class Draft:
    """Recipe for a data set, which is not written yet."""

    recipe: Recipe
    text: str  # YAML with comments
    reasons: list[str]  # sentences on the radius
    summary: DataSummary


def draft(data: str, workspace: Workspace, overrides: list[str] | None = None) -> Draft:
    """Return a recipe that trains a first model on the data.

    Args:
        data: path, or name of a built-in data set.
        workspace: locations of data and Ray.
        overrides: settings of the data, such as "data.label=species".

    Raises:
        UserError: the data is missing or cannot be used; the message names the first fault.
    """
    gpu = torch.cuda.is_available()
    config = data_settings(data, workspace, overrides)
    dataset, config = _open(config, workspace, largest=224 if gpu else 64)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(data).name.removesuffix(Path(data).suffix)).strip("._-")
    name = name[:80] or "model"
    if dataset.text is not None:
        raise UserError("init suggests no radius for texts; start with a shipped recipe, such as trec")
    data_lines = _within(config, workspace.data_root).model_dump(exclude_unset=True)
    eps, reasons = suggest_radius(dataset)
    text = _written(name, data_lines, dataset, eps, reasons, gpu)
    recipe = parse_recipe(parse_yaml(text, "recipe"), name)
    return Draft(recipe, text, reasons, DataSummary.of(dataset))


def write(made: Draft, file: Path) -> None:
    """Write the recipe to a new file.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    try:
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(made.text)
    except FileExistsError:
        raise UserError(f"'{file}' exists; name another file with --output") from None
    except OSError as error:
        raise UserError(f"cannot write '{file}': {error.strerror}") from error


def suggest_radius(dataset: Dataset) -> tuple[str, list[str]]:
    """Return an L-inf radius, such as "8/255", and sentences that give the reason.

    It is the usual radius of such data, or a smaller one if more than 5 percent of the samples lie within two radii of
    a sample of another class: no classifier is robust on both of such a pair (Yang et al. 2020, arXiv 2003.02460).
    """
    usual, kind = _usual_radius(dataset)
    reasons = [f"eps {usual} is {kind}."]
    if dataset.regression or not isinstance(dataset.train, ArraySplit):
        return usual, reasons
    nearest = distance_to_other_class(dataset)
    shares = {eps: (nearest <= 2 * float(Fraction(eps))).double().mean().item() for eps in RADII}
    allowed = [eps for eps in RADII[RADII.index(usual) :] if shares[eps] <= MOST_CLOSE]
    radius = allowed[0] if allowed else RADII[-1]
    for eps in dict.fromkeys((usual, radius)):
        where = "of a sample of another class"
        reasons.append(
            f"With eps {eps}, {shares[eps]:.0%} of {len(nearest)} samples lie within 2 eps {where}."
        )
    return radius, reasons


def distance_to_other_class(dataset: Dataset) -> torch.Tensor:
    """Return L-inf distances of training samples to the nearest of another class, (N,) float32.

    At most 500 evenly spaced training samples are compared with each other, so the distances are upper bounds.
    """
    train = dataset.train
    assert isinstance(train, ArraySplit)
    rows = torch.linspace(0, len(train) - 1, min(_MEASURED, len(train))).long().numpy()
    x = torch.from_numpy(decode({"arrays": train.images[rows]}, dataset.shape)).flatten(1)
    labels = torch.from_numpy(train.labels[rows])
    distances = torch.cdist(x, x, p=float("inf"))
    same = labels[:, None] == labels[None, :]
    return distances.masked_fill(same, float("inf")).amin(1)


def _usual_radius(dataset: Dataset) -> tuple[str, str]:
    """Return the usual radius of such data, and what it is."""
    if len(dataset.shape) != 3:
        return "0.05", "a start for tables, whose columns are scaled to [0, 1]"
    if dataset.shape[0] == 1 and isinstance(dataset.train, ArraySplit):
        values, top = dataset.train.images[:1000], 255 if dataset.eight_bit else 1
        if ((values < 0.1 * top) | (values > 0.9 * top)).mean() > 0.6:
            return "0.1", "usual for gray images that are nearly black and white"
    if max(dataset.shape[1:]) > 64:
        return "4/255", "usual for large images (ImageNet in RobustBench)"
    return "8/255", "usual for small images (CIFAR-10 in RobustBench)"


def _open(config: DataConfig, workspace: Workspace, largest: int) -> tuple[Dataset, DataConfig]:
    """Load the data; images of several sizes or of a side above `largest` are resized."""
    files = config.source == "image_folder" or (config.source == "parquet" and config.label is None)
    if not files or config.image_size is not None:
        return open_data(config, workspace), config
    resized = config.model_copy(update={"image_size": largest})
    dataset = open_data(resized, workspace)
    sides = {side for size in dataset.found.sizes for side in size.split("x")}
    if len(dataset.found.sizes) == 1 and len(sides) == 1 and int(sides.pop()) <= largest:
        return open_data(config, workspace), config
    return dataset, resized


def _within(config: DataConfig, root: Path) -> DataConfig:
    """Return the settings with a path relative to the data root if it lies there."""
    if config.path is None or not Path(config.path).is_relative_to(root):
        return config
    return config.model_copy(update={"path": str(Path(config.path).relative_to(root))})


def _written(
    name: str, data: dict[str, Any], dataset: Dataset, eps: str, reasons: list[str], gpu: bool
) -> str:
    """Return the recipe as YAML with comments."""
    n = len(dataset.train)
    batch = 128 if n >= 2000 else 32
    epochs = max(5, min(50, _STEPS * batch // n))
    model, optimizer, more = _model(dataset, gpu)
    loss, term, judge = "", "adv_ce", ""
    if dataset.regression:
        loss, term = ", loss: mse", "adv_mse"
        judge = "  attack: {loss: mae, num_steps: 50, num_restarts: 5}\n  validation: {loss: mae, num_steps: 10}\n"
    flip = "  # for photographs without text, also: augment: {crop: 4, flip: true}\n"
    return (
        f"{yaml.safe_dump({'name': name, 'data': data}, sort_keys=False, allow_unicode=True)}"
        f"{flip if dataset.shape[0] == 3 and len(dataset.shape) == 3 else ''}"
        f"model: {model}\n"
        f"{''.join(f'# {sentence}{chr(10)}' for sentence in reasons)}"
        f"adversary: {{name: pgd, norm: linf, eps: {eps}, num_steps: 10{loss}}}\n"
        f"objective: {{{term}: 1}}\n"
        f"optimizer: {optimizer}\n"
        f"training: {{epochs: {epochs}, batch_size: {batch}{more}}}\n"
        f"evaluation:\n  threat: {{norm: linf, eps: {eps}}}\n{judge}"
        f"{'  validation_samples: 1000' + chr(10) if len(dataset.validation) > 1000 else ''}"
    )


def _model(dataset: Dataset, gpu: bool) -> tuple[str, str, str]:
    """Return the model, the optimizer and further settings of the training."""
    adam = "{name: adamw, lr: 2e-3, schedule: {kind: one_cycle}}"
    if len(dataset.shape) != 3:
        return "{name: mlp}", adam, ""
    if dataset.shape[0] == 1 or not gpu:
        width = "{name: cnn2, args: {width: 32}}"
        return width if max(dataset.shape[1:]) > 8 else "{name: cnn2}", adam, ""
    large = max(dataset.shape[1:]) > 64
    return (
        "{name: torchvision:resnet18}" if large else "{name: preact_resnet18}",
        "{name: momentum, lr: 0.1, weight_decay: 5e-4, ema_decay: 0.999, schedule: {kind: cosine}}",
        ", precision: bf16, channels_last: true",
    )
