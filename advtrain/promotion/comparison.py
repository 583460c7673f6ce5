"""Comparison of challenger and champion: the input of the rules, and differing settings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from advtrain.evaluation import Report
from advtrain.evaluation.edit_figures import SETTINGS
from advtrain.promotion.evidence import Evidence, Outcomes
from advtrain.promotion.policy import Policy

#: (verdict, figures, threshold). The verdict is None if the rule does not apply.
Answer = tuple[bool | None, str, str]
NOTHING = "no comparison possible"


@dataclass(frozen=True)
class Case:
    """Input of the rules: policy, challenger and champion."""

    policy: Policy
    challenger: Evidence
    champion: Evidence | None  # None if there is no champion

    @property
    def report(self) -> Report:
        """Report of the challenger, a classifier."""
        assert isinstance(self.challenger.report, Report)
        return self.challenger.report

    @property
    def pair(self) -> tuple[Outcomes, Outcomes] | None:
        """Outcomes of champion and challenger on the same samples; None if their settings differ."""
        if self.champion is None or different(self.challenger, self.champion):
            return None
        one, other = self.champion.outcomes, self.challenger.outcomes
        return None if one is None or other is None else (one, other)


def different(one: Evidence, other: Evidence) -> list[str]:
    """Return the settings in which two reports differ; empty if their outcomes are comparable."""
    a, b = one.report, other.report
    found = [
        name for name in ("data_digest", "split", "threat", "task") if getattr(a, name) != getattr(b, name)
    ]
    if isinstance(a, Report) and isinstance(b, Report):
        found += [] if covers(names_of(b), names_of(a)) and covers(names_of(a), names_of(b)) else ["attacks"]
        found += [] if edit_settings(a) == edit_settings(b) else ["edits"]
    if one.outcomes is not None and other.outcomes is not None and not found:
        found += [] if np.array_equal(one.outcomes.labels, other.outcomes.labels) else ["labels"]
    return found


def edit_settings(report: Report) -> dict[str, Any]:
    """Return the settings of the edits and the digests of table and texts; empty for a ball."""
    compared = {*SETTINGS, "table_digest", "texts_digest"}
    return {} if report.edits is None else report.edits.model_dump(include=compared)


def names_of(report: Report) -> list[str]:
    """Return the names of a report's attacks."""
    return [attack.name for attack in report.attacks]


def covers(made: Iterable[str], wanted: Iterable[str]) -> bool:
    """Return whether each wanted attack was run with at least its budget.

    For example, apgd-t-100x9 covers apgd-t-50x9, and apgd-ce-100x5 covers apgd-ce-100, which has one start.
    """
    budgets = [_budget(name) for name in made]
    return all(
        any(kind == k and all(x >= y for x, y in zip_longest(b, budget, fillvalue=1)) for k, b in budgets)
        for kind, budget in map(_budget, wanted)
    )


def _budget(name: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(.+?)((?:-\d+(?:x\d+)*)?)", name)
    assert match is not None
    return match[1], tuple(int(number) for number in re.findall(r"\d+", match[2]))
