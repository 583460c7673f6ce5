"""The loop is only calls: step, validate, save, report, epoch after epoch; and when to end early."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from advtrain.attacks import build_attack
from advtrain.data import BatchPlan, Dataset, stratified
from advtrain.errors import UserError
from advtrain.evaluation import validation_accuracy, validation_errors
from advtrain.optim import lr_factor, optimizer_tensors
from advtrain.optim.averaging import recompute_statistics
from advtrain.recipe import Recipe
from advtrain.runs.checkpoint import TrainState, remove_unfinished, save_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.training.failures import straggler
from advtrain.training.guard import collapsed
from advtrain.training.session import Session, average_buffers
from advtrain.training.sharded import whole
from advtrain.training.signals import Signals
from advtrain.training.step import Components, perturb, train_step

#: Steps between looks at the stop request and, on a GPU, at whether gradients are finite (each look waits).
CHECK_STEPS = 10
#: Training batches over which batch norm's statistics of an SWA average are taken.
STATISTICS_STEPS = 32
#: Seconds between writes of progress.json.
PROGRESS_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended; `message` says why it did not finish. The last two never leave `worker.py`."""

    status: Literal["finished", "stopped", "failed", "collapsed", "changed"]
    message: str = ""
    line: dict[str, Any] | None = None  # the metrics of the epoch that collapsed


#: Training as it goes: the metrics of each finished epoch, and in the end the outcome.
Epochs = Generator[dict[str, Any], None, Outcome]


class _Ended(Exception):  # noqa: N818 (not an error: it unwinds the loop with its outcome)
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


class TrainingLoop:
    """Epochs over the training split. Rank 0 writes; all ranks take every decision together."""

    def __init__(
        self,
        written: Recipe,  # as the user wrote it
        recipe: Recipe,  # what is in force of it from where the state stands: see Recipe.in_force
        dataset: Dataset,
        run: RunFolder,
        session: Session,
        parts: Components,
        state: TrainState | None,
        remarks: list[str],  # what the user should know about how it started
    ) -> None:
        self.recipe, self.dataset, self.run_folder = recipe, dataset, run
        self.session, self.parts, self.remarks = session, parts, remarks
        self.step = state.step if state else 0
        self.epoch = state.epoch if state else 0
        changes = written.training.changes
        self.recipe_digest = written.until(
            self.epoch + 1
        ).digest()  # for the checkpoints up to the next change
        self.until = min([c.epoch for c in changes if c.epoch > self.epoch], default=recipe.training.epochs)
        changing = {path for change in changes for path in change.settings}
        self.changing = {
            f"set/{path}": value
            for path, value, _ in recipe.leaves()
            if path in changing and isinstance(value, int | float)
        }
        self.step_in_epoch = state.step_in_epoch if state else 0
        self.history = state.history if state else []
        self.before_s = state.seconds if state else 0.0
        self.epoch_before_s = state.epoch_seconds if state else 0.0
        # The sums of the epoch under way; a resumed rank 0 carries those of all ranks.
        carried = (
            state.sums if state and session.rank == 0 else dict.fromkeys(state.sums if state else {}, 0.0)
        )
        self.sums: dict[str, Tensor] = {
            key: torch.tensor(value, dtype=torch.float64, device=session.device)
            for key, value in carried.items()
        }
        self.steps_per_epoch = BatchPlan(np.arange(len(dataset.train)), recipe.training.batch_size).num_steps
        self.started = time.perf_counter()
        self.last_progress = 0.0
        self.signals = Signals(run, session)
        validation = dataset.validation
        if recipe.evaluation.validation_samples is not None:
            validation = stratified(validation, recipe.evaluation.validation_samples, recipe.evaluation.seed)
        self.validation = validation

    def epochs(self) -> Epochs:
        """Run to the end, a stop or a failure, giving each epoch's metrics once its checkpoint is safe."""
        if self.session.rank == 0:
            remove_unfinished(self.run_folder.checkpoints)
            self.run_folder.rewind_metrics(self.history)
        try:
            while self.epoch < self.until:
                self._train_epoch()
                self._average_epoch()
                yield self._finish_epoch(self._validate())
                if self.epoch < self.recipe.training.epochs and self.signals.stop_wanted():
                    return Outcome("stopped", f"stopped at step {self.step}; the checkpoint is saved")
        except _Ended as ended:
            return ended.outcome
        return Outcome("finished" if self.until == self.recipe.training.epochs else "changed")

    def _train_epoch(self) -> None:
        training = self.recipe.training
        self.parts.reduced.train()
        self.epoch_started, self.epoch_first = time.perf_counter(), self.step_in_epoch
        self.epoch_seconds = self.epoch_before_s
        batches = self.dataset.train.train_batches(
            training.batch_size,
            self.recipe.seed,
            self.epoch,
            self.recipe.data.augment,
            self.session.place,
            start=self.step_in_epoch,
        )
        for batch in batches:
            position = self._position(self.step_in_epoch)
            sums = train_step(self.parts, batch, self.step, position, self.recipe, self.session)
            for key, value in sums.items():
                self.sums[key] = self.sums[key] + value if key in self.sums else value.double()
            self.step += 1
            self.step_in_epoch += 1
            last = self.step_in_epoch == self.steps_per_epoch
            due = training.checkpoint_steps is not None and self.step % training.checkpoint_steps == 0
            self.epoch_seconds = self.epoch_before_s + time.perf_counter() - self.epoch_started
            self._look_up(last, due)

    def _position(self, step_in_epoch: int) -> float:
        """Return where a step stands in the run, in epochs."""
        return self.epoch + step_in_epoch / self.steps_per_epoch

    def _look_up(self, last: bool, due: bool) -> None:
        """Between steps: end on a gradient that is not finite or on a stop request; show progress."""
        look = last or self.step % CHECK_STEPS == 0
        # The gradient's norm is taken after DDP's reduction: every rank sees the same value.
        seen = look or due or self.session.device.type == "cpu"
        if seen and not bool(torch.isfinite(self.sums["grad_norm"])):
            raise _Ended(Outcome("failed", self._diverged()))
        word = self.signals.hear() if look and not last else None
        if not last and (due or word is not None):  # at the end of an epoch a checkpoint comes anyway
            self._save()
        notice = self.signals.notice
        if notice and notice not in self.remarks:
            self.remarks.append(notice)
        if word == "stop":
            raise _Ended(Outcome("stopped", f"stopped at step {self.step}; the checkpoint is saved"))
        now = time.perf_counter()
        if self.session.rank == 0 and now - self.last_progress >= PROGRESS_S:
            self.last_progress = now
            self.run_folder.write_progress(self._progress(now))

    def _diverged(self) -> str:
        near = "" if self.session.device.type == "cpu" else f" (or up to {CHECK_STEPS - 1} steps before)"
        return (
            f"loss or gradient is NaN or infinite at step {self.step}{near}, epoch {self.epoch + 1}; "
            "the last good checkpoint is kept. Lower optimizer.lr, set optimizer.clip_norm, or warm up "
            "with optimizer.schedule.warmup_epochs or adversary.eps_warmup_epochs"
        )

    def _progress(self, now: float) -> dict[str, Any]:
        done = self.step_in_epoch - self.epoch_first
        seconds = max(now - self.epoch_started, 1e-9)
        rate = done * len(self.dataset.train) / self.steps_per_epoch / seconds
        left = self.steps_per_epoch * self.recipe.training.epochs - self.step
        last = self.history[-1] if self.history else {}
        return {
            "epoch": self.epoch + 1,
            "epochs": self.recipe.training.epochs,
            "step": self.step,
            "steps": self.steps_per_epoch * self.recipe.training.epochs,
            "loss": float(self.sums["loss"] / self.sums["samples"]),
            "samples_per_s": rate,
            "seconds_left": left * seconds / max(done, 1),
            "validation": {k: v for k, v in last.items() if k.startswith("val_")},
            "remarks": self.remarks,
            "pid": os.getpid(),
        }

    def _average_epoch(self) -> None:
        """SWA: take the weights into the average, and recompute batch norm's statistics for it.

        They are those of attacked training batches, as the network saw them in training.
        """
        average, start = self.parts.average, self.recipe.optimizer.swa_start_epoch
        if average is None or start is None or self.epoch < start:
            return
        average.update_parameters(self.parts.model)
        assert self.parts.average_network is not None
        batches = self.dataset.train.train_batches(
            self.recipe.training.batch_size,
            self.recipe.seed,
            self.epoch,
            self.recipe.data.augment,
            self.session.place,
        )
        position, replayed = float(self.epoch + 1), self.parts.replayed

        def inputs() -> Iterator[Tensor]:
            for number, batch in enumerate(itertools.islice(batches, STATISTICS_STEPS)):
                if replayed is not None:  # free training: as its next step would see them
                    yield (batch.x + replayed[: len(batch.x)]).clamp(0, 1)
                    continue
                step = self.step + number
                x_adv = perturb(self.parts, batch, step, position, self.recipe, self.session)
                yield batch.x if x_adv is None else x_adv

        recompute_statistics(self.parts.average_network, inputs())
        average_buffers(average.module, self.session)

    def _validate(self) -> dict[str, float]:
        """Return the clean and robust validation figures of the weights, and of their average."""
        evaluation = self.recipe.evaluation
        if (self.epoch + 1) % evaluation.validation_every and self.epoch + 1 < self.recipe.training.epochs:
            return {}
        judged = self.parts.judged
        networks: dict[str, nn.Module] = {"": judged() if judged else self.parts.network}
        average = self.parts.average
        if self.parts.average_network is not None and average is not None and int(average.n_averaged):
            networks["average_"] = self.parts.average_network
        measure = validation_errors if self.dataset.regression else validation_accuracy
        metrics: dict[str, float] = {}
        for name, network in networks.items():
            sums = measure(
                network,
                self.validation,
                build_attack(evaluation.validation),
                evaluation.threat_model,
                seed=evaluation.seed,
                batch_size=evaluation.batch_size,
                place=self.session.place,
            )
            total = self.session.sum({k: torch.tensor(v, dtype=torch.float64) for k, v in sums.items()})
            samples = total.pop("samples")
            metrics |= {f"val_{name}{key}": value / samples for key, value in total.items()}
        return metrics

    def _finish_epoch(self, validation: dict[str, float]) -> dict[str, Any]:
        sums = self.session.sum(self.sums)
        samples, steps = sums.pop("samples"), sums.pop("steps")
        times = self.session.gather((self.parts.attacking.read(), self.session.node))
        slow = straggler([seconds for seconds, _ in times], [node for _, node in times], self.epoch + 1)
        self.remarks += [slow] if slow else []
        line: dict[str, Any] = {"epoch": self.epoch + 1, "step": self.step}
        for key, value in sums.items():
            name = key.replace("_correct", "_accuracy").replace("_abs_error", "_mae")
            line[f"train_{name}"] = value / (steps if key in ("grad_norm", "clipped") else samples)
        line["train_clipped_fraction"] = line.pop("train_clipped")
        line["lr"] = self.recipe.optimizer.lr * lr_factor(
            self.recipe.optimizer.schedule,
            self._position(self.step_in_epoch - 1),
            self.recipe.training.epochs,
        )
        line |= validation | self.changing
        line |= {
            "epoch_seconds": self.epoch_seconds,  # of training alone, without the validation
            "samples_per_s": samples / self.epoch_seconds,
            "num_workers": self.session.world_size,
        }
        if collapsed(self.recipe, self.history, line):  # decided by what all ranks know: before it is saved
            raise _Ended(Outcome("collapsed", line=line))
        self.history.append(line)
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, {}
        self.epoch_before_s = self.epoch_seconds = 0.0
        self._save()
        if self.session.rank == 0:  # after the checkpoint: a line in metrics.jsonl is never taken back
            self.run_folder.append_metrics(line)
        return line

    def _save(self) -> None:
        """Rank 0 writes the checkpoint; all ranks end together if it cannot."""
        totals = self.session.sum(self.sums)
        self.sums = {
            key: torch.tensor(
                value if self.session.rank == 0 else 0.0, dtype=torch.float64, device=self.session.device
            )
            for key, value in totals.items()
        }
        problem = None
        replayed = self.parts.replayed
        if replayed is not None:
            replayed = self.session.all_rows(replayed)
        model, optimizer = (
            whole(self.parts.model.state_dict()),
            whole(optimizer_tensors(self.parts.optimizer)),
        )
        if self.session.rank == 0:
            average = self.parts.average
            state = TrainState(
                step=self.step,
                epoch=self.epoch,
                step_in_epoch=self.step_in_epoch,
                recipe_digest=self.recipe_digest,
                model=model,
                optimizer=optimizer,
                average=average.state_dict() if average is not None else None,
                replayed={"delta": replayed} if replayed is not None else None,
                sums=totals,
                history=self.history,
                seconds=self.before_s + time.perf_counter() - self.started,
                epoch_seconds=self.epoch_seconds,
            )
            try:
                save_checkpoint(state, self.run_folder.checkpoints, self.recipe.training.keep_checkpoints)
            except UserError as error:
                problem = str(error)
        if problem := self.session.agree(problem):
            raise _Ended(Outcome("failed", problem))
