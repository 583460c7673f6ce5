"""Metrics and parameters in MLflow: their names, and the functions that log them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Groups of metrics in MLflow.
GROUPS = ("train", "val", "test", "system")
#: Maximum length of a parameter's value in MLflow.
PARAM_LENGTH = 6000


def metric_name(name: str) -> str:
    """Return the name that a metric has in MLflow: a group, a slash, and the rest of its name.

    MLflow shows each group as a section of charts. Elsewhere a metric has a name without a slash:

    - `train_x`, `val_x`, `test_x` become `train/x`, `val/x`, `test/x`.
    - `lr`, `guard_recoveries` and `set/PATH`, a setting that training changes, become `train/lr`,
      `train/guard_recoveries` and `train/PATH`.
    - `best_x`, a validation metric of the best trial of a campaign, becomes `val/best_x`.
    - Every other metric is about machines, time or the budget of a campaign: `samples_per_s` becomes
      `system/samples_per_s`.

    A name that has a group already is returned unchanged.
    """
    if name.split("/")[0] in GROUPS:
        return name
    group, _, rest = name.partition("_")
    if group in GROUPS:
        return f"{group}/{rest}"
    if name in ("lr", "guard_recoveries") or name.startswith("set/"):
        return f"train/{name.removeprefix('set/')}"
    return f"val/{name}" if group == "best" else f"system/{name}"


def log_metrics(client: Any, run_id: str, values: dict[str, Any], step: int) -> None:
    """Log the numbers among `values` in one call, under their names in MLflow.

    `epoch` and `step` are left out: the step of each metric is the epoch.
    """
    from mlflow.entities import Metric

    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k not in ("epoch", "step")}
    named = {metric_name(k): float(v) for k, v in numbers.items()}
    # A metric with a group is newer than the same metric without.
    named |= {k: float(v) for k, v in numbers.items() if k in named}
    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(k, v, now, step) for k, v in named.items()])


def log_params(client: Any, run_id: str, params: dict[str, str]) -> None:
    """Log parameters; MLflow changes none, so a new value of `x` is logged as `x.2`, then `x.3`."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    new = []
    for name, text in params.items():
        value = text[:PARAM_LENGTH]
        used = [key for k in range(1, len(known) + 1) if (key := _numbered(name, k)) in known]
        if not used or known[used[-1]] != value:
            new.append(Param(_numbered(name, len(used) + 1), value))
    client.log_batch(run_id, params=new)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}.{number}"


@contextmanager
def system_metrics(run_id: str) -> Iterator[None]:
    """Record CPU, memory, disk, network and GPU use of this machine while inside."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    monitor = SystemMetricsMonitor(run_id, sampling_interval=2, samples_before_logging=2, resume_logging=True)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
