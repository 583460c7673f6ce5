"""Start of training: in this process, or on Ray Train workers that restart after failures."""

from __future__ import annotations

import threading
from collections.abc import Callable

from advtrain.cluster import default_device, limit_threads, start_ray
from advtrain.data import Dataset
from advtrain.recipe import Recipe
from advtrain.runs.folder import RunFolder
from advtrain.training.loop import Epochs, Outcome
from advtrain.training.session import Session
from advtrain.training.worker import run_worker, train_epochs

#: Seconds that workers have to save and stop after a stop request before they are killed.
STOP_S = 60.0


def launch(
    recipe: Recipe,
    dataset: Dataset,
    run: RunFolder,
    *,
    address: str | None = None,
    tick: Callable[[], None] = lambda: None,
    interval_s: float = 0.5,
) -> Outcome:
    """Train until the run finishes, stops or fails.

    Training runs in a second thread. The calling thread calls `tick` about twice a second, to track and to show
    progress, and handles signals.

    Raises:
        KeyboardInterrupt: a stop was requested before a worker group had started, which would read the request.
    """
    run.clear_stop()
    attempts = len(run.attempts())
    if recipe.training.num_workers != 0 or recipe.data.stream:
        # from the calling thread: Ray installs signal handlers, and its processes end with the thread that starts them
        start_ray(address)
    training = _TrainingThread(recipe, dataset, run)
    while not training.ended(interval_s):
        tick()
        if recipe.training.num_workers != 0 and run.stop_requested() and len(run.attempts()) == attempts:
            raise KeyboardInterrupt
    return training.outcome()


def launch_epochs(recipe: Recipe, dataset: Dataset, run: RunFolder) -> Epochs:
    """Train as `launch` does, and yield each epoch's metrics when the epoch ends.

    Closing the generator early releases the workers. Ray workers do not pause between yields.
    """
    if recipe.training.num_workers == 0:
        return (yield from train_epochs(recipe, dataset, run, Session(device=default_device())))
    run.clear_stop()
    seen = len(run.metrics())
    training = _TrainingThread(recipe, dataset, run)
    try:
        ended = False
        while not ended:
            ended = training.ended(0.2)
            lines = run.metrics()
            yield from lines[seen:]
            seen = max(seen, len(lines))
        return training.outcome()
    finally:
        run.request_stop()  # the workers save and stop at their next check
        if not training.ended(STOP_S):
            from advtrain.training.on_ray import release_workers

            release_workers(run)


class _TrainingThread:
    """Training in a separate thread."""

    def __init__(self, recipe: Recipe, dataset: Dataset, run: RunFolder) -> None:
        self._result: list[Outcome | BaseException] = []

        def train() -> None:
            try:
                if recipe.training.num_workers == 0:
                    limit_threads()
                    self._result.append(run_worker(recipe, dataset, run, Session(device=default_device())))
                else:
                    from advtrain.training.on_ray import train_on_ray

                    self._result.append(train_on_ray(recipe, dataset, run))
            except BaseException as error:  # noqa: BLE001 (handed to the calling thread, raised there)
                self._result.append(error)

        self._thread = threading.Thread(target=train, name="training", daemon=True)
        self._thread.start()

    def ended(self, wait_s: float) -> bool:
        """Wait at most `wait_s` seconds; return whether training has ended."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def outcome(self) -> Outcome:
        """Return the outcome of training, or raise the error that ended it."""
        (outcome,) = self._result
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
