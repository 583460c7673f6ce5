"""Evaluation: worst case per sample, intervals, reports and reproducibility."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import advtrain.evaluation.worst_case as suite_module
from advtrain.attacks import AttackConfig, build_attack, build_suite
from advtrain.data import ArraySplit, Place, stratified
from advtrain.evaluation import EvalSpec, Report, Share, attack_samples, evaluate, validation_accuracy, wilson
from advtrain.evaluation.worst_case import cut_work_items
from advtrain.models import build_model
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.threat import ThreatModel
from tests.kit import ROOT, Linear, digits_data, digits_recipe


def linear_problem(n=200):
    rng = np.random.default_rng(0)
    model = Linear(16)
    images = rng.random((n, 1, 4, 4), dtype=np.float32)
    labels = (images.reshape(n, -1) @ model.weight.detach().numpy() > 0).astype(np.int64)
    labels[:10] = 1 - labels[:10]  # wrong without any attack
    return model, ArraySplit(images, labels)


def pgd(**values):
    return build_attack(AttackConfig.model_validate({"num_steps": 20} | values))


def run(model, split, attacks, threat, seed=0, batch_size=64):
    place = torch.device("cpu")
    return attack_samples(model, split, attacks, threat, seed=seed, batch_size=batch_size, device=place)


def standing(model, split, eps):
    """Return which samples are robust: a linear score moves by at most the box-limited sum of eps |w_i|."""
    x = torch.from_numpy(split.images).flatten(1)
    away = torch.where(torch.from_numpy(split.labels) == 1, -1.0, 1.0).unsqueeze(1) * model.weight.sign()
    worst = (x + eps * away).clamp(0, 1) @ model.weight
    return (worst > 0).long().numpy() == split.labels


def test_robust_samples_are_exactly_those_above_linear_margin_bound():
    model, split = linear_problem()
    result = run(model, split, [pgd()], ThreatModel("linf", 0.02))
    assert np.array_equal(result.robust, standing(model, split, 0.02))
    assert result.clean.sum() == 190
    assert set(np.flatnonzero(result.broken_by == -2)) == set(range(10))


@pytest.mark.parametrize(
    "suite", ["apgd-ce", "apgd-t", "square-300", "pgd-20x2", "apgd-ce-3,square-20,apgd-t"]
)
def test_multi_batch_work_items_give_correct_result_per_sample(suite, monkeypatch):
    """Broken samples leave batches of 2, which are refilled from a work item of up to 8 samples."""
    model, split = linear_problem()
    attacks, sizes = build_suite(suite), []
    for attack in attacks:

        def find(*args, real=attack.find_failures):
            sizes.append(len(args[1]))
            return real(*args)

        monkeypatch.setattr(attack, "find_failures", find)
    result = run(model, split, attacks, ThreatModel("linf", 0.02), batch_size=2)
    assert max(sizes) > 4
    robust = standing(model, split, 0.02)
    assert np.array_equal(result.robust, robust)
    fallen = result.broken_by >= 0
    assert np.array_equal(fallen, result.clean & ~robust)
    assert np.array_equal(result.adv_predictions[fallen], 1 - split.labels[fallen])
    assert np.array_equal(result.adv_predictions[robust], split.labels[robust])


@pytest.mark.parametrize(
    ("samples", "batch_size", "most", "batches"),
    [
        (0, 5, 4, []),
        (3, 5, 4, [1]),
        (160, 5, 4, [1] * 32),
        (161, 5, 4, [2] + [1] * 31),
        (10_000, 500, 4, [1] * 20),
        (10_000, 250, 4, [2] * 8 + [1] * 24),
        (10_000, 100, 4, [4] * 4 + [3] * 28),
        (10_000, 50, 4, [4] * 50),
        (10_000, 50, 1, [1] * 200),
    ],
)
def test_cut_work_items_feeds_32_workers_within_batch_limit(samples, batch_size, most, batches):
    rows = np.arange(7, 7 + samples)
    items = cut_work_items(rows, batch_size, most)
    assert [-(-len(item) // batch_size) for item in items] == batches
    assert np.array_equal(np.concatenate([rows[:0], *items]), rows)
    assert all(len(item) % batch_size == 0 for item in items[:-1])


def test_work_items_have_fewer_batches_for_large_samples(monkeypatch):
    model, split = linear_problem()
    sizes = []
    attack = pgd()
    real = attack.find_failures
    monkeypatch.setattr(attack, "find_failures", lambda *args: (sizes.append(len(args[1])), real(*args))[1])
    monkeypatch.setattr(suite_module, "MOST_BYTES", 4 * 16 * 4)  # two batches of two
    run(model, split, [attack], ThreatModel("linf", 0.02), batch_size=2)
    assert max(sizes) == 4


def test_attack_runs_only_on_samples_still_robust():
    model, split = linear_problem()
    result = run(model, split, [pgd(num_steps=1, name="fgsm"), pgd()], ThreatModel("linf", 0.02))
    first, second = result.attacks
    assert first.num_attacked == 190
    assert first.num_broken > 0
    assert second.num_attacked == first.num_standing == 190 - first.num_broken


def test_adversarial_predictions_are_wrong_for_broken_samples():
    model, split = linear_problem()
    result = run(model, split, [pgd()], ThreatModel("linf", 0.05))
    fallen = result.broken_by == 0
    assert fallen.any()
    assert (result.adv_predictions[fallen] != split.labels[fallen]).all()
    assert (result.adv_predictions[result.robust] == split.labels[result.robust]).all()


def test_attack_samples_is_deterministic_and_restores_training_mode():
    data = digits_data()
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 30),
        torch.nn.Dropout(0.5),
        torch.nn.ReLU(),
        torch.nn.Linear(30, 10),
    ).train()
    results = [run(model, data.test, [pgd(num_steps=2)], ThreatModel("linf", 0.05), seed) for seed in (0, 0)]
    assert np.array_equal(results[0].broken_by, results[1].broken_by)
    assert model.training


def test_validation_counts_of_ranks_sum_to_total():
    model, split = linear_problem()

    def counts(place):
        return validation_accuracy(
            model, split, pgd(), ThreatModel("linf", 0.02), seed=0, batch_size=64, place=place
        )

    whole = counts(Place())
    parts = [counts(Place(rank, 3)) for rank in range(3)]
    assert {key: sum(part[key] for part in parts) for key in whole} == whole
    assert whole["clean_accuracy"] == 190


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_matches_literature(count, total, low, high):
    """81 of 263 is the worked example of Newcombe (1998), table I, method 3."""
    assert wilson(count, total) == pytest.approx((low, high), abs=1e-4)


def test_report_round_trips_through_folder_and_names_threat_and_data(tmp_path):
    data = digits_data()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    threat = ThreatModel("linf", 8 / 255)
    found = evaluate(
        EvalSpec(
            model,
            data.test,
            data,
            AttackConfig.model_validate({"num_steps": 3}),
            threat,
            name="m",
        ),
    )
    found.save(tmp_path)
    report = found.report
    assert Report.load(tmp_path) == report
    assert report.threat == "linf:8/255"
    assert report.data_digest == data.digest
    assert report.robust_accuracy <= report.clean_accuracy
    assert sum(c.clean.total for c in report.per_class) == len(data.test) == report.clean.total
    table = pq.read_table(tmp_path / "samples.parquet").to_pandas()
    assert table["robust"].mean() == pytest.approx(report.robust_accuracy)
    assert (table["clean_prediction"] == table["label"]).mean() == pytest.approx(report.clean_accuracy)


def test_stratified_draw_keeps_class_shares_and_is_deterministic():
    data = digits_data()
    draw = stratified(data.test, 50, 0)
    assert len(draw) == 50
    assert np.array_equal(draw.labels, stratified(data.test, 50, 0).labels)
    assert np.abs(np.bincount(draw.labels, minlength=10) - 5).max() <= 1
    assert stratified(data.test, 10**6, 0) is data.test
    assert len(np.unique(stratified(data.test, 10, 0).labels)) == 10


def test_name_of_the_file_is_in_the_report_and_not_in_the_key_of_the_cache(tmp_path):
    recipe, data = digits_recipe(), digits_data()
    network = build_model(recipe.model, data.shape, data.num_classes)
    source = ModelSource.of(network.state_dict(), Architecture(recipe.model, data.shape, data.num_classes))
    folders = set()
    for file in (None, "digits.npz"):
        named = replace(data, file=file)
        spec = EvalSpec(source, data.test.take(range(8)), named, "pgd-1", ThreatModel("linf", 0.1), "m")
        found = evaluate(spec, cache=tmp_path)
        folders.add(found.folder)
        assert found.report.file == file
    assert len(folders) == 1
    assert found.all_known


def test_nan_logits_count_as_wrong():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 2), float("nan")) + 0 * x.flatten(1).sum(1, keepdim=True)

    _, split = linear_problem()
    result = run(Broken(), split, [pgd()], ThreatModel("linf", 0.02))
    assert result.clean.sum() == 0
    assert result.robust.sum() == 0


def test_share_of_empty_input_has_interval_zero_to_one():
    assert Share.of([]).low == 0
    assert Share.of([]).high == 1


def test_published_schema_matches_report():
    published = json.loads((ROOT / "docs" / "reference" / "report.schema.json").read_text())
    assert published == Report.model_json_schema(mode="serialization")
    assert {"clean_accuracy", "robust_accuracy", "trust"} <= set(published["required"])
