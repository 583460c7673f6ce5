"""Results match the golden figures: bit-identical on the same machine, else approximately."""

from __future__ import annotations

import json

import pytest

from tests.golden.measure import FIGURES, REPORT, TRAININGS, judge, machine, train

GOLDEN = json.loads(FIGURES.read_text())


def check_training(name, folder, data_root=None):
    found, run = train(name, folder, data_root)
    expected = GOLDEN["trainings"][name]
    if machine() == GOLDEN["machine"]:
        assert found == expected
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)
    assert found["val_robust_accuracy"] == pytest.approx(expected["val_robust_accuracy"], abs=0.05)
    return run


def test_training_and_evaluation_on_digits_match_the_golden_figures(tmp_path):
    run = check_training("digits", tmp_path)
    found, expected = judge(run), json.loads(REPORT.read_text())
    if machine() == GOLDEN["machine"]:
        assert found == expected
    assert [attack["name"] for attack in found["attacks"]] == [
        attack["name"] for attack in expected["attacks"]
    ]
    for figure in ("clean_accuracy", "robust_accuracy"):
        assert found[figure] == pytest.approx(expected[figure], abs=0.05)


def test_training_on_mnist_matches_the_golden_figures(data_root, tmp_path):
    check_training("mnist, 2,000 images", tmp_path, data_root)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAININGS if "worker" in name])
def test_training_on_ray_workers_matches_the_golden_figures(name, ray_cluster, tmp_path):
    check_training(name, tmp_path)
