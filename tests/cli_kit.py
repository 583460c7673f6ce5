"""Jobs that print their results as the command line does. Each returns the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from advtrain.promotion import PromotionRequest
from pipelines import compare as compare_job
from pipelines import evaluate as evaluate_job
from pipelines import models as models_job
from pipelines import predict as predict_job
from pipelines import promote as promote_job
from pipelines import train as train_job
from pipelines import tune as tune_job
from pipelines.cli import models as text
from pipelines.cli.app import reporting
from pipelines.cli.campaigns import show_campaign, show_study
from pipelines.cli.reports import show_training
from pipelines.evaluate import Request
from pipelines.model_ref import ExternalModelSpec
from pipelines.workspace import Workspace


def train(*args: Any, **kwargs: Any) -> int:
    with reporting() as progress:
        return show_training(train_job.train(*args, **kwargs, progress=progress))


def tune(*args: Any, **kwargs: Any) -> int:
    with reporting() as progress:
        return show_campaign(tune_job.tune(*args, **kwargs, progress=progress))


def resume(*args: Any, **kwargs: Any) -> int:
    with reporting() as progress:
        return show_campaign(tune_job.resume(*args, **kwargs, progress=progress))


def compare(*args: Any, **kwargs: Any) -> int:
    with reporting() as progress:
        return show_study(compare_job.compare(*args, **kwargs, progress=progress))


def evaluate_model(
    reference: str,
    workspace: Workspace,
    request: Request,
    external: ExternalModelSpec,
    *,
    against: str | None = None,
    json: Path | None = None,
) -> int:
    with reporting() as progress:
        result = evaluate_job.evaluate_model(
            reference, workspace, request, external, against=against, progress=progress
        )
    return text.show_evaluation(result, json)


def promote(name: str, workspace: Workspace, request: PromotionRequest) -> int:
    with reporting() as progress:
        return text.show_promotion(promote_job.promote(name, workspace, request, progress=progress))


def rollback(name: str, workspace: Workspace, *, to: str | None, reason: str) -> int:
    with reporting() as progress:
        return text.show_promotion(
            promote_job.rollback(name, workspace, to=to, reason=reason, progress=progress)
        )


def models(name: str | None, workspace: Workspace) -> int:
    with reporting() as progress:
        return text.show_models(models_job.models(name, workspace, progress=progress), workspace.tracking_uri)


def history(name: str, workspace: Workspace, *, verify: bool) -> int:
    with reporting() as progress:
        chain = models_job.history(name, workspace, repair=not verify, progress=progress)
    return text.show_history(name, chain, verify=verify)


def dashboard(workspace: Workspace, out: Path, mlflow_url: str | None) -> int:
    models_job.dashboard(workspace, out, mlflow_url)
    return 0


def predict(uri: str, path: Path, workspace: Workspace, *, out: Path | None, workers: int) -> int:
    return text.show_predictions(predict_job.predict(uri, path, workspace, out=out, workers=workers))


def shadow(name: str, path: Path, workspace: Workspace, *, challenger: str) -> int:
    return text.show_shadow(predict_job.shadow(name, path, workspace, challenger=challenger), path)
