"""Records of a run: strict JSON, with digests, also where a value is not finite."""

from __future__ import annotations

import json
import math

import pytest

from advtrain.runs.checkpoint import robustness
from advtrain.runs.folder import RunFolder
from advtrain.runs.sealed import sealed
from pipelines.cli.console import _epoch_line, _progress_line
from tuning.trials import figures_of


def test_records_are_strict_json_with_a_valid_digest(tmp_path):
    run = RunFolder(tmp_path)
    values = {"status": "running", "data_digest": "x", "loss": math.nan, "parts": [1.0, {"a": -math.inf}]}
    run.begin("", values)
    run.update(more=math.inf)
    run.append_metrics({"epoch": 1, "loss": math.nan})
    run.append_metrics({"epoch": 2, "loss": 0.5})
    run.write_progress({"loss": math.inf})
    run.write_recoveries([{"best": math.nan}])
    for path in tmp_path.iterdir():
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            assert path.name == "recipe.yaml" or json.loads(text, parse_constant=pytest.fail) is not None
    assert run.facts() == values | {"loss": None, "parts": [1.0, {"a": None}], "more": None}
    assert [line["loss"] for line in run.metrics()] == [None, 0.5]
    assert run.recoveries() == [{"best": None}]
    run.rewind_metrics(run.metrics())
    assert [line["loss"] for line in run.metrics()] == [None, 0.5]


def test_records_of_earlier_versions_with_nan_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(sealed({"epoch": 1, "val_robust_mae": math.nan})) + "\n"
    )
    (line,) = RunFolder(tmp_path).metrics()
    assert math.isnan(line["val_robust_mae"])
    assert robustness(line) == robustness(line | {"val_robust_mae": None}) == -math.inf
    assert figures_of({"val_robust_mae": None, "val_clean_mae": 1.0}) == {"clean_mae": 1.0}


def test_progress_shows_a_loss_that_is_not_finite():
    progress = {
        "epoch": 1,
        "epochs": 2,
        "step": 3,
        "steps": 4,
        "samples_per_s": 5,
        "seconds_left": 6,
        "validation": {},
    }
    line = {"epoch": 1, "samples_per_s": 5, "train_loss": None, "epoch_seconds": 1.0}
    for text in (_progress_line(progress | {"loss": None}), _epoch_line(line, None)):
        assert "loss not finite" in text
