"""Names of metrics in MLflow, and runs whose metrics an earlier version logged without groups."""

from __future__ import annotations

import pytest

from advtrain.errors import UserError
from advtrain.runs.folder import RunFolder
from advtrain.tracking import tracker as tracker_module
from advtrain.tracking.metrics import log_metrics, log_params, metric_name
from advtrain.tracking.store import open_client
from advtrain.tracking.tracker import Tracker
from tests.kit import digits_data, digits_recipe

LINE = {"train_loss": 0.5, "val_robust_accuracy": 0.25, "lr": 0.1, "epoch_seconds": 2.0, "samples_per_s": 9.0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train_loss", "train/loss"),
        ("train_trades_kl", "train/trades_kl"),
        ("val_average_robust_accuracy", "val/average_robust_accuracy"),
        ("test_robust_accuracy_low", "test/robust_accuracy_low"),
        ("test_digits/mlp/sgd/madry/robust_accuracy", "test/digits/mlp/sgd/madry/robust_accuracy"),
        ("best_robust_accuracy", "val/best_robust_accuracy"),
        ("lr", "train/lr"),
        ("guard_recoveries", "train/guard_recoveries"),
        ("set/adversary.eps", "train/adversary.eps"),
        ("samples_per_s", "system/samples_per_s"),
        ("epoch_seconds", "system/epoch_seconds"),
        ("num_workers", "system/num_workers"),
        ("gpu_seconds", "system/gpu_seconds"),
        ("interruptions", "system/interruptions"),
        ("trials", "system/trials"),
        ("val/robust_accuracy", "val/robust_accuracy"),
        ("system/cpu_utilization_percentage", "system/cpu_utilization_percentage"),
    ],
)
def test_metric_name_has_a_group(name, expected):
    assert metric_name(name) == expected


def test_log_metrics_leaves_out_epoch_step_and_text(store):
    client = open_client(store)
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    log_metrics(client, run_id, {"epoch": 3, "step": 60, "train_loss": 0.5, "note": "text"}, step=3)
    assert client.get_run(run_id).data.metrics == {"train/loss": 0.5}
    assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == [3]
    log_metrics(client, run_id, {"val/robust_mae": 1.0, "val_robust_mae": 2.0}, step=0)
    assert client.get_run(run_id).data.metrics["val/robust_mae"] == 1.0


def test_log_params_adds_a_changed_value_under_the_next_number(store):
    client = open_client(store)
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    for winner in ("t001", "t002", "t002", "t001"):
        log_params(client, run_id, {"winner": winner, "space.optimizer.lr": "x" * 7000})
    assert client.get_run(run_id).data.params == {
        "winner": "t001",
        "winner.2": "t002",
        "winner.3": "t001",
        "space.optimizer.lr": "x" * 6000,
    }


def unreachable(*args, **kwargs):
    raise UserError("the store is down")


@pytest.mark.parametrize("is_down", [False, True])
def test_run_of_earlier_version_gets_its_metrics_again_with_groups(store, tmp_path, monkeypatch, is_down):
    recipe = digits_recipe()
    data = digits_data(recipe)
    facts = {"status": "finished", "data_digest": data.digest, "environment": {"versions": {}, "git": {}}}
    run = RunFolder.create(tmp_path / "runs", "old", recipe.digest(), recipe.to_yaml(), facts)
    tracker = Tracker.start(run, recipe, data, store)
    run_id = tracker.state["run_id"]
    for epoch in (1, 2):
        run.append_metrics({"epoch": epoch, "step": 7 * epoch} | LINE)
        for name in ("epoch", "train_loss"):
            tracker.client.log_metric(run_id, name, epoch, step=epoch)
    tracker._note(epochs=2)
    for _ in range(2):  # the second time, nothing is sent again
        with monkeypatch.context() as patch:
            if is_down:
                patch.setattr(tracker_module, "open_client", unreachable)
            tracker = Tracker.reopen(run, store)
        assert tracker.sync()
        assert [m.step for m in tracker.client.get_metric_history(run_id, "train/loss")] == [1, 2]
    metrics = tracker.client.get_run(run_id).data.metrics
    assert metrics == {metric_name(k): v for k, v in LINE.items()} | {"epoch": 2.0, "train_loss": 2.0}
