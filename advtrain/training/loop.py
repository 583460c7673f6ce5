"""Training loop: each epoch trains, validates, checks for collapse, saves and reports."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from advtrain.data import AugmentConfig, Batch, BatchPlan, Dataset, stratified
from advtrain.errors import UserError
from advtrain.evaluation import validate
from advtrain.models.network import adversarial_point, attack_view, from_perturbed
from advtrain.optim import optimizer_tensors, recompute_statistics
from advtrain.recipe.sections import EvaluationConfig, TrainingConfig
from advtrain.runs.checkpoint import TrainState, remove_unfinished, save_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.training.failures import straggler
from advtrain.training.guard import ADVICE, collapsed
from advtrain.training.session import Session, average_buffers
from advtrain.training.sharded import whole
from advtrain.training.signals import Signals
from advtrain.training.step import Components, Progress, Sums, perturb

#: Steps between checks for a stop request and, on a GPU, for finite gradients (a check synchronizes).
CHECK_STEPS = 10
#: Training batches from which the batch norm statistics of an SWA average are computed.
STATISTICS_STEPS = 32
#: Seconds between writes of progress.json.
PROGRESS_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """Outcome of an attempt; `message` says why it did not finish.

    `worker.run_guarded` handles "collapsed" and "changed" and rebuilds the loop, so its callers never get them.
    """

    status: Literal["finished", "stopped", "failed", "collapsed", "changed"]
    message: str = ""
    line: dict[str, Any] | None = None  # the metrics of the epoch that collapsed


#: Generator that trains: yields the metrics of each finished epoch and returns the outcome.
Epochs = Generator[dict[str, Any], None, Outcome]


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the loop."""

    training: TrainingConfig
    evaluation: EvaluationConfig
    augment: AugmentConfig
    max_drop: float | None  # see `guard.collapsed`
    recipe_digest: str  # for the checkpoints
    last_epoch: int  # the loop ends after this epoch: the last one, or one with a settings change
    changed_settings: dict[str, float]  # values of the settings in training.changes, for the metrics


@dataclass
class LoopState:
    """Position of training and metric sums of the current epoch."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs finished
    step_in_epoch: int = 0  # steps done in the current epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics of every finished epoch
    sums: Sums = field(default_factory=dict)  # float64
    seconds_before: float = 0.0  # training time up to the resumed checkpoint
    epoch_seconds: float = 0.0  # training time of the current epoch

    @classmethod
    def resume(cls, saved: TrainState | None, session: Session) -> LoopState:
        """Return a checkpoint's state, or an initial one. Rank 0 takes the metric sums of all ranks."""
        if saved is None:
            return cls()
        sums = {
            key: torch.tensor(value if session.rank == 0 else 0.0, dtype=torch.float64, device=session.device)
            for key, value in saved.sums.items()
        }
        position = (saved.step, saved.epoch, saved.step_in_epoch)
        return cls(*position, saved.history, sums, saved.seconds, saved.epoch_seconds)

    def add(self, sums: Sums) -> None:
        """Add one step's sums."""
        for key, value in sums.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value.double()
        self.step += 1
        self.step_in_epoch += 1

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Record a finished epoch's metrics and start the next epoch."""
        self.history.append(line)
        self.epoch, self.step_in_epoch, self.sums, self.epoch_seconds = self.epoch + 1, 0, {}, 0.0


class _Ended(Exception):  # noqa: N818 (no error: it ends the loop with an outcome)
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


class TrainingLoop:
    """Epochs over the training split. Rank 0 writes; all ranks make the same decisions."""

    def __init__(
        self,
        config: LoopConfig,
        dataset: Dataset,
        run: RunFolder,
        components: Components,
        state: LoopState,
        remarks: list[str],  # messages for the user about the start of training
    ) -> None:
        self.config, self.dataset, self.run_folder = config, dataset, run
        self.components, self.state, self.remarks = components, state, remarks
        self.session = components.session
        self.signals = Signals(run, self.session)
        self.started, self.last_progress = time.perf_counter(), 0.0
        self.steps_per_epoch = BatchPlan(np.arange(len(dataset.train)), config.training.batch_size).num_steps
        judge, self.validation = config.evaluation, dataset.validation
        if judge.validation_samples is not None:
            self.validation = stratified(dataset.validation, judge.validation_samples, judge.seed)

    def epochs(self) -> Epochs:
        """Train until finished, stopped or failed; yield each epoch's metrics after its checkpoint."""
        if self.session.rank == 0:
            remove_unfinished(self.run_folder.checkpoints)
            self.run_folder.rewind_metrics(self.state.history)
        try:
            while self.state.epoch < self.config.last_epoch:
                self._train_epoch()
                self._average_epoch()
                line = self._summarize(self._validate())
                self._guard(line)
                self.state.end_epoch(line)
                self._save()
                if self.session.rank == 0:  # after the checkpoint, so a metrics line is never removed
                    self.run_folder.append_metrics(line)
                yield line
                if self.state.epoch < self.config.training.epochs and self.signals.stop_wanted():
                    return self._stopped()
        except _Ended as ended:
            return ended.outcome
        return Outcome("finished" if self.config.last_epoch == self.config.training.epochs else "changed")

    def _train_epoch(self) -> None:
        self.components.train_mode()
        state = self.state
        epoch_started, seconds_before, first = time.perf_counter(), state.epoch_seconds, state.step_in_epoch
        for batch in self._batches(start=first):
            sums = self.components.train_step(self.components, batch, self._progress())
            state.add(sums)
            state.epoch_seconds = seconds_before + time.perf_counter() - epoch_started
            self._check_gradients()
            self._check_signals()
            self._show_progress(first, time.perf_counter() - epoch_started)

    def _batches(self, start: int = 0) -> Iterator[Batch]:
        """Return this rank's batches of the current epoch, from step `start` on."""
        size, seed = self.config.training.batch_size, self.components.config.seed
        return self.dataset.train.train_batches(
            size, seed, self.state.epoch, self.config.augment, self.session.place, start=start
        )

    def _progress(self) -> Progress:
        """Return the position of the next step."""
        return Progress(self.state.step, self.state.epoch + self.state.step_in_epoch / self.steps_per_epoch)

    @property
    def _epoch_done(self) -> bool:
        return self.state.step_in_epoch == self.steps_per_epoch

    @property
    def _checkpoint_due(self) -> bool:
        every = self.config.training.checkpoint_steps
        return every is not None and self.state.step % every == 0

    @property
    def _look_due(self) -> bool:
        return self._epoch_done or self.state.step % CHECK_STEPS == 0

    def _check_gradients(self) -> None:
        """Fail the run if the gradient norm, which is equal on all ranks, is not finite."""
        on_gpu = self.session.device.type != "cpu"
        if on_gpu and not (self._look_due or self._checkpoint_due):  # reading a value syncs the GPU
            return
        if not bool(torch.isfinite(self.state.sums["grad_norm"])):
            near = f" (or up to {CHECK_STEPS - 1} steps before)" if on_gpu else ""
            what = f"loss or gradient is NaN or infinite at step {self.state.step}{near}, epoch {self.state.epoch + 1}"
            raise _Ended(Outcome("failed", f"{what}; {ADVICE}"))

    def _check_signals(self) -> None:
        """Save a checkpoint if one is due or requested, and end on a stop request."""
        signal = self.signals.poll() if self._look_due and not self._epoch_done else None
        if not self._epoch_done and (self._checkpoint_due or signal is not None):
            self._save()
        notice = self.signals.notice
        if notice and notice not in self.remarks:
            self.remarks.append(notice)
        if signal == "stop":
            raise _Ended(self._stopped())

    def _stopped(self) -> Outcome:
        return Outcome("stopped", f"stopped at step {self.state.step}; the checkpoint is saved")

    def _show_progress(self, first_step: int, seconds: float) -> None:
        """Write progress.json, at most every PROGRESS_S seconds."""
        now, state = time.perf_counter(), self.state
        if self.session.rank != 0 or now - self.last_progress < PROGRESS_S:
            return
        self.last_progress = now
        done, seconds = state.step_in_epoch - first_step, max(seconds, 1e-9)
        epochs, last = self.config.training.epochs, state.history[-1] if state.history else {}
        values = {
            "epoch": state.epoch + 1,
            "epochs": epochs,
            "step": state.step,
            "steps": self.steps_per_epoch * epochs,
            "loss": float(state.sums["loss"] / state.sums["samples"]),
            "samples_per_s": done * len(self.dataset.train) / self.steps_per_epoch / seconds,
            "seconds_left": (self.steps_per_epoch * epochs - state.step) * seconds / max(done, 1),
            "validation": {k: v for k, v in last.items() if k.startswith("val_")},
            "remarks": self.remarks,
            "pid": os.getpid(),
        }
        self.run_folder.write_progress(values)

    def _average_epoch(self) -> None:
        """Add the weights to the SWA average and recompute its batch norm statistics.

        The statistics are computed on attacked training batches, as in training.
        """
        components = self.components
        average, start = components.average, components.config.optimizer.swa_start_epoch
        if average is None or start is None or self.state.epoch < start:
            return
        average.update_parameters(components.model)
        assert components.average_network is not None
        epoch, delta = float(self.state.epoch + 1), components.replayed

        def points() -> Iterator[Tensor]:
            for number, batch in enumerate(itertools.islice(self._batches(), STATISTICS_STEPS)):
                _, z, threat = attack_view(components.network, batch.x, components.config.adversary.threat)
                if delta is not None:  # free training: the inputs of its next step
                    yield threat.project(z + delta[: len(z)], z)
                    continue
                z_adv = perturb(components, batch, Progress(self.state.step + number, epoch))
                yield z if z_adv is None else adversarial_point(components.network, z_adv).detach()

        recompute_statistics(from_perturbed(components.average_network), points())
        average_buffers(average.module, self.session)

    def _validate(self) -> dict[str, float]:
        """Return the clean and robust validation metrics of the weights, and of their average."""
        judge, epoch = self.config.evaluation, self.state.epoch + 1
        if epoch % judge.validation_every and epoch < self.config.training.epochs:
            return {}
        networks: dict[str, nn.Module] = {"": self.components.validation_model()}
        average = self.components.average
        if self.components.average_network is not None and average is not None and int(average.n_averaged):
            networks["average_"] = self.components.average_network
        metrics: dict[str, float] = {}
        for name, network in networks.items():
            sums = validate(network, self.validation, self.dataset, judge, self.session.place)
            total = self.session.sum({k: torch.tensor(v, dtype=torch.float64) for k, v in sums.items()})
            samples = total.pop("samples")
            metrics |= {f"val_{name}{key}": value / samples for key, value in total.items()}
        return metrics

    def _summarize(self, validation: dict[str, float]) -> dict[str, Any]:
        """Return the metrics of the epoch that was just trained and validated."""
        state = self.state
        sums = self.session.sum(state.sums)
        samples, steps = sums.pop("samples"), sums.pop("steps")
        times = self.session.gather((self.components.attack_time.read(), self.session.node))
        slow = straggler([seconds for seconds, _ in times], [node for _, node in times], state.epoch + 1)
        self.remarks += [slow] if slow else []
        line: dict[str, Any] = {"epoch": state.epoch + 1, "step": state.step}
        for key, value in sums.items():
            name = key.replace("_correct", "_accuracy").replace("_abs_error", "_mae")
            line[f"train_{name}"] = value / (steps if key in ("grad_norm", "clipped") else samples)
        line["train_clipped_fraction"] = line.pop("train_clipped")
        line["lr"] = self.components.config.lr(state.epoch + (state.step_in_epoch - 1) / self.steps_per_epoch)
        line |= validation | self.config.changed_settings
        return line | {
            "epoch_seconds": state.epoch_seconds,  # training only, without validation
            "samples_per_s": samples / state.epoch_seconds,
            "num_workers": self.session.world_size,
        }

    def _guard(self, line: dict[str, Any]) -> None:
        """End the loop without a checkpoint if the epoch diverged or collapsed, see `guard.collapsed`.

        All ranks have the same metrics, so they decide alike.
        """
        if bad := [
            name for name, value in line.items() if isinstance(value, float) and not np.isfinite(value)
        ]:
            what = f"{', '.join(bad)} {'is' if len(bad) == 1 else 'are'} NaN or infinite in epoch {line['epoch']}"
            raise _Ended(Outcome("failed", f"{what}; {ADVICE}"))
        if collapsed(self.config.max_drop, self.state.history, line, self.components.config.adversary):
            raise _Ended(Outcome("collapsed", line=line))

    def _save(self) -> None:
        """Write a checkpoint on rank 0; all ranks end together if it cannot be written."""
        components, state, session = self.components, self.state, self.session
        totals = session.sum(state.sums)
        delta = components.replayed
        saved = TrainState(
            step=state.step,
            epoch=state.epoch,
            step_in_epoch=state.step_in_epoch,
            recipe_digest=self.config.recipe_digest,
            model=whole(components.model.state_dict()),
            optimizer=whole(optimizer_tensors(components.optimizer)),
            average=components.average.state_dict() if components.average is not None else None,
            replayed={"delta": session.all_rows(delta)} if delta is not None else None,
            sums=totals,
            history=state.history,
            seconds=state.seconds_before + time.perf_counter() - self.started,
            epoch_seconds=state.epoch_seconds,
        )
        problem = None
        if session.rank == 0:
            try:
                save_checkpoint(saved, self.run_folder.checkpoints, self.config.training.keep_checkpoints)
            except UserError as error:
                problem = str(error)
        if problem := session.agree(problem):
            raise _Ended(Outcome("failed", problem))
        self.state.sums = LoopState.resume(saved, session).sums  # sums of all ranks: now on rank 0
