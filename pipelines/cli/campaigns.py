"""Printed results of campaigns and studies."""

from __future__ import annotations

from pathlib import Path

from advtrain.runs.storage import shared_place
from pipelines.cli.console import console, table, write_json
from pipelines.cli.reports import FAILED, STOPPED, print_where_to_look
from pipelines.compare import StudyResult
from pipelines.tune import CampaignResult
from tuning.report import CampaignReport
from tuning.study.report import StudyReport
from tuning.text import duration


def show_campaign(result: CampaignResult, json_file: Path | None = None) -> int:
    """Print the result of a campaign; return the exit code."""
    report, parent, name = result.report, result.parent, result.ledger.name
    values = {
        "campaign": name,
        "folder": shared_place(result.ledger.folder),
        "status": result.status,
        **_report_values(report),
    }
    write_json(json_file, values)
    if report is None:
        console.print(f"\nstopped; `advtrain tune --resume {name}` resumes it", style="yellow")
        return STOPPED
    _print_tables(report)
    for line in report.remarks:
        console.print(line)
    place = shared_place(result.folder / "report.html")
    console.print(f"search time of this call: {duration(result.seconds)}; report: {place}")
    print_where_to_look(parent.uri, parent.experiment_id, parent.run_id)
    return 0 if result.has_winner else FAILED


def show_study(result: StudyResult, json_file: Path | None = None) -> int:
    """Print the result of a study; return the exit code."""
    report = result.report
    values = {
        "folder": str(result.folder),
        "status": result.status,
        **_report_values(report),
        "failed": {each.cell.name: each.failure for each in result.failed},
    }
    write_json(json_file, values)
    if report is None:
        console.print("\nstopped; the same command resumes it", style="yellow")
        return STOPPED
    _print_tables(report)
    for each in result.failed:
        console.print(f"failed: {each.cell.name}: {each.failure}", style="red")
    console.print(f"{duration(result.seconds)}; report: {result.folder / 'report' / 'report.md'}")
    return FAILED if result.failed else 0


def _report_values(report: CampaignReport | StudyReport | None) -> dict[str, object]:
    """Return a report's values for the JSON file; empty values if the job was stopped."""
    if report is None:
        return {"metrics": {}, "tables": []}
    tables = [{"title": title, "columns": columns, "rows": rows} for title, columns, rows in report.tables]
    return {"metrics": report.metrics, "tables": tables}


def _print_tables(report: CampaignReport | StudyReport) -> None:
    for title, columns, rows in report.tables:
        table(title, columns, rows)
