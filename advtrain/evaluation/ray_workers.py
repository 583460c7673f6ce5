"""Run the work items of an evaluation on Ray actors; each actor loads the model once.

Each actor uses one core or one GPU, so the result of an item does not depend on the number of actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from advtrain.cluster import (
    SharesMemory,
    build_actor_class,
    default_device,
    limit_threads,
    put_shared,
    start_ray,
)
from advtrain.environment import tune_malloc
from advtrain.errors import UserError
from advtrain.evaluation.worst_case import Runner, WorkItem, WorkResult


class AnyEvaluator(Protocol):
    """Runs work items: an `Evaluator` of attacks on tensors, or an `EditEvaluator`."""

    def do(self, item: WorkItem) -> WorkResult:
        """Run one item."""
        ...

    def run(self, items: Sequence[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
        """Run items one after another."""
        ...


class EvaluatorFactory(SharesMemory, Protocol):
    """Loads the model onto a device and returns its evaluator."""

    def __call__(self, device: torch.device) -> AnyEvaluator:
        """Load the model on `device` and return its evaluator."""


@dataclass(frozen=True)
class Workers:
    """Number of Ray actors that run work items, and the address of their cluster.

    `number` is 0 for no actors: items run in this process. None is one actor per GPU of the cluster, or per core if it
    has no GPUs.
    """

    number: int | None = 0
    address: str | None = None


#: No Ray actors: work items run in this process.
HERE = Workers(0)


class _Actor:
    """Ray actor that builds its evaluator before its first item, also after a restart.

    The factory comes with each item, because constructor arguments would not survive a restart.
    """

    evaluator: AnyEvaluator | None = None

    def ping(self) -> None:
        """Return nothing; the reply shows that the actor has started."""

    def do(self, case: list[Any], item: WorkItem) -> WorkResult | UserError:
        import ray

        try:
            if self.evaluator is None:
                torch.set_num_threads(1)
                tune_malloc()
                self.evaluator = ray.get(case[0])(default_device())
            return self.evaluator.do(item)
        except UserError as error:  # returned, because Ray would retry a raised error
            return error


def build_runner(make: EvaluatorFactory, workers: Workers, device: torch.device | None = None) -> Runner:
    """Return a runner of work items, which builds evaluators when the first item arrives."""
    if workers.number == 0:
        evaluator: list[AnyEvaluator] = []

        def run_here(items: Sequence[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
            if items and not evaluator:
                limit_threads()
                evaluator.append(make(device or default_device()))
            return evaluator[0].run(items) if items else iter(())

        return run_here
    return _RayRunner(make, workers).run


class _RayRunner:
    def __init__(self, make: EvaluatorFactory, workers: Workers) -> None:
        self.make, self.workers = make, workers
        self.started: list[Any] = []
        self.starting: dict[Any, tuple[Any, None]] = {}  # key: ObjectRef of the actor's ping
        self.case: list[Any] = []

    def run(self, items: Sequence[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
        """Run items on all actors that have started, and yield results as they arrive.

        Each actor has one item running and one queued. An actor gets items only after it has started, so no item
        waits for an actor that still waits for cluster resources.
        """
        import ray

        if not items:
            return
        self._start(len(items))
        waiting = list(reversed(items))
        running: dict[Any, tuple[Any, WorkItem | None]] = dict(self.starting)
        idle = self.started * 2
        while waiting or any(item is not None for _, item in running.values()):
            while waiting and idle:
                actor, item = idle.pop(0), waiting.pop()
                running[actor.do.remote(self.case, item)] = (actor, item)
            (ready, *_), _ = ray.wait(list(running))
            actor, done = running.pop(ready)
            result = ray.get(ready)
            idle.append(actor)
            if done is None:
                del self.starting[ready]
                self.started.append(actor)
                idle.append(actor)
            elif isinstance(result, UserError):
                raise result
            else:
                yield done, result

    def _start(self, num_items: int) -> None:
        """Start actors, at most one per item.

        Ray restarts an actor that dies and retries its item, with the same result.
        """
        import ray

        start_ray(self.workers.address)
        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0))
        number = self.workers.number or gpus or int(have.get("CPU", 1))
        if number > (gpus or have.get("CPU", 1)):
            kind = "GPUs" if gpus else "cores"
            slots = f"{gpus or have['CPU']:g}"
            raise UserError(f"{number} evaluation workers need {number} {kind}; the cluster has {slots}")
        kind_of_actor = build_actor_class(_Actor, on_gpu=gpus > 0)
        if not self.case:
            self.case = [put_shared(self.make)]  # in a list: Ray passes the reference, not the object
        for _ in range(min(number, num_items) - len(self.started) - len(self.starting)):
            actor = kind_of_actor.remote()
            self.starting[actor.ping.remote()] = (actor, None)
