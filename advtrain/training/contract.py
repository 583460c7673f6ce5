"""Contract of data and model: what a run needs, checked before it is created."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advtrain.attacks import REGRESSION_LOSSES, attack_mode, build_attack
from advtrain.data import BatchPlan, Dataset, Place
from advtrain.errors import UserError
from advtrain.models.blocks import block_parameters, freeze_blocks
from advtrain.models.network import Network, Normalized, example_inputs, pick_logits
from advtrain.models.outputs import check_outputs, reject_probabilities
from advtrain.recipe import Recipe
from advtrain.recipe.model import runs_code
from advtrain.recipe.objective import why_no_gradient
from advtrain.schema import load_attribute
from advtrain.text import listed

#: Rows of the training split that the model runs on.
NUM_ROWS = 4
#: Largest difference of outputs for the same input that counts as rounding, relative to the largest output.
_ROUNDING = 1e-3
#: Names that a message lists before it gives a count.
_MOST_NAMES = 5


def check_data(recipe: Recipe, dataset: Dataset) -> None:
    """Raise UserError if the objective does not suit the data. Imports no user code."""
    regression = recipe.objective.regression
    if regression is not None and regression != dataset.regression:
        have, want = ("targets", "classification") if dataset.regression else ("labels", "regression")
        raise UserError(
            f"{dataset.name} has {have}, but {', '.join(recipe.objective.used)} belongs to a {want}"
        )
    judge = recipe.evaluation.attack
    if dataset.regression and (judge is None or judge.loss not in REGRESSION_LOSSES):
        raise UserError(
            "a regression is evaluated with one attack on its error, not with a suite: set "
            "evaluation.attack={loss: mae, num_steps: 50, num_restarts: 5}"
        )


def check_code(recipe: Recipe) -> None:
    """Import the user code that training calls; raise UserError if it is missing.

    Call it only where user code may run.
    """
    if recipe.objective.custom is not None:
        load_attribute(recipe.objective.custom.function, "objective.custom.function")
    if recipe.adversary.custom:
        build_attack(recipe.adversary)


def check_contract(model: Normalized, recipe: Recipe, dataset: Dataset) -> list[str]:
    """Return notes about a new model; raise a UserError that lists every fault.

    Built-in models are only checked for batches of one row. The random number generators are left as they were.

    Args:
        model: model from `build_model`. Its weights and modes may be changed.
        recipe: recipe that trains it.
        dataset: data whose first training rows it runs on.
    """
    notes: list[str] = []
    if recipe.model.freeze is not None:
        freeze_blocks(model, recipe.model.freeze)
        _require_gradient(model, recipe)
    if recipe.optimizer.per_block:
        block_parameters(model)
    with torch.random.fork_rng([]):
        if ":" not in recipe.model.name:
            found = list(_one_row_faults(model, recipe, dataset))
        else:
            found, notes = _Check(model, recipe, dataset).run()
    if found:
        name = f"model '{recipe.model.name}'"
        raise UserError(
            f"{name} {found[0]}"
            if len(found) == 1
            else f"{name} has {len(found)} faults:\n- " + "\n- ".join(found)
        )
    return notes


def _require_gradient(model: Normalized, recipe: Recipe) -> None:
    """Raise a UserError if only the last linear layer is trained, and no term depends on it."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    last = set(linear[-1].parameters()) if linear else set()
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if trained <= last and not recipe.objective.reads_outputs:
        raise UserError(why_no_gradient(recipe))


def runs_channels_last(model: nn.Module, recipe: Recipe, dataset: Dataset) -> bool:
    """Return whether training uses the NHWC layout that the recipe may ask for.

    User code may not support it, for example `x.view(len(x), -1)` after a convolution. The answer is the same on every
    rank and at every resume.
    """
    if not recipe.training.channels_last or len(dataset.shape) != 3 or not runs_code(recipe.model.name):
        return recipe.training.channels_last
    probe = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.random.fork_rng([]), attack_mode(probe), torch.no_grad():
        inputs = torch.zeros(2, *dataset.shape, device=_device(model))
        return not _error(lambda: Network(probe, "fp32", True)(inputs))


def unused_parameters(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Return the trainable parameters that do not affect the outputs in training mode."""
    probe = copy.deepcopy(model).train()
    named = {name: p for name, p in probe.named_parameters() if p.requires_grad}
    with torch.random.fork_rng([]):
        outputs = probe(example_inputs(shape, 2).to(_device(model)))
    if not outputs.requires_grad:
        return list(named)
    gradients = torch.autograd.grad(outputs.float().sum(), list(named.values()), allow_unused=True)
    return [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]


def fewest_rows(recipe: Recipe, dataset: Dataset) -> int:
    """Return the smallest number of rows that a worker gets in a pass of a training step."""
    training, samples = recipe.training, len(dataset.train)
    steps = BatchPlan(np.arange(samples), training.batch_size).num_steps
    share = samples // steps // max(1, training.max_workers)
    return share // max(1, min(training.accumulate, share))


class _Check:
    """Check of one model of user code: `faults` stop training, `notes` do not."""

    def __init__(self, model: nn.Module, recipe: Recipe, dataset: Dataset) -> None:
        self.model, self.recipe, self.dataset = model, recipe, dataset
        rows = np.arange(min(NUM_ROWS, len(dataset.train)))
        self.x = next(iter(dataset.train.take(rows).batches(len(rows), Place()))).x
        self.faults: list[str] = []
        self.notes: list[str] = []

    def run(self) -> tuple[list[str], list[str]]:
        """Return the faults and the notes."""
        self.faults += _state_faults(self.model)
        if self.faults:  # every pass would fail for the same reason
            return self.faults, []
        outputs = self._evaluate()
        if outputs is not None:
            self._train()
            self.faults += _one_row_faults(self.model, self.recipe, self.dataset)
        if (
            outputs is not None
            and not self.dataset.regression
            and not self.faults
            and self._is_bounded(outputs)
        ):
            self.faults.append(
                "returns values in [0, 1] whatever its weights are, as after a sigmoid; remove it and return logits"
            )
        return list(dict.fromkeys(self.faults)), self.notes

    def _evaluate(self) -> Tensor | None:
        """Check evaluation mode on several batch sizes; return the outputs, or None if they are invalid."""
        outputs = self._outputs(self.model, self.x, "")
        if outputs is None:
            return None
        largest = float(outputs.abs().max())
        for count in sorted({1, max(1, len(self.x) - 1)}):
            part = self._outputs(
                self.model, self.x[:count], f" of {count} rows" if count > 1 else " of one row"
            )
            if part is not None and float((part - outputs[:count]).abs().max()) > _ROUNDING * largest:
                self.notes.append(
                    "the outputs of a sample depend on the other samples of its batch, or on random draws, in "
                    "evaluation mode; attacks form new batches, so robust accuracies may be wrong"
                )
                break
        if not self.dataset.regression:
            self._record(lambda: reject_probabilities(outputs))
        return outputs

    def _train(self) -> None:
        """Check training mode in the recipe's precision and layout, and the gradients."""
        layout = runs_channels_last(self.model, self.recipe, self.dataset)
        if layout != self.recipe.training.channels_last:
            self.notes.append(
                "the network does not run in the NHWC layout (it uses view where reshape or flatten is needed), so it "
                "trains as with training.channels_last=false"
            )
        model = copy.deepcopy(self.model).train()
        if layout and len(self.dataset.shape) == 3:
            model = model.to(memory_format=torch.channels_last)
        network = Network(model, self.recipe.training.precision, layout)
        if self._outputs(network, self.x, " in training mode", mode=torch.enable_grad) is None or self.faults:
            return
        unused = unused_parameters(self.model, self.dataset.shape)
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        if len(unused) == len(trained):
            self.faults.append(
                "returns outputs that do not depend on any parameter, so nothing can be trained"
            )
        elif unused:
            self.notes.append(
                f"the outputs do not depend on {_listed(unused)}: these parameters get no gradient and keep their "
                "initial values"
            )

    def _outputs(self, model: nn.Module, x: Tensor, where: str, mode: Any = torch.no_grad) -> Tensor | None:
        """Return the valid outputs at x, or None after recording the fault."""
        found: list[Any] = []

        def run() -> None:
            with mode():
                if mode is torch.no_grad:
                    with attack_mode(model):
                        found.append(model(x))
                else:
                    found.append(model(x))

        if problem := _error(run):
            self.faults.append(
                f"fails on a batch{where or f' of {len(x)} rows'}, {tuple(x.shape)}: {problem}"
            )
            return None
        problem = _output_fault(found[0], len(x), self.dataset)
        if problem:
            self.faults.append(f"{problem}{where and f' (on a batch{where})'}")
            return None
        return found[0].detach().float()  # type: ignore[no-any-return]

    def _record(self, check: Callable[[], object]) -> None:
        try:
            check()
        except UserError as error:
            self.faults.append(str(error).removeprefix("the model "))

    def _is_bounded(self, outputs: Tensor) -> bool:
        """Return whether the outputs stay in [0, 1] with weights a thousand times as large."""
        if not bool(((outputs > 0) & (outputs < 1)).all()):
            return False
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1000)
            with attack_mode(self.model):
                larger = self.model(self.x)
        return bool(((larger >= 0) & (larger <= 1)).all())


def _state_faults(model: nn.Module) -> Iterator[str]:
    """Yield what checkpoints and optimizers cannot store or train."""
    state = model.state_dict()
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        yield f"has state that is no tensor ({_listed(other)}), which checkpoints cannot hold"
    if empty := [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]:
        yield f"has tensors without values on the meta device ({_listed(empty)}); build it on the CPU"
    kinds: dict[torch.dtype, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            kinds.setdefault(parameter.dtype, []).append(name)
    for dtype, names in kinds.items():
        yield (
            f"has parameters in {str(dtype).removeprefix('torch.')} ({_listed(names)}), but inputs are float32; return "
            "model.float() from the factory"
        )


def _output_fault(found: object, num_samples: int, dataset: Dataset) -> str:
    """Return what is wrong with the outputs for `num_samples` rows of the dataset; "" if nothing is."""
    outputs = pick_logits(found)
    if not isinstance(outputs, Tensor):
        keys = f" with the keys {', '.join(map(str, outputs))}" if isinstance(outputs, dict) else ""
        return (
            f"returns {type(found).__name__}{keys}; return the outputs as a tensor, in .logits, under the key "
            "'logits', or first in a tuple"
        )
    shape = tuple(outputs.shape)
    if not dataset.regression and shape in ((num_samples,), (num_samples, 1)):
        return (
            f"returns one value for each sample, {shape}, for {dataset.num_classes} classes; it must return "
            f"num_classes logits, ({num_samples}, {dataset.num_classes}). For two classes the factory may also return "
            "advtrain.wrap_model(network), with from_probabilities=True if the network ends in a sigmoid"
        )
    try:
        check_outputs(
            outputs,
            num_samples,
            num_classes=None if dataset.regression else dataset.num_classes,
            regression=dataset.regression,
        )
    except UserError as error:
        return str(error).removeprefix("the model ")
    if not bool(outputs.isfinite().all()):
        return "returns NaN or infinite values on the first training rows"
    return ""


def _one_row_faults(model: nn.Module, recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Yield why batch norm fails on the smallest batch of a worker, if that has at most one row."""
    unfreezes = recipe.model.unfreeze_epoch is not None
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and (m.training or unfreezes)]
    training, adversary = recipe.training, recipe.adversary
    rows = fewest_rows(recipe, dataset)
    if adversary.batch_norm == "train" and 0 < adversary.fraction < 1:  # the attack runs on part of the rows
        rows = min(rows, max(1, int(rows * adversary.fraction)))
    if rows > 1 or not norms:
        return
    if rows == 1:
        x = example_inputs(dataset.shape, 1)
        problem = _error(lambda: copy.deepcopy(model).train()(x))
        if "more than 1 value per channel" not in problem:
            return
    yield (
        f"has batch norm, which needs two rows, but the smallest batch of a worker has {rows}; raise "
        f"training.batch_size (now {training.batch_size}) or lower training.num_workers (now {training.num_workers})"
        + (f" or training.accumulate (now {training.accumulate})" if training.accumulate > 1 else "")
    )


def _error(run: Callable[[], object]) -> str:
    """Return the exception that `run` raises, in one line; "" if none."""
    try:
        run()
    except Exception as error:  # noqa: BLE001 (a custom network may raise any exception)
        return f"{type(error).__name__}: {error}".split("\n")[0][:300]
    return ""


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _listed(names: list[str]) -> str:
    return listed([name.removeprefix("network.") for name in names], _MOST_NAMES)
