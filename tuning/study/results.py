"""Results of a study's cells, grouped into rows: one per grid point, over its seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from advtrain.documents import read_record
from advtrain.evaluation import Report
from advtrain.runs.folder import RunFolder
from tuning.study.grid import Cell

#: (dataset, architecture, optimizer, method)
Row = tuple[str, str, str, str]


@dataclass
class Result:
    """Result of one cell, or the reason why it failed."""

    cell: Cell
    failure: str = ""
    clean: float = 0.0
    robust: float = 0.0
    train_robust: float = 0.0
    standing: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=lambda: np.zeros(0, np.bool_))
    lines: list[dict[str, Any]] = field(default_factory=list)  # metrics of each epoch
    recoveries: int = 0  # number of rollbacks by the guard
    report: Report | None = None

    @classmethod
    def load(cls, cell: Cell, path: Path) -> Result:
        """Read the result of a finished cell from its folder."""
        import pyarrow.parquet as pq

        run = RunFolder(path)
        report = Report.load(run.report)
        lines = run.metrics()
        # The time of the steps that the guard undid belongs to the epoch that was repeated.
        for record in run.recoveries():
            for line in lines:
                if line["epoch"] == record["epoch"]:
                    line["epoch_seconds"] += record["seconds_undone"]
        samples = pq.read_table(run.report / "samples.parquet", columns=["robust"])
        return cls(
            cell,
            clean=report.clean_accuracy,
            robust=report.robust_accuracy,
            train_robust=float(read_record(path / "result.json")["train_robust_accuracy"]),
            standing=samples["robust"].to_numpy(),
            lines=lines,
            recoveries=len(run.recoveries()),
            report=report,
        )

    def __str__(self) -> str:
        name = f"{'/'.join(self.cell.row)} seed {self.cell.seed}"
        if self.failure:
            return f"{name}: failed"
        return f"{name}: clean {100 * self.clean:.1f} % robust {100 * self.robust:.1f} %"


def rows_of(dataset: str, results: list[Result]) -> dict[Row, list[Result]]:
    """Return the finished cells of a data set by row, one for each seed."""
    rows: dict[Row, list[Result]] = defaultdict(list)
    for result in results:
        if result.cell.dataset == dataset and not result.failure:
            rows[result.cell.row].append(result)
    return rows


def label(row: Row, rows: Iterable[Row]) -> str:
    """Return a row's name: its entries on the axes that have several entries in the table."""
    others = list(rows)
    varied = [axis for axis in range(1, 4) if len({other[axis] for other in others}) > 1]
    return " ".join(row[axis] for axis in varied) or row[3]
