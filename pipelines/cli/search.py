"""Commands that train many times: tune and compare."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.app import command, reporting
from pipelines.cli.completion import complete_runs, complete_yaml
from pipelines.cli.options import (
    CAMPAIGNS,
    RECIPES,
    STUDIES,
    AddressOption,
    AllowCodeOption,
    AllowDownloadOption,
    DataRootOption,
    JsonOption,
    OnceOption,
    RunsOption,
    SetOption,
    TrackingOption,
    build_workspace,
    shipped,
)

CampaignArgument = Annotated[
    str | None,
    typer.Argument(
        help="Name of a shipped campaign, or a YAML file.",
        show_default=False,
        autocompletion=complete_yaml(CAMPAIGNS),
    ),
]
WallOption = Annotated[
    str | None, typer.Option("--wall", metavar="TIME", help="Total time, such as 2h, 90m or 1h30m.")
]
PreferOption = Annotated[
    str | None,
    typer.Option("--prefer", metavar="NAME=VALUE", help="Lower bound on one objective, as clean=0.98."),
]


@command
def tune(
    campaign: CampaignArgument = None,
    set_: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="NAME",
            help="Resume this campaign, or extend it with --trials or --wall.",
            autocompletion=complete_runs("campaign.json"),
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Total number of trials.")] = None,
    wall: WallOption = None,
    prefer: PreferOption = None,
    once: OnceOption = None,
    json: JsonOption = None,
    allow_code: AllowCodeOption = False,
    allow_download: AllowDownloadOption = False,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Search hyperparameters, evaluate the winners on the test split, and register them."""
    from advtrain.errors import UserError
    from pipelines import tune as job
    from pipelines.cli.campaigns import show_campaign
    from tuning.campaign import load_campaign

    if (campaign is None) == (resume is None):
        raise UserError("name a campaign to start, or one to resume with --resume, but not both")
    workspace = build_workspace(runs, tracking_uri, data_root, address, allow_download)
    budget = {"budget.trials": trials, "budget.wall": wall}
    changes = {path: value for path, value in budget.items() if value is not None}
    if resume is not None:
        with reporting(json) as progress:
            result = job.resume(
                resume,
                workspace,
                changes,
                prefer,
                overrides=set_ or [],
                allow_code=allow_code,
                progress=progress,
            )
        return show_campaign(result, json)
    assert campaign is not None
    plan = load_campaign(
        shipped(campaign, CAMPAIGNS, "campaign"),
        lambda name: shipped(name, RECIPES, "recipe"),
        set_ or [],
        changes,
        allow_code=allow_code,
    )
    with reporting(json) as progress:
        result = job.tune(plan, workspace, prefer, once, progress=progress)
    return show_campaign(result, json)


@command
def compare(
    study: Annotated[
        str,
        typer.Argument(
            help="Name of a shipped study, or a YAML file.", autocompletion=complete_yaml(STUDIES)
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Run its quick form: minutes on two cores.")] = False,
    json: JsonOption = None,
    allow_code: AllowCodeOption = False,
    allow_download: AllowDownloadOption = False,
    runs: RunsOption = "runs",
    tracking_uri: TrackingOption = None,
    data_root: DataRootOption = None,
    address: AddressOption = None,
) -> int:
    """Compare methods, architectures and optimizers in one report; resume where it stopped."""
    from pipelines import compare as job
    from pipelines.cli.campaigns import show_study
    from tuning.study.grid import load_study

    path = shipped(study, STUDIES, "study")
    workspace = build_workspace(runs, tracking_uri, data_root, address, allow_download)
    plan = load_study(path, quick=quick)
    with reporting(json) as progress:
        result = job.compare(plan, workspace, quick=quick, allow_code=allow_code, progress=progress)
    return show_study(result, json)
