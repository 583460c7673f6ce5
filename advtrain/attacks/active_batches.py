"""Batches of samples under attack, from which broken samples are removed after each step.

When the remaining samples fit into fewer batches, the batches are rebuilt. With n robust samples left, a step takes
ceil(n / batch size) passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from advtrain.attacks.base import predictions
from advtrain.attacks.losses import AttackLoss
from advtrain.threat import ThreatModel, alongside


class Rows(Protocol):
    """Data of n samples that can be indexed by sample and concatenated."""

    def take(self, index: Tensor) -> Self:
        """Return the data of the samples `index`, (M,) int64 or (n,) bool."""
        ...

    def join(self, others: Sequence[Self]) -> Self:
        """Return the data of these samples followed by those of `others`."""
        ...


@dataclass
class State:
    """State of a batch: every field has one row per sample, as a tensor or as `Rows`."""

    rows: Tensor  # (n,) int64: sample indices

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Self:
        """Return the state of the samples `index`, (M,) int64 or (n,) bool."""
        return type(self)(
            **{
                name: value[index] if isinstance(value, Tensor) else value.take(index)
                for name, value in vars(self).items()
            }
        )

    def without(self, index: Tensor) -> Self:
        """Return the state without the samples `index`, (M,) int64."""
        if len(index) == 0:
            return self
        going = torch.ones(len(self), dtype=torch.bool, device=index.device)
        going[index] = False
        return self.take(going)


S = TypeVar("S", bound=State)


def advance(batches: list[S], step: Callable[[S], S], size: int | None) -> list[S]:
    """Advance every batch by one step, and rebuild the batches if fewer suffice.

    `step` returns the state of the samples that continue. The list `batches` is overwritten, which frees each old
    batch.
    """
    for k in range(len(batches)):
        batches[k] = step(batches[k])
    batches = [left for left in batches if len(left)]
    if size is not None and len(batches) > 1 and sum(map(len, batches)) <= (len(batches) - 1) * size:
        return _recut(batches, size)
    return batches


def _recut(batches: list[S], size: int) -> list[S]:
    """Redistribute the samples of `batches` into as few batches as possible.

    Works field by field, so that only one field is in memory twice. `batches` is emptied.
    """
    pieces = torch.split(torch.arange(sum(map(len, batches)), device=batches[0].rows.device), size)
    cut: list[dict[str, Any]] = [{} for _ in pieces]
    for name in [field.name for field in fields(batches[0])]:
        values = [vars(batch).pop(name) for batch in batches]
        whole = torch.cat(values) if isinstance(values[0], Tensor) else values[0].join(values[1:])
        del values
        for known, piece in zip(cut, pieces, strict=True):
            known[name] = whole[piece] if isinstance(whole, Tensor) else whole.take(piece)
        del whole
    return [type(batches[0])(**known) for known in cut]


def parts(x: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Return the sample indices of x (N, ...) in chunks of at most `size`; None: one chunk."""
    return torch.split(torch.arange(len(x), device=x.device), size or max(1, len(x)))


@dataclass
class Attacked(State):
    """Batch of samples under attack, with the loss to maximize."""

    x: Tensor  # (n, ...): the clean inputs
    y: Tensor  # (n,) int64
    loss: AttackLoss


#: (inputs (n, ...), loss to maximize or None for no gradient) -> (its gradient (n, ...), logits (n, K)).
Ask = Callable[[Tensor, AttackLoss | None], tuple[Tensor, Tensor]]


class Failures:
    """First adversarial example found for each sample of x (N, ...)."""

    def __init__(self, x: Tensor) -> None:
        self.x_adv, self.fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def keep(self, rows: Tensor, y: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        """Store the inputs z (n, ...) that fool the model, and return which do, (n,) bool.

        `rows` (n,) are the sample indices of z.
        """
        new = predictions(logits) != y
        if new.any():
            self.x_adv[rows[new]] = z[new].view(-1, *self.x_adv.shape[1:])
            self.fooled[rows[new]] = True
        return new


@dataclass
class Climbing(Attacked):
    """Batch of samples under gradient ascent on the loss."""

    z: Tensor  # (n, ...): current iterate
    best: Tensor  # iterate with the highest loss
    best_gradient: Tensor
    best_loss: Tensor  # (n,)

    def note(self, gradient: Tensor, value: Tensor) -> None:
        """Store the iterate and its gradient where its loss `value` (n,) is the highest so far."""
        higher = value > self.best_loss
        wide = alongside(higher, gradient)
        self.best_loss = torch.where(higher, value, self.best_loss)
        self.best = torch.where(wide, self.z, self.best)
        self.best_gradient = torch.where(wide, gradient, self.best_gradient)


C = TypeVar("C", bound=Climbing)


@dataclass
class Climb:
    """Settings of a gradient ascent, and the store for its adversarial examples."""

    ask: Ask
    failures: Failures
    threat: ThreatModel
    generator: torch.Generator | None
    num_steps: int
    batch_size: int | None

    def drop_fallen(self, state: C, gradient: Tensor, logits: Tensor) -> tuple[C, Tensor, Tensor]:
        """Store the iterates that fool the model, and drop their samples.

        Returns the state, gradients and logits of the samples that are still robust.
        """
        going = ~self.failures.keep(state.rows, state.y, state.z, logits)
        return (
            (state, gradient, logits) if going.all() else (state.take(going), gradient[going], logits[going])
        )

    def finish(self, batches: Sequence[C]) -> None:
        """Run the model on the last iterates, and store those that fool it."""
        for state in batches:
            self.failures.keep(state.rows, state.y, state.z, self.ask(state.z, None)[1])


def in_parts(
    search: Callable[[Tensor, Tensor, ThreatModel], tuple[Tensor, Tensor]],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    size: int | None,
) -> tuple[Tensor, Tensor]:
    """Run `search(x, y, threat)` on at most `size` samples at a time, and join the results.

    For attacks that no sample leaves early.
    """
    found = [search(x[rows], y[rows], threat.rows(rows)) for rows in parts(x, size)]
    first, second = zip(*found, strict=True)
    return torch.cat(first), torch.cat(second)
