"""Report of a campaign: best trials with spread, importances, next steps, figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advtrain.documents import dump_json
from advtrain.evaluation import AnyReport
from advtrain.registry import Registered
from advtrain.runs.folder import write_atomically
from tuning.choice import campaign_params, campaign_tags, explain_choice, shown, test_sentence
from tuning.figures import draw_all
from tuning.observations import distributions
from tuning.report_html import build_page
from tuning.selection import Candidate, Preference, candidates
from tuning.space import settings
from tuning.text import duration, markdown
from tuning.trials import Ledger, Trial

#: Maximum number of trials in the tables.
SHOWN = 8
#: Minimum number of measured trials for computing importances.
LEAST = 10
#: Importance below which the report suggests fixing a path.
IDLE = 0.02
#: The report suggests a wider range if the best value lies within this share of the range from an end.
EDGE = 0.08


@dataclass(frozen=True)
class Winner:
    """A candidate that was evaluated on the test split."""

    candidate: Candidate
    report: AnyReport
    registered: Registered | None


@dataclass
class CampaignReport:
    """Content of a report: tables, remarks and reasons for the terminal, metrics for MLflow."""

    tables: list[tuple[str, list[str], list[list[str]]]]
    remarks: list[str]
    metrics: dict[str, float]
    choices: list[tuple[str, list[str]]] = field(default_factory=list)  # title and reasons of each winner
    tags: dict[str, str] = field(default_factory=dict)  # tags and description of the MLflow run
    params: dict[str, str] = field(default_factory=dict)  # of the MLflow run


def write_report(
    ledger: Ledger,
    winners: list[Winner],
    folder: Path,
    trial_runs: dict[str, str],
    preference: Preference | None = None,
) -> CampaignReport:
    """Write report.html, report.md, trials.json and the figures to `folder`.

    Args:
        winners: winners of the search, best first.
        trial_runs: MLflow run of each trial, by the trial's label.
        preference: limit on an objective that ordered the winners.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = candidates(ledger)
    if preference is not None:
        found = preference.order(found)
    importances = importances_of(ledger)
    tables = [_best_table(ledger, found)]
    if winners:
        tables.append(_winners_table(winners))
    remarks = _remarks(ledger, found, winners, importances)
    draw_all(ledger, found, [w.candidate.trial.label for w in winners], importances, folder)
    figures = sorted(folder.glob("*.png"))
    choices = _choices(ledger, found, winners, preference)
    page = build_page(ledger, choices, tables, remarks, found[0] if found else None, figures)
    write_atomically(folder / "report.html", page)
    text = [f"# Campaign {ledger.name}\n\n{ledger.campaign.description}\n"]
    for title, reasons in choices:
        text += [f"## {title}\n", *[f"{k}. {reason}" for k, reason in enumerate(reasons, 1)], ""]
    for title, columns, rows in tables:
        text += [f"## {title}\n", markdown(columns, rows)]
    text += [
        "## Findings and next steps\n",
        *[f"- {line}" for line in remarks],
        "\n## Figures\n",
    ]
    text += [f"![{path.stem}]({path.name})" for path in figures]
    write_atomically(folder / "report.md", "\n".join(text) + "\n")
    values = [_record(ledger, trial, trial_runs) for trial in ledger.trials]
    write_atomically(folder / "trials.json", dump_json(values, indent=1))
    made = [(w.candidate, w.registered.uri if w.registered is not None else None) for w in winners]
    tags = campaign_tags(ledger, choices, made)
    params = campaign_params(ledger, made)
    return CampaignReport(tables, remarks, _metrics(ledger, found, winners), choices, tags, params)


def _choices(
    ledger: Ledger, found: list[Candidate], winners: list[Winner], preference: Preference | None
) -> list[tuple[str, list[str]]]:
    """Return a title and the reasons of each winner; without winners, those of the best trial."""
    by_label = {candidate.trial.label: candidate for candidate in found}
    chosen: list[tuple[Candidate, Winner | None]] = [
        (by_label.get(w.candidate.trial.label, w.candidate), w) for w in winners
    ]
    if not chosen and found:
        chosen = [(found[0], None)]
    choices = []
    for candidate, winner in chosen:
        reasons = explain_choice(ledger, candidate, found, preference)
        if winner is not None:
            reasons.append(test_sentence(winner.report))
            made = winner.registered
            reasons.append("It is not registered." if made is None else f"It is registered as {made.uri}.")
        choices.append((f"Why {candidate.trial.label} won", reasons))
    return choices


def importances_of(ledger: Ledger) -> dict[str, float]:
    """Return each path's share of the score's variation, computed by Optuna's fANOVA.

    The result is empty with too few trials, and for population-based training, whose trials have no single point.
    Every measured trial counts with its best epoch. A trial stopped early counts too, although it might have
    improved further.
    """
    import optuna

    if ledger.campaign.search.algorithm == "pbt":
        return {}
    known = optuna.create_study(direction="maximize")
    space, axes, scores = ledger.campaign.space, distributions(ledger.campaign), []
    for trial in ledger.searched:
        best = trial.outcome().best
        if best is None:
            continue
        scores.append(ledger.campaign.score(best))
        params = {space[path].label(path): raw for path, raw in trial.point.items()}
        known.add_trial(optuna.trial.create_trial(params=params, distributions=axes, value=scores[-1]))
    varied = len({round(score, 12) for score in scores}) > 1
    if len(scores) < LEAST or not varied or len(ledger.campaign.space) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(known, evaluator=evaluator)
    paths = {d.label(path): path for path, d in ledger.campaign.space.items()}
    return {paths[label]: float(share) for label, share in shares.items()}


def _best_table(ledger: Ledger, found: list[Candidate]) -> tuple[str, list[str], list[list[str]]]:
    base = ledger.plan.base
    title = (
        f"best of {len(ledger.searched)} trials, on the validation split at {base.evaluation.threat_model}"
        f"{', Pareto front marked *' if ledger.campaign.pareto else ''}"
    )
    names = list(found[0].figures) if found else []
    columns = [
        "trial",
        *(name.partition("_")[0] + (", %" if "acc" in name else " MAE") for name in names),
        "epochs",
    ]
    columns += _short(list(ledger.campaign.space))
    rows = []
    for candidate in found[:SHOWN]:
        point = settings(ledger.plan.space, ledger.point(candidate.trial))
        rows.append(
            [
                candidate.trial.label + ("*" if candidate.on_front else ""),
                *(_with_spread(candidate, name) for name in names),
                str(candidate.trial.lines()[-1]["epoch"]),
                *(shown(value) for value in point.values()),
            ]
        )
    return title, columns, rows


def _short(paths: list[str]) -> list[str]:
    """Return the last part of each path where it is unique, else the whole path."""
    ends = [path.rpartition(".")[2] for path in paths]
    return [end if ends.count(end) == 1 else path for end, path in zip(ends, paths, strict=True)]


def _with_spread(candidate: Candidate, name: str) -> str:
    value, spread = candidate.figures[name], candidate.spread(name)
    if name.endswith("mae"):
        return f"{value:.4g}" if spread is None else f"{value:.4g} ± {spread:.2g}"
    return f"{100 * value:.1f}" if spread is None else f"{100 * value:.1f} ± {100 * spread:.1f}"


def _winners_table(winners: list[Winner]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for winner in winners:
        registered = winner.registered
        alias = " (champion)" if registered is not None and registered.champion else ""
        name = f"{registered.uri}{alias}" if registered is not None else "not registered"
        spent = duration(winner.candidate.trial.run.training_seconds())
        rows += [
            [name if number == 0 else "", winner.candidate.trial.label if number == 0 else "", *row]
            for number, row in enumerate([*winner.report.rows, ["training time", spent]])
        ]
    title = (
        f"winners on the test split: {winners[0].report.title.partition(': ')[2] or winners[0].report.title}"
    )
    return title, ["model", "trial", "", "value  [95 % interval]"], rows


def _remarks(
    ledger: Ledger, found: list[Candidate], winners: list[Winner], importances: dict[str, float]
) -> list[str]:
    """Return remarks on trial outcomes, importances, luck of the best trials, and next steps."""
    trials = ledger.searched
    ended = {status: sum(t.status == status for t in trials) for status in ("finished", "stopped", "failed")}
    lines = [
        f"{len(trials)} trials: {ended['finished']} trained to the end, {ended['stopped']} ended early, "
        f"{ended['failed']} failed"
    ]
    for trial in trials:
        reason = trial.disqualified()
        if reason and trial.status != "running":
            lines.append(f"disqualified: {trial.label}: {reason}")
    if importances:
        shares = ", ".join(f"{path} {100 * share:.0f} %" for path, share in importances.items())
        lines.append(
            f"share of the score's variation (fANOVA over {len(found)} trials; a rough estimate, valid only "
            f"for the searched ranges): {shares}"
        )
    lines += [line for candidate in found for line in _luck(candidate)]
    if found:
        lines += _next_steps(ledger, found[0], importances)
    lines += [
        f"`advtrain promote {made.name} --version {made.version}` tries to promote it"
        for made in (winner.registered for winner in winners)
        if made is not None and not made.champion
    ]
    if not winners and ledger.campaign.winners.top:
        lines.append("no model was registered: no trial qualified")
    return lines


def _luck(candidate: Candidate) -> list[str]:
    """Return remarks that compare a candidate's score in the search with its other seeds."""
    lines = [f"{candidate.trial.label} failed its confirmation with {lost}" for lost in candidate.lost]
    if candidate.confirmations:
        scores = [candidate.campaign.score(line) for line in candidate.confirmations]
        seen = candidate.campaign.score(candidate.found)
        lines.append(
            f"{candidate.trial.label}: score {seen:.4f} in the search, "
            f"{', '.join(f'{score:.4f}' for score in scores)} with other seeds"
            f"{', all of them lower: the score in the search was partly luck' if seen > max(scores) else ''}"
        )
    return lines


def _next_steps(ledger: Ledger, best: Candidate, importances: dict[str, float]) -> list[str]:
    lines = []
    for path, distribution in ledger.plan.space.items():
        if distribution.choice is not None:
            continue
        share = distribution.to_unit(ledger.point(best.trial)[path])
        if share < EDGE or share > 1 - EDGE:
            end = "lower" if (share < EDGE) != (distribution.one_minus_loguniform is not None) else "upper"
            lines.append(f"try next: widen {path} beyond its {end} end, where the best trial lies")
        elif importances.get(path, 1.0) < IDLE:
            lines.append(f"try next: fix {path}, which had little effect")
    return lines


def _metrics(ledger: Ledger, found: list[Candidate], winners: list[Winner]) -> dict[str, float]:
    spent = ledger.facts()["spent"]
    metrics = {
        "trials": float(len(ledger.searched)),
        "wall_seconds": float(spent.get("wall", 0.0)),
        "gpu_seconds": float(spent.get("gpu", 0.0)),
    }
    if found:
        metrics |= {f"best_{name}": value for name, value in found[0].figures.items()}
    if winners:
        metrics |= {f"test_{name}": value for name, value in winners[0].report.metrics.items()}
    return metrics


def _record(ledger: Ledger, trial: Trial, trial_runs: dict[str, str]) -> dict[str, Any]:
    return {
        "trial": trial.label,
        "run": trial.run.name,
        "mlflow_run": trial_runs.get(trial.label),
        "status": trial.status,
        "message": trial.message,
        "disqualified": trial.disqualified(),
        "settings": settings(ledger.plan.space, ledger.point(trial)),
        "best": trial.best(),
        "epochs": len(trial.run.metrics()),
    }
