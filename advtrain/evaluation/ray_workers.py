"""An evaluation's items over Ray: actors that load the model once, each given the next item as it finishes one.

Every actor computes on one core (or one GPU), so that an item's result does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from advtrain.cluster import default_device, start_ray
from advtrain.environment import tune_malloc
from advtrain.errors import UserError
from advtrain.evaluation.worst_case import Evaluator, Runner, WorkItem, WorkResult

#: Makes an evaluator on a device; loading the model is part of it.
EvaluatorFactory = Callable[[torch.device], Evaluator]


@dataclass(frozen=True)
class Workers:
    """Where items are done: `number` actors of the cluster at `address`; 0: in this process; None: one for each
    GPU of the cluster, or where it has none for each core."""

    number: int | None = 0
    address: str | None = None


#: In this process.
HERE = Workers(0)


class _Actor:
    """Fetches the case with its first item, also after a restart: constructor arguments would not outlive it."""

    evaluator: Evaluator | None = None

    def ping(self) -> None:
        """Answer: the process is there."""

    def do(self, case: list[Any], item: WorkItem) -> WorkResult | UserError:
        import ray

        try:
            if self.evaluator is None:
                torch.set_num_threads(1)
                tune_malloc()
                self.evaluator = ray.get(case[0])(default_device())
            return self.evaluator.do(item)
        except UserError as error:  # the same wherever the item is done: do not let Ray try again
            return error


def build_runner(make: EvaluatorFactory, workers: Workers, device: torch.device | None = None) -> Runner:
    """Return what does items; evaluators are built when the first work item comes."""
    if workers.number == 0:
        evaluator: list[Evaluator] = []

        def run_here(items: Sequence[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
            if items and not evaluator:
                evaluator.append(make(device or default_device()))
            return evaluator[0].run(items) if items else iter(())

        return run_here
    return _RayRunner(make, workers).run


class _RayRunner:
    def __init__(self, make: EvaluatorFactory, workers: Workers) -> None:
        self.make, self.workers = make, workers
        self.started: list[Any] = []
        self.starting: dict[Any, tuple[Any, None]] = {}  # by the answer that says that it has started
        self.case: list[Any] = []

    def run(self, items: Sequence[WorkItem]) -> Iterator[tuple[WorkItem, WorkResult]]:
        """Keep every actor that has started busy, with one more item waiting; yield results as they come.

        An actor for which the cluster has no room at present gets nothing, so that nothing waits for it.
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
        """Start actors, no more than items. One that dies is started again and its item done again: the result is
        the same."""
        import ray

        start_ray(self.workers.address, self.workers.number or 0)
        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0))
        number = self.workers.number or gpus or int(have.get("CPU", 1))
        if number > (gpus or have.get("CPU", 1)):
            kind = "GPUs" if gpus else "cores"
            slots = f"{gpus or have['CPU']:g}"
            raise UserError(f"{number} evaluation workers need as many {kind}; the cluster has {slots}")
        options = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
        kind_of_actor = ray.remote(max_restarts=5, max_task_retries=5, **options)(_Actor)
        if not self.case:
            self.case = [ray.put(self.make)]  # in a list: handed on as it is, not fetched for every item
        for _ in range(min(number, num_items) - len(self.started) - len(self.starting)):
            actor = kind_of_actor.remote()
            self.starting[actor.ping.remote()] = (actor, None)
