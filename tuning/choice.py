"""Reasons of a campaign's choice, its search space, and the use of its budget."""

from __future__ import annotations

from typing import Any

from advtrain.evaluation import AnyReport, Report
from tuning.campaign import OBJECTIVES
from tuning.selection import Candidate, Preference
from tuning.space import Distribution, settings
from tuning.text import duration, markdown
from tuning.trials import Ledger

#: Rows of a table, without its head.
Rows = list[list[str]]


def explain_choice(
    ledger: Ledger, winner: Candidate, found: list[Candidate], preference: Preference | None
) -> list[str]:
    """Return one sentence for each step of the choice, in the order of the steps.

    Args:
        winner: trial that was chosen.
        found: all trials that may win.
        preference: limit on an objective; None: none.
    """
    trials, label = ledger.searched, winner.trial.label
    lines = [
        f"{len(found)} of {len(trials)} trials may win. "
        "Trials that failed, were not validated or are disqualified may not.",
        _tier(winner, found),
    ]
    peers = [candidate for candidate in found if candidate.tier == winner.tier]
    if ledger.campaign.pareto:
        front = sum(candidate.on_front for candidate in peers)
        lines.append(
            f"{label} is on the Pareto front of these trials, which has {front}: no trial is at least as good in every "
            "objective and better in one."
            if winner.on_front
            else f"{label} is not on the Pareto front."
        )
    if preference is not None:
        lines.append(_limit(winner, peers, preference))
    kind = f"The score is the {score_name(ledger)}, on the validation split."
    rest = [candidate for candidate in peers if candidate is not winner]
    if ledger.campaign.pareto and winner.on_front:
        rest = [candidate for candidate in rest if candidate.on_front]
    if preference is not None:
        rest = [
            candidate for candidate in rest if preference.kept_by(candidate) == preference.kept_by(winner)
        ]
    lines.append(f"{kind} {_lead(winner, rest)}" if rest else f"{kind} {label} has {winner.score:.4f}.")
    lines += [_seeds(winner, name) for name in winner.figures]
    return lines


def score_name(ledger: Ledger) -> str:
    """Return the formula of the score in words."""
    names = [
        ("" if OBJECTIVES[name] else "negative ") + name.replace("_", " ")
        for name in ledger.campaign.objectives
    ]
    if len(names) == 1:
        return names[0]
    if ledger.campaign.pareto:
        return f"mean of {' and '.join(names)}"
    weights = ledger.campaign.objectives.values()
    return "sum of " + " and ".join(f"{weight} {name}" for weight, name in zip(weights, names, strict=True))


def _tier(winner: Candidate, found: list[Candidate]) -> str:
    label = winner.trial.label
    peers = sum(candidate.tier == winner.tier for candidate in found)
    if winner.lost:
        return f"Every trial that may win failed a confirmation with another seed, {label} too."
    if winner.confirmations:
        return f"{_one_of(label, peers)} confirmed with other seeds, and figures are means over those seeds."
    if winner.trial.status == "finished":
        return f"{_one_of(label, peers)} trained to the end. Such trials rank before stopped ones."
    return f"No trial that may win was trained to the end. {_one_of(label, peers)} stopped early."


def _one_of(label: str, peers: int) -> str:
    return (
        f"{label} is one of {peers} trials that were" if peers > 1 else f"{label} is the only trial that was"
    )


def _limit(winner: Candidate, peers: list[Candidate], preference: Preference) -> str:
    kept = sum(preference.kept_by(candidate) for candidate in peers)
    limit = f"{preference.name.replace('_', ' ')} = {preference.floor:g}"
    if preference.kept_by(winner):
        return f"{kept} of {len(peers)} such trials meet the limit {limit}. They are ranked by the other objectives."
    return f"No trial meets the limit {limit}. {winner.trial.label} is the nearest."


def _lead(winner: Candidate, rest: list[Candidate]) -> str:
    second = max(rest, key=lambda candidate: candidate.score)
    text = (
        f"{winner.trial.label} has {winner.score:.4f}. Of the others, {second.trial.label} has the highest score, "
        f"{second.score:.4f}."
    )
    if len(winner.confirmations) < 2:
        return text
    lead = winner.score - second.score
    spread = winner.score_spread
    if spread is not None and lead < spread:
        text += f" The lead of {lead:.4f} is below the standard deviation over seeds, {spread:.4f}: it may be chance."
    return text


def _seeds(winner: Candidate, name: str) -> str:
    words, lines = name.replace("_", " "), winner.confirmations
    if not lines:
        return (
            f"Validation {words}: {number(name, winner.found[name])} in epoch {winner.found['epoch']:.0f}, with one "
            "seed. A campaign with `confirm` also measures the spread over seeds."
        )
    spread = winner.spread(name)
    each = ", ".join(number(name, line[name]) for line in lines)
    beside = "" if spread is None else f", standard deviation {number(name, spread)}"
    return f"Validation {words}: mean {number(name, winner.figures[name])}{beside}, with {len(lines)} seeds: {each}."


def number(name: str, value: float) -> str:
    """Format the value of a metric: accuracies in percent."""
    return f"{value:.4g}" if name.endswith("mae") else f"{100 * value:.2f} %"


def test_sentence(report: AnyReport) -> str:
    """Return the winner's metrics on the test split with their intervals, as a sentence."""
    if isinstance(report, Report):
        return (
            f"On the test split, which the search did not use: clean accuracy {report.clean}, robust accuracy "
            f"{report.robust} (95 % intervals)."
        )
    return (
        f"On the test split, which the search did not use: clean MAE {report.clean_mae}, worst-case MAE "
        f"{report.robust_mae} (95 % intervals)."
    )


def space_rows(ledger: Ledger, winner: Candidate | None) -> Rows:
    """Return a row for each searched path: path, distribution, value of the best trial."""
    point = {} if winner is None else settings(ledger.plan.space, ledger.point(winner.trial))
    return [[path, range_of(d), shown(point.get(path, "-"))] for path, d in ledger.plan.space.items()]


def range_of(distribution: Distribution) -> str:
    """Return a distribution as text, such as `loguniform 0.0005 to 0.02`."""
    if distribution.choice is not None:
        return f"choice of {', '.join(map(str, distribution.choice))}"
    kind = next(name for name in type(distribution).model_fields if getattr(distribution, name) is not None)
    low, high = distribution.bounds
    return f"{kind} {low:g} to {high:g}"


def shown(value: Any) -> str:
    """Format the value of a hyperparameter."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def budget_rows(ledger: Ledger) -> Rows:
    """Return a row for each limit of the budget: name, used, limit."""
    budget, spent = ledger.campaign.budget, ledger.facts()["spent"]
    trials = ledger.searched
    ends = {
        status: sum(trial.status == status for trial in trials)
        for status in ("finished", "stopped", "failed")
    }
    epochs = sum(len(trial.run.metrics()) for trial in ledger.trials)
    rows = [
        ["trials", str(len(trials)), str(budget.trials)],
        ["trained to the end", str(ends["finished"]), ""],
        ["stopped early", str(ends["stopped"]), f"by {ledger.campaign.ended_by.kind}, or by the budget"],
        ["failed", str(ends["failed"]), f"after {ledger.campaign.max_failures} restarts each"],
        ["epochs of all trials", str(epochs), ""],
        ["wall time", duration(spent.get("wall", 0.0)), _limit_of(budget.wall, duration)],
        ["GPU hours", f"{spent.get('gpu', 0.0) / 3600:.2f}", _limit_of(budget.gpu_hours, "{:g}".format)],
    ]
    if ledger.campaign.confirm is not None:
        confirmations = len(ledger.trials) - len(trials)
        rows.insert(1, ["confirmations", str(confirmations), "not part of the budget"])
    return rows


def _limit_of(value: Any, show: Any) -> str:
    return "no limit" if value is None else show(value)


def campaign_params(ledger: Ledger, winners: list[tuple[Candidate, str | None]]) -> dict[str, str]:
    """Return the parameters of a campaign's MLflow run: space, budget, winners, versions.

    Args:
        winners: each winner with the URI of its version; None: not registered.
    """
    budget = ledger.campaign.budget
    params = {f"space.{path}": text for path, text, _ in space_rows(ledger, None)}
    params |= {
        "budget.trials": str(budget.trials),
        "budget.wall": _limit_of(budget.wall, duration),
        "budget.gpu_hours": _limit_of(budget.gpu_hours, "{:g}".format),
    }
    chosen = {
        "winner": [candidate.trial.label for candidate, _ in winners],
        "registered": [uri for _, uri in winners if uri is not None],
    }
    return params | {name: ", ".join(values) for name, values in chosen.items() if values}


def campaign_tags(
    ledger: Ledger, choices: list[tuple[str, list[str]]], winners: list[tuple[Candidate, str | None]]
) -> dict[str, str]:
    """Return the tags and the description of a campaign's MLflow run.

    Args:
        choices: title and reasons of each winner.
        winners: each winner with the URI of its version; None: not registered.
    """
    best = winners[0][0] if winners else None
    tags = {f"advtrain.space.{path}": text for path, text, _ in space_rows(ledger, best)}
    limited = [row for row in budget_rows(ledger) if row[0] in ("trials", "wall time", "GPU hours")]
    tags["advtrain.budget"] = "; ".join(f"{name}: {used} (limit: {limit})" for name, used, limit in limited)
    if winners:
        tags["advtrain.winner"] = ", ".join(candidate.trial.label for candidate, _ in winners)
        tags["advtrain.registered"] = ", ".join(uri for _, uri in winners if uri is not None) or "none"
    text = [ledger.campaign.description] if ledger.campaign.description else []
    for title, reasons in choices:
        text += [f"## {title}", "\n".join(f"{k}. {reason}" for k, reason in enumerate(reasons, 1))]
    text += ["## Search space", markdown(["path", "distribution", "best trial"], space_rows(ledger, best))]
    text += ["## Budget", markdown(["", "used", "limit"], budget_rows(ledger))]
    return tags | {"mlflow.note.content": "\n\n".join(text)}
