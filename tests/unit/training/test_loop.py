"""The training loop in this process: metrics, checkpoints, stop, divergence, damaged checkpoints."""

from __future__ import annotations

import json
import re

import pytest
import torch

from advtrain.errors import UserError
from advtrain.evaluation import validation
from advtrain.runs.checkpoint import load_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.training import Session, launch, loop, run_worker
from tests.kit import digits_data, digits_recipe


def folder(tmp_path, recipe, name="runs") -> RunFolder:
    return RunFolder.create(
        tmp_path / name, recipe.name, recipe.digest(), recipe.to_yaml(), {"status": "running"}
    )


def last_weights(run: RunFolder):
    return load_checkpoint(sorted(run.checkpoints.glob("step-*"))[-1])


def equal(a, b) -> bool:
    return a.step == b.step and all(
        torch.equal(getattr(a, part)[k], v)
        for part in ("model", "optimizer")
        for k, v in getattr(b, part).items()
    )


def stop_at(recipe, run, step, data=None):
    """Run until the loop has done `step` steps, then request a stop."""

    plain = loop.TrainingLoop._check_signals

    def check_signals(self):
        if self.state.step == step:
            self.run_folder.request_stop()
        plain(self)

    loop.TrainingLoop._check_signals = check_signals
    try:
        return run_worker(recipe, data or digits_data(recipe), run, Session())
    finally:
        loop.TrainingLoop._check_signals = plain
        run.clear_stop()


def check_resume(path, recipe, data):
    """Stop a run after 15 steps, within an epoch; its resume must give the weights of an uninterrupted run."""
    whole, broken = folder(path, recipe), folder(path, recipe)
    assert run_worker(recipe, data, whole, Session()).status == "finished"
    assert stop_at(recipe, broken, 15, data).status == "stopped"
    assert last_weights(broken).step_in_epoch > 0
    assert run_worker(recipe, data, broken, Session()).status == "finished"
    assert equal(last_weights(broken), last_weights(whole))


def test_each_epoch_writes_one_metrics_line(tmp_path):
    recipe = digits_recipe("training.epochs=3", "optimizer.ema_decay=0.9", "optimizer.clip_norm=1")
    run = folder(tmp_path, recipe)
    assert launch(recipe, digits_data(recipe), run).status == "finished"
    lines = run.metrics()
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [21, 42, 63]
    for line in lines:
        assert 0 <= line["val_robust_accuracy"] <= line["val_clean_accuracy"] <= 1
        assert 0 <= line["val_average_robust_accuracy"] <= 1
        assert line["train_loss"] == pytest.approx(line["train_adv_ce"])
        assert 0 <= line["train_clipped_fraction"] <= 1
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


@pytest.mark.parametrize(
    "extra",
    [
        (),
        (
            "model.name=tests.unit.training.test_loop:dropout_net",
            "data.augment.flip=true",
            "optimizer.ema_decay=0.9",
        ),
        ("model={name: wide_resnet, args: {depth: 10, width: 1}}", "adversary.num_steps=2"),
        ("adversary.name=free", "adversary.num_steps=2", "optimizer.decay_all=false"),
        (
            "model.name=tests.unit.training.test_loop:dropout_net",
            "adversary={name: freelb, eps: 0.1, num_steps: 2, eps_low: 0.05}",
            "optimizer.ema_decay=0.9",
        ),
        (
            "objective={label_noise_ce: 1, label_noise: random, grad_align: 0.1}",
            "adversary={name: n_fgsm, eps: 0.1}",
            "optimizer.sam_rho=0.05",
            "optimizer.swa_start_epoch=0",
        ),
    ],
    ids=["cnn2", "dropout", "batch_norm", "free", "freelb", "random terms"],
)
def test_resume_in_mid_epoch_equals_uninterrupted_run(tmp_path, extra):
    recipe = digits_recipe("training.epochs=2", *extra)
    whole, broken = folder(tmp_path, recipe), folder(tmp_path, recipe)
    run_worker(recipe, digits_data(recipe), whole, Session())
    assert stop_at(recipe, broken, 30).status == "stopped"
    assert last_weights(broken).step_in_epoch == 9
    torch.rand(3)  # a change of the global RNG must not matter
    assert run_worker(recipe, digits_data(recipe), broken, Session()).status == "finished"
    assert equal(last_weights(broken), last_weights(whole))
    timing = ("epoch_seconds", "samples_per_s")
    strip = [
        [{k: v for k, v in line.items() if k not in timing} for line in r.metrics()] for r in (whole, broken)
    ]
    assert strip[0] == strip[1]


def test_stop_request_works_with_short_epochs(tmp_path):
    """With five steps per epoch, every tenth step is the last of an epoch."""
    recipe = digits_recipe("training.epochs=3", "training.batch_size=260")
    run = folder(tmp_path, recipe)
    run.request_stop()
    outcome = run_worker(recipe, digits_data(recipe), run, Session())
    assert outcome.status == "stopped"
    assert last_weights(run).step == 5


def test_eps_warm_up_logs_no_clean_accuracy(tmp_path):
    recipe = digits_recipe("training.epochs=2", "adversary.eps_warmup_epochs=1")
    run = folder(tmp_path, recipe)
    run_worker(recipe, digits_data(recipe), run, Session())
    assert all("train_clean_accuracy" not in line for line in run.metrics())
    assert all(0.05 < line["train_adv_accuracy"] <= 1 for line in run.metrics())


def dropout_net(shape, num_classes):
    from torch import nn

    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, num_classes)
    )


def test_training_does_not_change_global_rng_state(tmp_path):
    recipe = digits_recipe("training.epochs=1")
    before = torch.get_rng_state()
    run_worker(recipe, digits_data(recipe), folder(tmp_path, recipe), Session())
    assert torch.equal(before, torch.get_rng_state())


def test_resume_skips_damaged_checkpoint_and_logs_each_epoch_once(tmp_path):
    recipe = digits_recipe("training.epochs=3")
    whole, broken = folder(tmp_path, recipe), folder(tmp_path, recipe)
    run_worker(recipe, digits_data(recipe), whole, Session())
    run_worker(recipe, digits_data(recipe), broken, Session())
    newest = sorted(broken.checkpoints.glob("step-*"))[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    assert run_worker(recipe, digits_data(recipe), broken, Session()).status == "finished"
    assert "falling back" in json.dumps(broken.progress())
    assert [line["epoch"] for line in broken.metrics()] == [1, 2, 3]
    assert equal(last_weights(broken), last_weights(whole))


def test_nan_loss_stops_training_and_keeps_last_good_checkpoint(tmp_path):
    recipe = digits_recipe("training.epochs=3", "model.name=tests.unit.training.test_loop:diverging_net")
    run = folder(tmp_path, recipe)
    outcome = run_worker(recipe, digits_data(recipe), run, Session())
    assert outcome.status == "failed"
    assert "at step 31" in outcome.message
    assert "optimizer.lr" in outcome.message
    kept = last_weights(run)
    assert kept.step == 21
    assert all(torch.isfinite(v).all() for v in kept.model.values())


def test_metric_that_is_not_finite_stops_training_and_leaves_valid_files(tmp_path, monkeypatch):
    measure, calls = validation.validation_accuracy, []

    def diverging(*args, **kwargs):
        calls.append(1)
        return measure(*args, **kwargs) | ({} if len(calls) < 2 else {"robust_accuracy": float("inf")})

    monkeypatch.setattr(validation, "validation_accuracy", diverging)
    recipe = digits_recipe("training.epochs=3")
    run = folder(tmp_path, recipe)
    outcome = run_worker(recipe, digits_data(recipe), run, Session())
    assert outcome.status == "failed"
    assert (
        "val_robust_accuracy is NaN or infinite in epoch 2; the last good checkpoint is kept"
        in outcome.message
    )
    assert (last_weights(run).step, [line["epoch"] for line in run.metrics()]) == (21, [1])
    for path in [*run.path.rglob("*.json"), *run.path.rglob("*.jsonl")]:
        assert "Infinity" not in path.read_text()
        assert "NaN" not in path.read_text()


def diverging_net(shape, num_classes):
    from torch import nn

    class Diverging(nn.Module):
        """Network that returns NaN from the 31st training pass on."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, num_classes)
            self.passes = 0

        def forward(self, x):
            self.passes += self.training
            return self.layer(x.flatten(1)) * (float("nan") if self.passes > 30 else 1.0)

    return Diverging()


def test_checkpoint_steps_saves_within_epoch(tmp_path):
    recipe = digits_recipe("training.epochs=1", "training.checkpoint_steps=8", "training.keep_checkpoints=10")
    run = folder(tmp_path, recipe)
    run_worker(recipe, digits_data(recipe), run, Session())
    assert [int(p.name[5:]) for p in sorted(run.checkpoints.glob("step-*"))] == [8, 16, 21]


def test_checkpoint_of_another_recipe_is_rejected(tmp_path):
    from advtrain.errors import UserError

    one, other = digits_recipe("training.epochs=1"), digits_recipe("training.epochs=1", "optimizer.lr=0.1")
    run = folder(tmp_path, one)
    run_worker(one, digits_data(one), run, Session())
    with pytest.raises(UserError, match="another recipe"):
        run_worker(other, digits_data(other), run, Session())


def test_training_error_reaches_caller(tmp_path):
    recipe = digits_recipe("model.name=cnn4")
    with pytest.raises(Exception, match="larger images"):
        launch(recipe, digits_data(recipe), folder(tmp_path, recipe))


def test_run_folders_are_numbered_and_locked(tmp_path):
    from advtrain.errors import UserError

    recipe = digits_recipe()
    one, two = folder(tmp_path, recipe), folder(tmp_path, recipe)
    assert (one.name[-2:], two.name[-2:]) == ("-1", "-2")
    assert one.name.startswith(f"digits-{recipe.digest()[:6]}")
    with one.locked(), pytest.raises(UserError, match="in use"), one.locked():
        pass
    with one.locked():
        pass
    with pytest.raises(UserError, match="did you mean"):
        RunFolder.find(tmp_path / "runs", one.name[:-1] + "7")


def test_changes_apply_at_their_epoch_and_after_resume(tmp_path):
    """The new settings apply from their epoch on, also in a run that is stopped and resumed."""
    change = "training.changes=[{epoch: 1, settings: {optimizer.lr: 0.001, objective.clean_ce: 0.5}}]"
    recipe = digits_recipe("training.epochs=3", change)
    whole, broken = folder(tmp_path, recipe), folder(tmp_path, recipe)
    run_worker(recipe, digits_data(recipe), whole, Session())
    first, second, third = whole.metrics()
    assert second["set/optimizer.lr"] == third["set/optimizer.lr"] == 0.001
    assert (first["set/optimizer.lr"], first["set/objective.clean_ce"]) == (0.005, 0)
    assert "train_clean_ce" not in first
    assert "train_clean_ce" in second
    assert stop_at(recipe, broken, 30).status == "stopped"  # in the second epoch
    assert run_worker(recipe, digits_data(recipe), broken, Session()).status == "finished"
    assert equal(last_weights(broken), last_weights(whole))
    other = digits_recipe("training.epochs=3", change.replace("epoch: 1", "epoch: 2"))
    with pytest.raises(UserError, match="belongs to another recipe"):
        run_worker(other, digits_data(recipe), broken, Session())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{epoch: 1, settings: {model.name: mlp}}", "'model.name' cannot change within a run"),
        ("{epoch: 2, settings: {optimizer.lr: 1}}", "must come at rising epochs below epochs = 2, not at"),
        ("{epoch: 1, settings: {optimizer.lr: -1}}", "training.changes, epoch 1: 'optimizer.lr'"),
    ],
)
def test_invalid_change_is_rejected(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        digits_recipe(f"training.changes=[{change}]")
