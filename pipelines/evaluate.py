"""A run, a checkpoint, a registered model or a file -> a report on the test split of its data."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from advtrain.attacks import TransferAttack, build_suite
from advtrain.data import Split, stratified
from advtrain.evaluation import Evaluation, Paired, Report, SampleResults, Workers, evaluate
from advtrain.lookup import UserError
from advtrain.runfolder import write_atomically
from advtrain.storage import shared_place
from advtrain.threat import rounded_radii
from pipelines.console import console, duration, evaluation_view, warn
from pipelines.subject import STATE_DICTS, Foreign, Subject, find_subject
from pipelines.train import STOPPED, Places, print_report


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

    def command(self, reference: str, foreign: Foreign) -> str:
        """Return the command line that gives the same report."""
        words = ["advtrain", "evaluate", reference]
        for name in ("threat", "suite", "data", "limit", "sample", "transfer"):
            if (value := getattr(self, name)) is not None:
                words += [f"--{name}", str(value)]
        return shlex.join(words + (foreign.words() if Path(reference).suffix in STATE_DICTS else []))


def evaluate_model(
    reference: str,
    places: Places,
    request: Request,
    foreign: Foreign,
    *,
    against: str | None = None,
    json: Path | None = None,
) -> int:
    """Judge a model, or two of them on the same samples; return the exit code."""
    if request.suite is not None:
        build_suite(request.suite)  # refuse a typo before anything is loaded
    if request.limit is not None and request.sample is not None:
        raise UserError("--limit takes the first samples and --sample draws some; choose one")
    subject = find_subject(reference, places, foreign, data=request.data, threat=request.threat)
    _check_options(reference, subject, request, foreign, against)
    if request.threat is not None and subject.dataset.eight_bit:
        for remark in rounded_radii({"--threat": subject.judge.threat.eps}):
            warn(remark)
    rival = other = None
    if against is not None:
        other = _second(against, subject, places, foreign, request)
    extra = []
    if request.transfer is not None:
        extra = [TransferAttack(_second(request.transfer, subject, places, foreign, request).source)]
    started = time.perf_counter()
    try:
        found = _judge(reference, subject, places, request, foreign, extra)
        if against is not None and other is not None:
            # Under the first one's judge: the same samples, seed and suite.
            rival = _judge(against, replace(other, judge=subject.judge), places, request, foreign, extra)
    except KeyboardInterrupt:
        console.print("\nstopped; the same command goes on where it was", style="yellow")
        return STOPPED
    _show(found, json, time.perf_counter() - started)
    if rival is not None:
        print_report(rival.report, [])
        _print_comparison(found, rival)
    return 0


def _check_options(
    reference: str, subject: Subject, request: Request, foreign: Foreign, against: str | None
) -> None:
    """Refuse options that would be ignored."""
    references = (reference, against, request.transfer)
    if foreign.words() and not any(Path(r).suffix in STATE_DICTS for r in references if r is not None):
        raise UserError(f"{foreign.words()[0]} is for a state dict; '{reference}' knows its own architecture")
    if subject.dataset.regression:
        for option, value in (
            ("--against", against),
            ("--transfer", request.transfer),
            ("--workers", request.workers),
        ):
            if value:
                raise UserError(f"{option} is for classifiers; '{reference}' is a regression")


def _samples(subject: Subject, request: Request) -> tuple[Split, str]:
    """Return the test samples to judge on, and what the report calls them."""
    test = subject.dataset.test
    if request.limit is not None and request.limit < len(test):
        return test.take(np.arange(request.limit)), f"first {request.limit} test"
    if request.sample is not None and request.sample < len(test):
        drawn = stratified(test, request.sample, subject.judge.seed)
        return drawn, f"stratified {request.sample} test"
    return test, "test"


def _judge(
    reference: str,
    subject: Subject,
    places: Places,
    request: Request,
    foreign: Foreign,
    extra: list[TransferAttack],
) -> Evaluation:
    judge = subject.judge
    split, split_name = _samples(subject, request)
    with evaluation_view() as progress:
        found = evaluate(
            subject.source,
            split,
            subject.dataset,
            request.suite or judge.judged_with,
            judge.threat_model,
            extra=extra,
            name=reference,
            split_name=split_name,
            seed=judge.seed,
            batch_size=judge.batch_size,
            full=True,
            trained=subject.trained,
            command=request.command(reference, foreign),
            workers=Workers(request.workers, places.address),
            store=subject.store,
            progress=progress,
        )
    label = f"{subject.dataset.name}-{judge.threat.norm}-{judge.threat.eps:.4g}"
    folder = found.folder or subject.store / label  # of a regression, which is done in one go
    found.save(folder / "report")
    return replace(found, folder=folder)


def _second(reference: str, subject: Subject, places: Places, foreign: Foreign, request: Request) -> Subject:
    """Return another model, which must be judged on the same samples under the same threat model."""
    other = find_subject(reference, places, foreign, data=request.data, threat=request.threat)
    if other.dataset.digest != subject.dataset.digest:
        raise UserError(
            f"'{reference}' has other data or another split ({other.dataset.name}); name one with --data"
        )
    if other.judge.threat != subject.judge.threat:
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
