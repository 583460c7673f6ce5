"""Samples that are attacked step by step in batches that stay full.

A sample that falls leaves its batch. As soon as those that are left fit into fewer batches they are cut anew: of n
samples that stand, a step takes ceil(n / batch size) passes.
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
    """What knows something of each of n samples: can be cut to some of them, and joined."""

    def take(self, index: Tensor) -> Self:
        """Return what is known of these samples: `index` (M,) int64 or (n,) bool."""
        ...

    def join(self, others: Sequence[Self]) -> Self:
        """Return what is known of these samples and the others'."""
        ...


@dataclass
class State:
    """What is known of the samples of a batch: every field is a tensor with a row for each, or `Rows`."""

    rows: Tensor  # (n,) int64: their numbers

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Self:
        """Return the state of these samples: `index` (M,) int64 or (n,) bool."""
        return type(self)(
            **{
                name: value[index] if isinstance(value, Tensor) else value.take(index)
                for name, value in vars(self).items()
            }
        )

    def without(self, index: Tensor) -> Self:
        """Return the state of all samples but these: `index` (M,) int64."""
        if len(index) == 0:
            return self
        going = torch.ones(len(self), dtype=torch.bool, device=index.device)
        going[index] = False
        return self.take(going)


S = TypeVar("S", bound=State)


def advance(batches: list[S], step: Callable[[S], S], size: int | None) -> list[S]:
    """Take a step with every batch; `step` returns the state of those of its samples that go on.

    The list given is emptied as it goes, so that no batch is kept as it was.
    """
    for k in range(len(batches)):
        batches[k] = step(batches[k])
    batches = [left for left in batches if len(left)]
    if size is not None and len(batches) > 1 and sum(map(len, batches)) <= (len(batches) - 1) * size:
        return _recut(batches, size)
    return batches


def _recut(batches: list[S], size: int) -> list[S]:
    """Cut the samples of `batches`, which are emptied, into as few as can be: field by field, to hold none twice but
    the one that moves."""
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
    """Return the numbers of the samples of x (N, ...), at most `size` at a time; None: all at once."""
    return torch.split(torch.arange(len(x), device=x.device), size or max(1, len(x)))


@dataclass
class Attacked(State):
    """A batch of samples, and what is climbed to fool the model on them."""

    x: Tensor  # (n, ...): the clean inputs
    y: Tensor  # (n,) int64
    loss: AttackLoss


#: Inputs (n, ...) and the loss to climb (None: no gradient is wanted) -> its gradient (n, ...), logits (n, K).
Ask = Callable[[Tensor, AttackLoss | None], tuple[Tensor, Tensor]]


class Failures:
    """What has been found among the inputs x (N, ...): for each sample the first input that fooled the model."""

    def __init__(self, x: Tensor) -> None:
        self.x_adv, self.fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def keep(self, rows: Tensor, y: Tensor, z: Tensor, logits: Tensor) -> Tensor:
        """Keep those inputs z (n, ...) of samples `rows` (n,) that fool the model; return which do, (n,) bool."""
        new = predictions(logits) != y
        if new.any():
            self.x_adv[rows[new]] = z[new].view(-1, *self.x_adv.shape[1:])
            self.fooled[rows[new]] = True
        return new


@dataclass
class Climbing(Attacked):
    """A batch whose loss is climbed."""

    z: Tensor  # (n, ...): the present iterate
    best: Tensor  # the iterate of the highest loss
    best_gradient: Tensor
    best_loss: Tensor  # (n,)

    def note(self, gradient: Tensor, value: Tensor) -> None:
        """Keep the iterate with its gradient where its loss `value` (n,) is the highest so far."""
        higher = value > self.best_loss
        wide = alongside(higher, gradient)
        self.best_loss = torch.where(higher, value, self.best_loss)
        self.best = torch.where(wide, self.z, self.best)
        self.best_gradient = torch.where(wide, gradient, self.best_gradient)


C = TypeVar("C", bound=Climbing)


@dataclass
class Climb:
    """What a climb is made with."""

    ask: Ask
    failures: Failures
    threat: ThreatModel
    generator: torch.Generator | None
    num_steps: int
    batch_size: int | None

    def drop_fallen(self, state: C, gradient: Tensor, logits: Tensor) -> tuple[C, Tensor, Tensor]:
        """Keep the iterates that fool the model; return state, gradients and logits of the samples that stand."""
        going = ~self.failures.keep(state.rows, state.y, state.z, logits)
        return (
            (state, gradient, logits) if going.all() else (state.take(going), gradient[going], logits[going])
        )

    def finish(self, batches: Sequence[C]) -> None:
        """Look at the last iterates."""
        for state in batches:
            self.failures.keep(state.rows, state.y, state.z, self.ask(state.z, None)[1])


def in_parts(
    search: Callable[[Tensor, Tensor, ThreatModel], tuple[Tensor, Tensor]],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    size: int | None,
) -> tuple[Tensor, Tensor]:
    """Return what `search(x, y, threat)` gives, at most `size` samples at a time: an attack that none leaves early."""
    found = [search(x[rows], y[rows], threat.rows(rows)) for rows in parts(x, size)]
    first, second = zip(*found, strict=True)
    return torch.cat(first), torch.cat(second)
