"""Evaluation of a run, checkpoint, registered model or file on its test split."""

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
from advtrain.recipe.edits import AnyThreat, EditThreatConfig
from advtrain.recipe.sections import STATE_DICTS, rounded_radii
from pipelines.leaks import count_copies
from pipelines.model_ref import (
    ExternalModelSpec,
    ModelUnderTest,
    accepted_by,
    find_model,
    other_data,
)
from pipelines.workspace import Workspace, about_report


@dataclass(frozen=True)
class Request:
    """Evaluation options; None keeps the default of the model's recipe."""

    threat: str | None = None
    suite: str | None = None
    data: str | None = None
    limit: int | None = None
    sample: int | None = None
    transfer: str | None = None
    workers: int = 0
    other: str | None = None

    def command(self, reference: str, external: ExternalModelSpec) -> str:
        """Return the command line that reproduces the report."""
        words = ["advtrain", "evaluate", reference]
        for name in ("threat", "suite", "data", "limit", "sample", "transfer", "other"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", str(value)]
        return shlex.join(
            words + (external.words() if Path(reference).suffix in STATE_DICTS else external.permission())
        )


#: Number of held-back samples for the check `other_images`.
HELD_BACK = 200

AS_THE_RECIPE_SAYS, NOT_EXTERNAL = Request(), ExternalModelSpec()


@dataclass(frozen=True)
class EvaluationResult:
    """Evaluation of one model, or of two models on the same samples."""

    found: Evaluation
    rival: Evaluation | None = None  # evaluation of `against`
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
        workspace: locations of runs, data, tracking store and Ray.
        request: evaluation options; by default those of the model's recipe.
        external: architecture and normalization of a state dict.
        against: another model, compared sample by sample.
        progress: called with each event.

    Raises:
        UserError: unknown name, options that do not apply, or a typo in a suite.
        KeyboardInterrupt: stopped; the same call resumes.
    """
    if request.suite is not None:
        build_suite(request.suite)  # report a typo before loading anything
    if request.limit is not None and request.sample is not None:
        raise UserError(
            "--limit (first samples) and --sample (random samples) cannot be combined; choose one"
        )
    under_test = find_model(
        reference,
        workspace,
        external,
        data=request.data,
        threat=request.threat,
        search=True,
        progress=progress,
    )
    _check_options(reference, under_test, request, external, against)
    if request.threat is not None and under_test.dataset.eight_bit:
        for remark in rounded_radii({"--threat": under_test.judge.threat.eps}):
            progress(Message(remark, "warning"))
    rival = other = None
    if against is not None:
        other = _second(against, under_test, workspace, external, request, search=True)
    extra = []
    if request.transfer is not None:
        extra = [TransferAttack(_second(request.transfer, under_test, workspace, external, request).source)]
    started = time.perf_counter()
    found = _judge(reference, under_test, workspace, request, external, extra, progress)
    if against is not None and other is not None:
        # The second model takes the evaluation settings of the first: same samples, seed and suite.
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
    """Raise a UserError for options that would be ignored."""
    references = (reference, against, request.transfer)
    if external.words() and not any(Path(r).suffix in STATE_DICTS for r in references if r is not None):
        raise UserError(f"{external.words()[0]} is for a state dict; '{reference}' has its own architecture")
    if under_test.judge.edits is not None:
        for option, given in (
            ("--suite", request.suite),
            ("--transfer", request.transfer),
            ("--other", request.other),
        ):
            if given is not None:
                raise UserError(
                    f"{option} is for attacks on tensors; edits of texts are searched within their budget"
                )
    if under_test.dataset.regression:
        for option, value in (
            ("--against", against),
            ("--transfer", request.transfer),
            ("--workers", request.workers),
            ("--other", request.other),
        ):
            if value:
                raise UserError(f"{option} is for classifiers; '{reference}' is a regression")


def _samples(under_test: ModelUnderTest, request: Request) -> tuple[Split, str]:
    """Return the test samples to evaluate, and their name in the report."""
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
    started = time.monotonic()
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
            other=_held_back(request, under_test, workspace),
            training_copies=count_copies(
                reference, split, under_test.dataset, under_test.lineage, under_test.training, progress
            ),
        ),
        workers=Workers(request.workers, workspace.address),
        cache=under_test.store,
        progress=evaluation_progress(progress),
    )
    label = f"{under_test.dataset.name}-{judge.threat.norm}-{judge.threat.eps:.4g}"
    folder = found.folder or under_test.store / label  # a regression has no cache folder
    about = about_report(under_test.recipe, time.monotonic() - started)
    found.save(folder / "report", about, under_test.lineage.ancestors)
    return replace(found, folder=folder)


def _held_back(request: Request, under_test: ModelUnderTest, workspace: Workspace) -> Split | None:
    """Return up to `HELD_BACK` test samples of the data --other, stratified."""
    if request.other is None:
        return None
    held_back = other_data(request.other, workspace, accepted_by(under_test.dataset))
    return stratified(held_back.test, min(HELD_BACK, len(held_back.test)), under_test.judge.seed)


def _second(
    reference: str,
    under_test: ModelUnderTest,
    workspace: Workspace,
    external: ExternalModelSpec,
    request: Request,
    *,
    search: bool = False,
) -> ModelUnderTest:
    """Return another model; it must have the same samples and evaluation threat model."""
    data, threat = request.data, request.threat
    other = find_model(reference, workspace, external, data=data, threat=threat, search=search)
    if other.dataset.digest != under_test.dataset.digest:
        raise UserError(
            f"'{reference}' has other data or another split ({other.dataset.title}); set one for both with --data"
        )
    if _threat_of(other) != _threat_of(under_test):
        raise UserError(
            f"'{reference}' is evaluated under another threat model; set one for both with --threat"
        )
    return other


def _threat_of(under_test: ModelUnderTest) -> AnyThreat:
    """Return the threat model of an evaluation, without the budget of the validation in training."""
    threat = under_test.judge.threat
    if not isinstance(threat, EditThreatConfig):
        return threat
    default = EditThreatConfig.model_fields["validation_budget"].default
    return threat.model_copy(update={"validation_budget": default})
