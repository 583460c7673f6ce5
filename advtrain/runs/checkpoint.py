"""Checkpoints: safetensors for tensors, JSON for the rest, no pickle, one atomic rename.

A checkpoint has no random number state. Data order, augmentation, random starts and dropout are each a function of
(seed, epoch, step, rank), so the position is enough.

    step-00000120/  model.safetensors  optimizer.safetensors  [average.safetensors]  [replayed.safetensors]
                    state.json
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from advtrain.documents import read_record
from advtrain.errors import UserError
from advtrain.runs.folder import FILE_MODE
from advtrain.runs.sealed import sealed_json, unsealed

Tensors = dict[str, Tensor]


@dataclass
class TrainState:
    """State that a resume needs."""

    step: int  # optimizer steps done
    epoch: int  # epochs finished
    step_in_epoch: int  # steps done in the current epoch
    recipe_digest: str
    model: Tensors
    optimizer: Tensors
    average: Tensors | None = None
    replayed: Tensors | None = None  # free training: delta, the perturbation carried from batch to batch
    sums: dict[str, float] = field(default_factory=dict)  # metrics summed over the current epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics of every finished epoch
    seconds: float = 0.0  # training time so far
    epoch_seconds: float = 0.0  # training time of the current epoch

    def best_weights(self) -> Tensors:
        """Return the weights or their average, whichever was more robust on the validation split."""
        last = self.history[-1] if self.history else {}
        if self.average is None or robustness(last, "average_") <= robustness(last):
            return self.model
        return {k.removeprefix("module."): v for k, v in self.average.items() if k.startswith("module.")}

    @property
    def score(self) -> float | None:
        """Robustness on the validation split (higher is better); None if not measured."""
        if self.step_in_epoch or not self.history:
            return None
        best = max(robustness(self.history[-1]), robustness(self.history[-1], "average_"))
        return best if best > float("-inf") else None


def robustness(line: dict[str, Any], weights: str = "") -> float:
    """Return the validation robustness of an epoch; -infinity if not measured or not finite.

    It is the robust accuracy, or for regression minus the robust MAE.
    `weights` is "" for the weights themselves or "average_" for their average.
    """
    for sign, name in ((-1, f"val_{weights}robust_mae"), (1, f"val_{weights}robust_accuracy")):
        if (value := line.get(name)) is not None and math.isfinite(value):
            return sign * float(value)
    return float("-inf")


def save_checkpoint(state: TrainState, folder: Path, keep: int) -> Path:
    """Write `folder/step-XXXXXXXX` atomically; keep only the newest `keep` and the best.

    Raises:
        UserError: the disk is full or the folder is not writable; earlier checkpoints are untouched.
    """
    target = folder / f"step-{state.step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    parts = {
        "model": state.model,
        "optimizer": state.optimizer,
        "average": state.average,
        "replayed": state.replayed,
    }
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        digests = {}
        for name, tensors in parts.items():
            if tensors is not None:
                file = temporary / f"{name}.safetensors"
                # Cloned: safetensors rejects tensors that share memory, such as tied weights.
                save_file({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, file)
                digests[name] = _digest(file)
        rest = {key: value for key, value in vars(state).items() if key not in parts}
        values = rest | {"digests": digests, "score": state.score}
        (temporary / "state.json").write_text(sealed_json(values, indent=None))
        for file in temporary.iterdir():
            file.chmod(FILE_MODE)
            _sync(file)
        if target.exists():  # the same step again, after a fallback to an older checkpoint
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint '{target}': {error}; "
            "the previous checkpoints are untouched: make room, then resume"
        ) from error
    _prune(folder, keep, target)
    return target


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary folders that interrupted saves have left."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: Path) -> TrainState:
    """Read one checkpoint and verify the digests of its state and of every file.

    Raises:
        UserError: a file is missing, truncated or altered.
    """
    try:
        values = unsealed(read_record(path / "state.json"))
        tensors: dict[str, Tensors] = {}
        for name, digest in values.pop("digests").items():
            file = path / f"{name}.safetensors"
            if _digest(file) != digest:
                raise UserError(f"checkpoint '{path}': {file.name} is damaged (its digest differs)")
            tensors[name] = load_file(file)
        del values["score"]
        return TrainState(**values, **tensors)  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"checkpoint '{path}' is damaged: {error}") from error


def latest_checkpoint(folder: Path) -> tuple[TrainState | None, list[str]]:
    """Return the newest intact checkpoint, and a message for each damaged one skipped."""
    passed: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load_checkpoint(path), passed
        except UserError as error:
            passed.append(f"{error}; falling back to the previous one")
    return None, passed


def validated_checkpoints(folder: Path) -> Iterator[tuple[Path, float]]:
    """Yield (path, score) of intact checkpoints at the end of validated epochs, newest first."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            score = load_checkpoint(path).score
        except UserError:
            continue
        if score is not None:
            yield path, score


def best_checkpoint(folder: Path) -> TrainState:
    """Return the checkpoint with the highest validation robustness; the latest of equals.

    Raises:
        UserError: there is no intact checkpoint.
    """
    for path in sorted(folder.glob("step-*"), key=lambda p: (_score(p), p.name), reverse=True):
        try:
            return load_checkpoint(path)
        except UserError:
            continue
    raise UserError(f"there is no intact checkpoint in '{folder}'")


def _prune(folder: Path, keep: int, newest: Path) -> None:
    # checkpoints of later steps are damaged: training fell back to an older one
    paths = sorted(path for path in folder.glob("step-*") if path.name <= newest.name)
    best = max(paths, key=lambda p: (_score(p), p.name))
    for path in paths[:-keep]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def _score(path: Path) -> float:
    try:
        score = unsealed(read_record(path / "state.json"))["score"]
    except (OSError, ValueError, KeyError):
        return float("-inf")
    return float("-inf") if score is None else float(score)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
