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
from advtrain.evaluation import EvalSpec, Evaluation, Paired, Report, SampleResults, Workers, evaluate
from advtrain.runs.folder import write_atomically
from advtrain.runs.storage import shared_place
from advtrain.threat import rounded_radii
from pipelines.console import console, evaluation_view, warn
from pipelines.model_ref import STATE_DICTS, ExternalModelSpec, ModelUnderTest, find_model
from pipelines.train import STOPPED, print_report
from pipelines.workspace import Workspace
from tuning.text import duration


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


def evaluate_model(
    reference: str,
    workspace: Workspace,
    request: Request,
    external: ExternalModelSpec,
    *,
    against: str | None = None,
    json: Path | None = None,
) -> int:
    """Judge a model, or two of them on the same samples; return the exit code."""
    if request.suite is not None:
        build_suite(request.suite)  # refuse a typo before anything is loaded
    if request.limit is not None and request.sample is not None:
        raise UserError("--limit takes the first samples and --sample draws some; choose one")
    under_test = find_model(reference, workspace, external, data=request.data, threat=request.threat)
    _check_options(reference, under_test, request, external, against)
    if request.threat is not None and under_test.dataset.eight_bit:
        for remark in rounded_radii({"--threat": under_test.judge.threat.eps}):
            warn(remark)
    rival = other = None
    if against is not None:
        other = _second(against, under_test, workspace, external, request)
    extra = []
    if request.transfer is not None:
        extra = [TransferAttack(_second(request.transfer, under_test, workspace, external, request).source)]
    started = time.perf_counter()
    try:
        found = _judge(reference, under_test, workspace, request, external, extra)
        if against is not None and other is not None:
            # Under the first one's judge: the same samples, seed and suite.
            rival = _judge(
                against, replace(other, judge=under_test.judge), workspace, request, external, extra
            )
    except KeyboardInterrupt:
        console.print("\nstopped; the same command goes on where it was", style="yellow")
        return STOPPED
    _show(found, json, time.perf_counter() - started)
    if rival is not None:
        print_report(rival.report, [])
        _print_comparison(found, rival)
    return 0


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
) -> Evaluation:
    judge = under_test.judge
    split, split_name = _samples(under_test, request)
    with evaluation_view() as progress:
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
            progress=progress,
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


def _show(found: Evaluation, json: Path | None, seconds: float) -> None:
    report = found.report
    if json is not None:
        try:
            write_atomically(json, report.model_dump_json(indent=1))
        except OSError as error:
            raise UserError(f"cannot write '{json}': {error.strerror}") from error
    print_report(report, [])
    if isinstance(report, Report):
        worst = min(report.per_class, key=lambda c: c.robust.value)
        console.print(f"worst class: {worst.name}, robust {worst.robust}")
    known = " (answered from the store)" if found.all_known else ""
    console.print(f"{duration(seconds)}{known}")
    if found.folder is not None:
        console.print(f"report: {shared_place(found.folder / 'report' / 'report.html')}")


def _print_comparison(found: Evaluation, rival: Evaluation) -> None:
    """Print both accuracies of the second model against the first's, on the same samples."""
    if not isinstance(found.samples, SampleResults) or not isinstance(rival.samples, SampleResults):
        raise UserError("--against compares classifiers")
    one, other = found.report.model, rival.report.model
    console.print(f"{other} against {one}, on the same samples (McNemar's exact test):")
    for kind in ("clean", "robust"):
        paired = Paired.of(getattr(found.samples, kind), getattr(rival.samples, kind))
        console.print(f"  {kind} accuracy {paired}")
