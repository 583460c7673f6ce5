"""Progress of a run on the console."""

from __future__ import annotations

from advtrain.events import TrainingTick
from advtrain.runs.folder import RunFolder
from pipelines.cli import console
from pipelines.cli.console import ConsoleProgress


def values(epoch: int, step: int, *remarks: str) -> dict[str, object]:
    return {
        "epoch": epoch,
        "epochs": 9,
        "step": step,
        "steps": 90,
        "loss": 1.0,
        "samples_per_s": 100.0,
        "seconds_left": 60.0,
        "validation": {},
        "remarks": list(remarks),
    }


def test_resumed_run_shows_no_progress_of_the_earlier_attempt(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "PLAIN_S", 0.0)
    run = RunFolder.create(tmp_path, "digits", "abcdef", "", {"status": "running"})
    run.write_progress(values(1, 4, "preemption notice"))
    with ConsoleProgress() as progress:
        progress(TrainingTick(run))
        progress(TrainingTick(run))
        assert capsys.readouterr().out == ""
        run.write_progress(values(1, 5, "resumed on 2 workers"))
        progress(TrainingTick(run))
    shown = capsys.readouterr().out
    assert "note: resumed on 2 workers" in shown
    assert "epoch 1/9  step 5/90" in shown
    assert "preemption" not in shown
