"""A run, a checkpoint, a registered model or a file -> a report on the test split of its data."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from advtrain.attacks import TransferAttack, build_suite
from advtrain.data import Split, stratified
from advtrain.errors import UserError
from advtrain.evaluation import AnyReport, EvalSpec, Evaluation, Workers, evaluate
from advtrain.events import Message, Progress, evaluation_progress, ignore
from advtrain.threat import rounded_radii
from pipelines.model_ref import STATE_DICTS, ExternalModelSpec, ModelUnderTest, find_model
from pipelines.workspace import Workspace


@dataclass(frozen=True)
class Request:
    """How to judge; None: as the model's recipe says."""

    threat: str | None = None
    suite: str | None = None
    data: str | None = None
    limit: int | None = None
    sample: int | None = None
    transfer: str | None = None
    workers: int = 0

    def command(self, reference: str, external: ExternalModelSpec) -> str:
        """Return the command line that gives the same report."""
        words = ["advtrain", "evaluate", reference]
        for name in ("threat", "suite", "data", "limit", "sample", "transfer"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", str(value)]
        return shlex.join(words + (external.words() if Path(reference).suffix in STATE_DICTS else []))


AS_THE_RECIPE_SAYS, NOT_EXTERNAL = Request(), ExternalModelSpec()


@dataclass(frozen=True)
class EvaluationResult:
    """One evaluation, or two of them on the same samples."""

    found: Evaluation
    rival: Evaluation | None = None  # of `against`
    seconds: float = 0.0

    @property
    def report(self) -> AnyReport:
        """The report on the model."""
        return self.found.report


def evaluate_model(
    reference: str,
    workspace: Workspace,
    request: Request = AS_THE_RECIPE_SAYS,
    external: ExternalModelSpec = NOT_EXTERNAL,
    *,
    against: str | None = None,
    progress: Progress = ignore,
) -> EvaluationResult:
    """Evaluate a model on the test split of its data, or two models on the same samples.

    Args:
        reference: models:/NAME@ALIAS, models:/NAME/VERSION, a run, a checkpoint folder, or a file.
        workspace: where runs, data, tracking and Ray are.
        request: how to evaluate; by default as the model's recipe says.
        external: of a state dict: its architecture.
        against: another model, compared sample by sample.
        progress: called with each event.

    Raises:
        UserError: nothing of that name, options that do not apply, a typo in a suite.
        KeyboardInterrupt: stopped; the same call continues where it was.
    """
    if request.suite is not None:
        build_suite(request.suite)  # refuse a typo before anything is loaded
    if request.limit is not None and request.sample is not None:
        raise UserError("--limit takes the first samples and --sample draws some; choose one")
    under_test = find_model(
        reference, workspace, external, data=request.data, threat=request.threat, progress=progress
    )
    _check_options(reference, under_test, request, external, against)
    if request.threat is not None and under_test.dataset.eight_bit:
        for remark in rounded_radii({"--threat": under_test.judge.threat.eps}):
            progress(Message(remark, "warning"))
    rival = other = None
    if against is not None:
        other = _second(against, under_test, workspace, external, request)
    extra = []
    if request.transfer is not None:
        extra = [TransferAttack(_second(request.transfer, under_test, workspace, external, request).source)]
    started = time.perf_counter()
    found = _judge(reference, under_test, workspace, request, external, extra, progress)
    if against is not None and other is not None:
        # Under the first one's judge: the same samples, seed and suite.
        second = replace(other, judge=under_test.judge)
        rival = _judge(against, second, workspace, request, external, extra, progress)
    return EvaluationResult(found, rival, time.perf_counter() - started)


def _check_options(
    reference: str,
    under_test: ModelUnderTest,
    request: Request,
    external: ExternalModelSpec,
    against: str | None,
) -> None:
    """Refuse options that would be ignored."""
    references = (reference, against, request.transfer)
    if external.words() and not any(Path(r).suffix in STATE_DICTS for r in references if r is not None):
        raise UserError(
            f"{external.words()[0]} is for a state dict; '{reference}' knows its own architecture"
        )
    if under_test.dataset.regression:
        for option, value in (
            ("--against", against),
            ("--transfer", request.transfer),
            ("--workers", request.workers),
        ):
            if value:
                raise UserError(f"{option} is for classifiers; '{reference}' is a regression")


def _samples(under_test: ModelUnderTest, request: Request) -> tuple[Split, str]:
    """Return the test samples to judge on, and what the report calls them."""
    test = under_test.dataset.test
    if request.limit is not None and request.limit < len(test):
        return test.take(np.arange(request.limit)), f"first {request.limit} test"
    if request.sample is not None and request.sample < len(test):
        drawn = stratified(test, request.sample, under_test.judge.seed)
        return drawn, f"stratified {request.sample} test"
    return test, "test"


def _judge(
    reference: str,
    under_test: ModelUnderTest,
    workspace: Workspace,
    request: Request,
    external: ExternalModelSpec,
    extra: list[TransferAttack],
    progress: Progress,
) -> Evaluation:
    judge = under_test.judge
    split, split_name = _samples(under_test, request)
    found = evaluate(
        EvalSpec(
            under_test.source,
            split,
            under_test.dataset,
            request.suite or judge.judged_with,
            judge.threat_model,
            extra=extra,
            name=reference,
            split_name=split_name,
            seed=judge.seed,
            batch_size=judge.batch_size,
            full=True,
            training_threat=under_test.trained,
            command=request.command(reference, external),
        ),
        workers=Workers(request.workers, workspace.address),
        cache=under_test.store,
        progress=evaluation_progress(progress),
    )
    label = f"{under_test.dataset.name}-{judge.threat.norm}-{judge.threat.eps:.4g}"
    folder = found.folder or under_test.store / label  # of a regression, which is done in one go
    found.save(folder / "report")
    return replace(found, folder=folder)


def _second(
    reference: str,
    under_test: ModelUnderTest,
    workspace: Workspace,
    external: ExternalModelSpec,
    request: Request,
) -> ModelUnderTest:
    """Return another model, which must be judged on the same samples under the same threat model."""
    other = find_model(reference, workspace, external, data=request.data, threat=request.threat)
    if other.dataset.digest != under_test.dataset.digest:
        raise UserError(
            f"'{reference}' has other data or another split ({other.dataset.name}); name one with --data"
        )
    if other.judge.threat != under_test.judge.threat:
        raise UserError(f"'{reference}' is judged under another threat model; name one with --threat")
    return other
