"""Radii of tables in the units of their columns: the model's inputs are scaled to [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from advtrain.data.tables import TableSpec


@dataclass(frozen=True)
class FeatureUnits:
    """Range of a column that is scaled to [0, 1].

    A radius eps changes a value by at most eps * (high - low).
    """

    feature: str  # name of the column
    low: float  # 0 for a one-hot column
    high: float  # 1 for a one-hot column
    one_hot: int = 0  # number of categories, each of them an input; 0: a column of numbers


def feature_units(table: TableSpec | None) -> list[FeatureUnits]:
    """Return the range of each column of a table; nothing without a table."""
    return [
        FeatureUnits(column.name, column.low, column.high)
        if column.low is not None and column.high is not None
        else FeatureUnits(column.name, 0.0, 1.0, len(column.categories or []))
        for column in ([] if table is None else table.columns)
    ]


def unit_table(
    features: Sequence[FeatureUnits], radii: Mapping[str, float], most: int
) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table of the features: their ranges, and what a radius means.

    Args:
        features: the features, of which the first `most` have a row.
        radii: radii in scaled units by their names; each has a column.
        most: largest number of features in the table. A last row counts the others.
    """
    rows = []
    for each in features[:most]:
        name = f"{each.feature} (one-hot, {each.one_hot} categories)" if each.one_hot else each.feature
        changes = [min(eps, 1.0) * (each.high - each.low) for eps in radii.values()]
        shown = [f"± {plain(change)}" for change in changes]
        rows.append([name, f"{plain(each.low)} to {plain(each.high)}", *shown])
    if len(features) > most:
        rows.append([f"and {len(features) - most:,} more", *[""] * (1 + len(radii))])
    return ["feature", "scaled range", *(f"change at {name}" for name in radii)], rows


def unit_note(norm: str) -> str:
    """Return what the rows of `unit_table` mean, as text."""
    alone = "" if norm == "linf" else " Each change is the largest one, where no other feature changes."
    return (
        "A radius is in scaled units, in which the range of each feature is 1. No feature leaves its range."
        f"{alone} A one-hot feature is an input of 0 or 1 for each category, which the attack changes as a number."
    )


def plain(number: float) -> str:
    """Return a number with four digits, and with all digits before the decimal point."""
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e15 else f"{number:,.4g}"
