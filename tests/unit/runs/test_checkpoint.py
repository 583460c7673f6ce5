"""Checkpoints: atomic saves, fallback from damaged ones, retention of the best one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from advtrain.errors import UserError
from advtrain.runs.checkpoint import (
    TrainState,
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
)


def state(step=10, robust=0.5, **changes):
    values = {
        "step": step,
        "epoch": 1,
        "step_in_epoch": 0,
        "recipe_digest": "d",
        "model": {"w": torch.full((3,), float(step)), "tied": torch.ones(2, 2).t()},
        "optimizer": {"0.exp_avg": torch.rand(3), "0.step": torch.tensor(3.0)},
        "average": {"module.w": torch.zeros(3)},
        "sums": {"loss": 1.25},
        "history": [{"epoch": 1, "val_robust_accuracy": robust}],
        "seconds": 1.5,
    }
    return TrainState(**values | changes)


def test_checkpoint_round_trips_exactly(tmp_path):
    before = state()
    after = load_checkpoint(save_checkpoint(before, tmp_path, keep=2))
    for key, value in vars(before).items():
        if isinstance(value, dict) and key in ("model", "optimizer", "average"):
            assert all(torch.equal(getattr(after, key)[k], v) for k, v in value.items())
        else:
            assert getattr(after, key) == value


def test_tied_weights_are_saved(tmp_path):
    w = torch.rand(4, 3)
    after = load_checkpoint(save_checkpoint(state(model={"a": w, "b": w}), tmp_path, keep=1))
    assert torch.equal(after.model["a"], w)
    assert torch.equal(after.model["b"], w)


def test_remove_unfinished_deletes_partial_checkpoint(tmp_path):
    (tmp_path / ".step-00000010.99").mkdir()
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_files_have_default_permissions(tmp_path):
    (plain := tmp_path / "plain").touch()
    saved = save_checkpoint(state(), tmp_path, keep=2)
    assert {file.stat().st_mode for file in saved.iterdir()} == {plain.stat().st_mode}


def test_checkpoint_contains_no_pickle(tmp_path):
    folder = save_checkpoint(state(), tmp_path, keep=2)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_latest_checkpoint_falls_back_when_newest_is_damaged(tmp_path, file, damage):
    save_checkpoint(state(10), tmp_path, keep=2)
    newest = save_checkpoint(state(20), tmp_path, keep=2) / file
    content = bytearray(newest.read_bytes())
    if damage == "remove":
        newest.unlink()
    elif damage == "truncate":
        newest.write_bytes(content[: len(content) // 2])
    else:
        content[-1] ^= 1 if file != "state.json" else 0xFF
        newest.write_bytes(bytes(content))
    found, passed = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    assert len(passed) == 1
    assert "step-00000020" in passed[0]
    assert "falling back" in passed[0]


def test_save_checkpoint_keeps_newest_and_best(tmp_path):
    for step, robust in ((10, 0.2), (20, 0.9), (30, 0.3), (40, 0.4), (50, 0.1)):
        save_checkpoint(state(step, robust), tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000040", "step-00000050"]
    assert best_checkpoint(tmp_path).step == 20


def test_save_checkpoint_keeps_new_ones_when_later_steps_are_damaged(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(state(step, 0.1), tmp_path, keep=3)
    for step in (20, 30):
        (tmp_path / f"step-000000{step}" / "model.safetensors").write_bytes(b"")
    save_checkpoint(state(12, 0.05), tmp_path, keep=2)
    save_checkpoint(state(14, 0.05), tmp_path, keep=2)
    found, passed = latest_checkpoint(tmp_path)
    assert (found.step, len(passed), best_checkpoint(tmp_path).step) == (14, 2, 10)


def test_mid_epoch_checkpoint_is_never_best(tmp_path):
    save_checkpoint(state(10, 0.2), tmp_path, keep=3)
    save_checkpoint(state(15, 0.2, step_in_epoch=5), tmp_path, keep=3)
    assert best_checkpoint(tmp_path).step == 10


def test_save_checkpoint_keeps_old_one_when_disk_is_full(tmp_path):
    """A file size limit of 64 KiB makes a real write fail."""
    save_checkpoint(state(10), tmp_path, keep=1)
    script = f"""
import resource, signal, torch, pathlib
from advtrain.runs.checkpoint import save_checkpoint
from advtrain.errors import UserError
from tests.unit.runs.test_checkpoint import state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_checkpoint(state(20, model={{"w": torch.rand(100_000)}}), pathlib.Path({str(tmp_path)!r}), keep=1)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "cannot write the checkpoint" in done.stdout, done.stderr
    assert "make room" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
    assert load_checkpoint(tmp_path / "step-00000010").step == 10


def test_best_weights_uses_average_when_more_robust():
    line = {"val_robust_accuracy": 0.4, "val_average_robust_accuracy": 0.5}
    assert torch.equal(state(history=[line]).best_weights()["w"], torch.zeros(3))
    line = {"val_robust_accuracy": 0.5, "val_average_robust_accuracy": 0.4}
    assert torch.equal(state(history=[line]).best_weights()["w"], torch.full((3,), 10.0))
    assert state(history=[line]).score == 0.5


def test_latest_checkpoint_is_none_in_empty_folder(tmp_path):
    assert latest_checkpoint(tmp_path / "none") == (None, [])
    with pytest.raises(UserError, match="no intact checkpoint"):
        best_checkpoint(tmp_path)
