"""The guard: a collapse is detected in its epoch, rolled back, and the next setting is applied."""

from __future__ import annotations

import json

import pytest
import torch

import advtrain.training.loop as loop
from advtrain.errors import UserError
from advtrain.runs.checkpoint import best_checkpoint, load_checkpoint
from advtrain.runs.folder import RunFolder
from advtrain.training import Session, describe_recovery, run_worker
from advtrain.training.guard import collapsed, watched_drop
from tests.kit import digits_data, digits_recipe

STRONGER = "guard.stronger=[{adversary.name: n_fgsm}, {adversary.name: pgd, adversary.num_steps: 3}]"
ONE_STEP = ("adversary={name: fgsm_rs, eps: 0.1}", "model.name=mlp", "training.epochs=5")


def folder(tmp_path, recipe, name="runs"):
    return RunFolder.create(tmp_path / name, recipe.name, recipe.digest(), recipe.to_yaml(), {})


@pytest.fixture
def collapses(monkeypatch):
    """Return a function that fakes a collapse in the given (epoch, attack) pairs.

    Only the validation accuracy is faked. The guard itself runs unchanged.
    """
    plain, seen = loop.TrainingLoop._validate, []

    def arrange(*bad):
        def validate(self):
            name = self.components.config.adversary.name
            seen.append((self.state.epoch + 1, name))
            return plain(self) | (
                {"val_robust_accuracy": 0.01} if (self.state.epoch + 1, name) in bad else {}
            )

        monkeypatch.setattr(loop.TrainingLoop, "_validate", validate)
        return seen

    return arrange


def test_collapse_rolls_back_and_continues_with_next_setting(tmp_path, collapses):
    seen = collapses((4, "fgsm_rs"), (5, "n_fgsm"))
    recipe = digits_recipe(*ONE_STEP, STRONGER, "training.checkpoint_steps=7")
    run = folder(tmp_path, recipe)
    assert run_worker(recipe, digits_data(recipe), run, Session()).status == "finished"
    assert seen == [
        *((epoch, "fgsm_rs") for epoch in (1, 2, 3, 4)),
        (4, "n_fgsm"),
        (5, "n_fgsm"),
        (5, "pgd"),
    ]
    first, second = run.recoveries()
    assert (first["epoch"], first["back_to"], first["settings"]) == (
        4,
        "step-00000063",
        {"adversary.name": "n_fgsm"},
    )
    assert (second["epoch"], second["back_to"]) == (5, "step-00000084")
    assert [line["epoch"] for line in run.metrics()] == [1, 2, 3, 4, 5]
    assert all(line["val_robust_accuracy"] > 0.01 for line in run.metrics())
    assert "catastrophic overfitting in epoch 4" in describe_recovery(first)


def test_training_after_rollback_equals_stronger_recipe_from_good_checkpoint(tmp_path, collapses):
    """Oracle: a recipe with the stronger setting continues from the good checkpoint."""
    collapses((3, "fgsm_rs"))
    recipe = digits_recipe(*ONE_STEP, STRONGER, "training.keep_checkpoints=9")
    run = folder(tmp_path, recipe)
    run_worker(recipe, digits_data(recipe), run, Session())
    strong = digits_recipe("adversary={name: n_fgsm, eps: 0.1}", *ONE_STEP[1:], "training.keep_checkpoints=9")
    other = folder(tmp_path, strong, "other")
    good = load_checkpoint(run.checkpoints / "step-00000042")
    good.recipe_digest = strong.digest()
    loop.save_checkpoint(good, other.checkpoints, 9)
    run_worker(strong, digits_data(strong), other, Session())
    ours, theirs = (load_checkpoint(r.checkpoints / "step-00000105") for r in (run, other))
    assert all(torch.equal(ours.model[key], theirs.model[key]) for key in ours.model)


def test_training_ends_at_last_good_epoch_when_no_setting_is_left(tmp_path, collapses):
    collapses((3, "fgsm_rs"))
    recipe = digits_recipe(*ONE_STEP)
    run = folder(tmp_path, recipe)
    for _ in range(2):  # a resume does not continue training
        outcome = run_worker(recipe, digits_data(recipe), run, Session())
        assert outcome.status == "finished"
        assert "training ended there" in outcome.message
    assert best_checkpoint(run.checkpoints).epoch == 2
    assert len(run.recoveries()) == 1


def test_guard_rolls_back_to_last_validated_good_epoch(tmp_path, collapses):
    """Only every second epoch is validated, so epoch 3 is not known to be good."""
    collapses((4, "fgsm_rs"))
    recipe = digits_recipe(
        *ONE_STEP, STRONGER, "evaluation.validation_every=2", "training.keep_checkpoints=9"
    )
    run = folder(tmp_path, recipe)
    run_worker(recipe, digits_data(recipe), run, Session())
    assert [record["back_to"] for record in run.recoveries()] == ["step-00000042"]
    assert [line["epoch"] for line in run.metrics()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("guard.max_drop=null", STRONGER), "does nothing"),
        (("adversary={name: pgd, num_steps: 2, eps: 0.1}", STRONGER), "does nothing"),
        (("guard.stronger=[{model.args.width: 99}]",), "cannot change within a run"),
        (("guard.stronger=[{optimizer.name: sgd}]",), "cannot change within a run"),
        (("guard.stronger=[{evaluation.threat.eps: 1}]",), "cannot change within a run"),
        (("guard.stronger=[{adversary.name: nfgsm}]",), "entry 1: 'adversary.name'"),
        (("guard.stronger=[{adversary.num_step: 3}]",), "did you mean 'num_steps'"),
        (("guard.stronger=[{adversary.num_steps: 3}]",), "fgsm_rs takes one step"),
    ],
)
def test_guard_rejects_settings_that_cannot_apply(overrides, message):
    with pytest.raises(UserError, match=message):
        digits_recipe(*ONE_STEP, *overrides)


def test_kill_between_rollback_and_record_recovers_once(tmp_path, collapses, monkeypatch):
    collapses((3, "fgsm_rs"))
    recipe = digits_recipe(*ONE_STEP, STRONGER)
    whole, broken = folder(tmp_path, recipe), folder(tmp_path, recipe)
    run_worker(recipe, digits_data(recipe), whole, Session())
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_recoveries", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_worker(recipe, digits_data(recipe), broken, Session())
    assert broken.recoveries() == []
    run_worker(recipe, digits_data(recipe), broken, Session())
    (record,), (expected,) = broken.recoveries(), whole.recoveries()
    assert record | {"seconds_undone": 0} == expected | {"seconds_undone": 0}
    assert record["seconds_undone"] > 0
    ours, theirs = (load_checkpoint(r.checkpoints / "step-00000105") for r in (broken, whole))
    assert all(torch.equal(ours.model[key], theirs.model[key]) for key in ours.model)


@pytest.mark.parametrize(
    ("overrides", "robust", "expected"),
    [
        ((), 0.59, True),
        ((), 0.61, False),
        (("guard.max_drop=0.5",), 0.59, False),
        (("guard.max_drop=null",), 0.0, False),
        (("adversary={name: pgd, num_steps: 2, eps: 0.1}",), 0.0, False),
        (("adversary={name: free, num_steps: 4, eps: 0.1}",), 0.0, True),
        (("objective={clean_ce: 1}",), 0.0, False),
    ],
)
def test_collapse_is_drop_below_best_with_one_step_attack(overrides, robust, expected):
    recipe = digits_recipe(*ONE_STEP, *overrides)
    history = [
        {"epoch": 1, "val_robust_accuracy": 0.8},
        {"epoch": 2, "val_robust_accuracy": 0.7},
        {"epoch": 3},
    ]
    drop = watched_drop(recipe)
    assert collapsed(drop, history, {"epoch": 4, "val_robust_accuracy": robust}, recipe.adversary) is expected
    assert collapsed(drop, history, {"epoch": 4}, recipe.adversary) is False


@pytest.mark.parametrize(
    ("delay", "epoch", "expected"),
    [(0, 2, True), (0.5, 2, False), (2, 2, False), (2, 5, False), (1, 5, True)],
)
def test_loss_of_robustness_in_epochs_with_radius_zero_is_no_collapse(delay, epoch, expected):
    """A robust start has 0.8 in the first epoch and 0.5 in the second."""
    recipe = digits_recipe(*ONE_STEP, f"adversary.eps_delay_epochs={delay}")
    history = [{"epoch": n, "val_robust_accuracy": r} for n, r in ((1, 0.8), (2, 0.5), (3, 0.1), (4, 0.3))]
    line = {"epoch": epoch, "val_robust_accuracy": 0.2}
    assert collapsed(watched_drop(recipe), history[: epoch - 1], line, recipe.adversary) is expected


def test_rollback_reads_the_delay_in_force_not_that_of_the_recipe(tmp_path, collapses):
    collapses((4, "fgsm_rs"))
    recipe = digits_recipe(
        *ONE_STEP,
        STRONGER,
        "adversary.eps_delay_epochs=4",
        "training.changes=[{epoch: 1, settings: {adversary.eps_delay_epochs: 0}}]",
    )
    run = folder(tmp_path, recipe)
    assert run_worker(recipe, digits_data(recipe), run, Session()).status == "finished"
    assert [record["epoch"] for record in run.recoveries()] == [4]


def test_unreadable_guard_record_is_rejected(tmp_path):
    run = folder(tmp_path, digits_recipe())
    (run.path / "guard.json").write_text(json.dumps([])[:1])
    with pytest.raises(Exception, match=r"guard\.json' is unreadable"):
        run.recoveries()
