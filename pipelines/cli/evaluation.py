"""Commands that use a model: evaluate, predict, shadow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.app import command, reporting
from pipelines.cli.completion import complete_runs
from pipelines.cli.options import (
    AddressOption,
    AllowCodeOption,
    ArchitectureOption,
    ArgumentsOption,
    DataRootOption,
    JsonOption,
    MeanOption,
    RunsOption,
    StdOption,
    TrackingOption,
    build_workspace,
    expand_path,
)

ThreatOption = Annotated[
    str | None, typer.Option("--threat", metavar="NORM:EPS", help="Evaluation threat model, as linf:8/255.")
]
SuiteOption = Annotated[
    str | None,
    typer.Option(
        "--suite",
        help="Attacks: quick, standard, autoattack, rand, or a list such as apgd-ce,apgd-t,square.",
    ),
]
TransferOption = Annotated[
    str | None,
    typer.Option("--transfer", metavar="MODEL", help="Also attack with examples made on this model."),
]
OtherOption = Annotated[
    str | None,
    typer.Option("--other", metavar="RECIPE|PATH", help="Compare with data that was held back."),
]
NameArgument = Annotated[str, typer.Argument(help="Name of a registered model.")]


@command
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="models:/NAME@ALIAS, models:/NAME/VERSION, a run, a checkpoint, or a file: .pt2, or a state dict "
            "as .pt, .pth or .safetensors.",
            autocompletion=complete_runs("run.json"),
        ),
    ],
    threat: ThreatOption = None,
    suite: SuiteOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="RECIPE|PATH",
            help="Evaluate on this data: a recipe, a built-in data set, or a path; a path without a test split whole.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N test samples.")] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Use a stratified, seeded sample of N test samples.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Compare with this model, sample by sample."),
    ] = None,
    transfer: TransferOption = None,
    other: OtherOption = None,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Ray workers, one core or GPU each; 0: in this process.")
    ] = 0,
    architecture: ArchitectureOption = None,
    arguments: ArgumentsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    json: JsonOption = None,
    allow_code: AllowCodeOption = False,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Evaluate a model under attack on a test split; finished work is cached."""
    from advtrain.events import Message
    from pipelines.cli.models import show_evaluation
    from pipelines.cli.reports import STOPPED
    from pipelines.evaluate import Request, evaluate_model
    from pipelines.model_ref import ExternalModelSpec

    workspace = build_workspace(runs, tracking_uri, data_root, address)
    external = ExternalModelSpec(architecture, list(arguments or []), mean, std, allow_code)
    request = Request(threat, suite, data, limit, sample, transfer, workers, other)
    with reporting(json) as progress:
        try:
            result = evaluate_model(model, workspace, request, external, against=against, progress=progress)
        except KeyboardInterrupt:
            progress(Message("\nstopped; the same command resumes", "note"))
            return STOPPED
    return show_evaluation(result, json)


@command
def predict(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    inputs: Annotated[
        Path | None,
        typer.Argument(
            metavar="INPUT",
            help="An image, a folder of images, .npz, .npy, .csv or .parquet; of texts also .txt, .tsv or .jsonl.",
            callback=expand_path,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="A text instead of INPUT, for a model of texts; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Write all predictions to this .parquet, .csv or .jsonl.", callback=expand_path
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=0, help="Workers of Ray Data, one core or GPU each; 0: in this process."
        ),
    ] = 0,
    json: JsonOption = None,
    tracking_uri: TrackingOption = None,
    address: AddressOption = None,
) -> int:
    """Predict labels and probabilities with a registered model; verify its files first."""
    from pipelines import predict as job
    from pipelines.cli.models import show_predictions

    workspace = build_workspace("runs", tracking_uri, None, address)
    with reporting(json):
        result = job.predict(model, inputs, workspace, texts=text or (), out=out, workers=workers)
    return show_predictions(result, json)


@command
def shadow(
    name: NameArgument,
    inputs: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="An image, a folder of images, .npz, .npy, .csv or .parquet.",
            callback=expand_path,
        ),
    ],
    challenger: Annotated[
        str, typer.Option("--challenger", metavar="V", help="A version or an alias.")
    ] = "challenger",
    json: JsonOption = None,
    tracking_uri: TrackingOption = None,
) -> int:
    """Compare champion and challenger on the same inputs.

    Prints agreement and latency, and the accuracy if the inputs have labels.
    """
    from pipelines import predict as job
    from pipelines.cli.models import show_shadow

    workspace = build_workspace("runs", tracking_uri, None, None)
    with reporting(json):
        result = job.shadow(name, inputs, workspace, challenger=challenger)
    return show_shadow(result, inputs, json)
