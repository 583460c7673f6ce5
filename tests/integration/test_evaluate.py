"""Evaluations at scale: sharded, killed, resumed and cached; external models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from advtrain.errors import UserError
from advtrain.evaluation import EvalSpec, Workers, evaluate, probes
from advtrain.models import ModelConfig
from advtrain.models.serialized import Architecture, ModelSource
from advtrain.threat import ThreatModel
from tests.kit import advtrain, digits_data, digits_recipe, kill_evaluation, train_here


@pytest.fixture(autouse=True)
def _few_samples_are_looked_at(monkeypatch):
    monkeypatch.setattr(probes, "NUM_SAMPLES", 10)


THREAT = ThreatModel("linf", 0.1)
ARCHITECTURE = Architecture(ModelConfig(name="mlp", args={"width": 32}), (1, 8, 8), 10)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the weights of a small network trained on digits."""
    recipe = digits_recipe("model={name: mlp, args: {width: 32}}", "training.epochs=4")
    model, _ = train_here(recipe, tmp_path_factory.mktemp("trained"))
    return model.state_dict()


def evaluated(weights, folder: Path | None, workers: Workers, progress=None, **options):
    data = digits_data()
    source, samples = ModelSource.of(weights, ARCHITECTURE), data.test.take(range(150))
    options = {"batch_size": 40, "full": True, **options}
    spec = EvalSpec(source, samples, data, "apgd-ce-20,square-50", THREAT, name="m", **options)
    found = evaluate(spec, workers=workers, cache=folder, progress=progress)
    if workers.number:
        assert not samples.images.flags.writeable, "the driver keeps a copy beside the one in Ray's store"
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_report_is_identical_for_any_number_of_workers(weights, tmp_path, ray_cluster):
    """Work items have up to two batches, and broken samples leave them."""
    reports = []
    for number in (1, 2, 3):
        found = evaluated(weights, tmp_path / str(number), Workers(number), batch_size=3)
        found.save(tmp_path / f"report{number}")
        reports.append((tmp_path / f"report{number}" / "report.json").read_bytes())
        assert (tmp_path / f"report{number}" / "report.html").stat().st_size > 10_000
    assert reports[0] == reports[1] == reports[2]
    assert 0 < json.loads(reports[0])["robust_accuracy"] < json.loads(reports[0])["clean_accuracy"]


@pytest.mark.slow
@pytest.mark.ray
def test_report_is_unchanged_when_worker_is_killed(weights, tmp_path, ray_cluster):
    expected = evaluated(weights, None, Workers(1), batch_size=3).report
    killed = []

    def kill_once(name: str, done: int, total: int, seconds_left: float | None) -> None:
        if not killed and name.startswith("square"):
            for process in psutil.process_iter(["name", "status"]):
                if process.info["name"].startswith("ray::_Actor") and process.info["status"] != "zombie":
                    killed.append(process.pid)
                    process.kill()

    found = evaluated(weights, None, Workers(2), batch_size=3, progress=kill_once)
    assert killed
    assert found.report == expected


def test_cached_work_items_are_reused_and_truncated_line_is_recomputed(weights, tmp_path, monkeypatch):
    first = evaluated(weights, tmp_path, Workers(0))
    assert not first.all_known
    path = first.folder / "units.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
    second = evaluated(weights, tmp_path, Workers(0))
    assert not second.all_known
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    monkeypatch.setattr(ModelSource, "load", lambda self: pytest.fail("nothing was left to do"))
    third = evaluated(weights, tmp_path, Workers(0))
    assert third.all_known
    assert first.report == second.report == third.report
    assert first.failures == third.failures


def test_cache_key_depends_on_seed_weights_and_split(weights, tmp_path):
    changed = {k: v + 0.01 for k, v in weights.items()}
    folders = {evaluated(weights, tmp_path, Workers(0), full=False).folder}
    folders |= {evaluated(weights, tmp_path, Workers(0), full=False, seed=1).folder}
    folders |= {evaluated(changed, tmp_path, Workers(0), full=False).folder}
    folders |= {evaluated(weights, tmp_path, Workers(0), full=False, split_name="first 150").folder}
    folders |= {evaluated(weights, tmp_path, Workers(0), full=False, other=digits_data().validation).folder}
    assert len(folders) == 5


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("pt", "pt2", "pth")]
FOREIGN = ("--data", "digits", "--threat", "linf:0.098", "--suite", "pgd-10", "--limit", "60")


@pytest.mark.parametrize("suffix", ["safetensors", *SLOW_KINDS])
def test_external_model_is_evaluated_by_one_command(weights, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    plain = {k.removeprefix("network."): v.contiguous() for k, v in weights.items()}
    options = ["--model", "mlp", "--arg", "width=32"]
    if suffix == "safetensors":
        save_file(plain, path)
    elif suffix == "pt2":
        model = ModelSource.of(weights, ARCHITECTURE).load()
        batch = torch.export.Dim("batch")
        torch.export.save(
            torch.export.export(model, (torch.rand(3, 1, 8, 8),), dynamic_shapes=({0: batch},)), path
        )
        options = []
    else:
        wrapped = {f"module.{k}": v for k, v in plain.items()}
        torch.save({"epoch": 3, "state_dict": wrapped} if suffix == "pth" else plain, path)
    options += ["--other", "digits"]
    done = advtrain("evaluate", str(path), *FOREIGN, *options, "--json", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--threat = 0.098 is not 25/255" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    expected = evaluated(weights, None, Workers(0), full=False).samples.clean[:60].mean()
    assert report["clean_accuracy"] == pytest.approx(expected)
    assert 0 <= report["robust_accuracy"] <= report["clean_accuracy"]
    assert report["split"] == "first 60 test"
    assert report["trust"] in ("trusted", "broken")
    assert "--other digits" in report["command"]
    (check,) = [check for check in report["checks"] if check["name"] == "other_images"]
    assert "on held-back images" in check["evidence"]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda p: torch.save(nn.Linear(2, 2), p), ["--model", "mlp"], "Python objects are not loaded"),
        (lambda p: torch.save({"lr": 0.1}, p), ["--model", "mlp"], "no state dict"),
        (lambda p: torch.save({"a": torch.zeros(1)}, p), ["--model", "mlp"], "do not fit mlp"),
        (lambda p: torch.save({"a": torch.zeros(1)}, p), [], "set their architecture with --model"),
        (lambda p: torch.save({"a": torch.zeros(1)}, p), ["--model", "os:getcwd"], "--allow-code"),
        (lambda p: p.write_bytes(b"no"), ["--model", "mlp"], "state dict"),
        (lambda p: None, ["--model", "mlp"], "cannot read"),
    ],
)
def test_evaluate_rejects_invalid_model_file_with_suggestion(tmp_path, make, options, message):
    from pipelines.evaluate import Request
    from pipelines.model_ref import ExternalModelSpec
    from pipelines.workspace import Workspace
    from tests.cli_kit import evaluate_model

    make(tmp_path / "m.pt")
    workspace = Workspace(tmp_path / "runs", "sqlite:///none.db", tmp_path)
    foreign = ExternalModelSpec(model=options[1] if options else None)
    with pytest.raises(Exception, match=message):
        evaluate_model(str(tmp_path / "m.pt"), workspace, Request("linf:0.1", data="digits"), foreign)


def test_evaluate_rejects_pt2_with_fixed_batch_or_wrong_classes(weights, tmp_path):
    from pipelines.model_ref import ExternalModelSpec, find_model
    from pipelines.workspace import Workspace

    workspace = Workspace(tmp_path / "runs", "sqlite:///none.db", tmp_path)
    model = ModelSource.of(weights, ARCHITECTURE).load()
    torch.export.save(torch.export.export(model, (torch.rand(3, 1, 8, 8),)), tmp_path / "fixed.pt2")
    batch = torch.export.Dim("batch")
    few = nn.Sequential(model, nn.Linear(10, 4))
    torch.export.save(
        torch.export.export(few, (torch.rand(3, 1, 8, 8),), dynamic_shapes=({0: batch},)),
        tmp_path / "few.pt2",
    )
    for name, message in (("fixed", "dynamic batch"), ("few", "10 classes")):
        with pytest.raises(UserError, match=message):
            find_model(
                str(tmp_path / f"{name}.pt2"),
                workspace,
                ExternalModelSpec(),
                data="digits",
                threat="linf:0.1",
            )


@pytest.mark.slow
@pytest.mark.ray
def test_evaluation_finishes_when_one_worker_cannot_be_scheduled(weights, ray_cluster):
    """Three of the four cores are in use. Only one of the two actors starts and does all the work."""
    import ray

    holder = ray.remote(num_cpus=3)(type("Holder", (), {"ping": lambda self: None})).remote()
    ray.get(holder.ping.remote())
    try:
        found = evaluated(weights, None, Workers(2), full=False)
    finally:
        ray.kill(holder)
    assert found.report == evaluated(weights, None, Workers(1), full=False).report


def test_model_digest_includes_custom_factory_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    config = ModelConfig(name="my_net:build")
    source = ModelSource(b"weights", Architecture(config, (1, 8, 8), 10))
    digests = []
    for text in ("def build(shape, n): return 1", "def build(shape, n): return 2"):
        (tmp_path / "my_net.py").write_text(text)
        digests.append(replace(source).digest)
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_evaluation_resumes_after_sigkill(weights, tmp_path):
    torch.save(weights, tmp_path / "m.pt")
    command = (
        "evaluate", "m.pt", "--model", "mlp", "--arg", "width=32", "--data", "digits", "--threat", "linf:0.1",
        "--suite", "apgd-ce,apgd-t,square-2000",
    )  # fmt: skip
    path, before = kill_evaluation(*command, cwd=tmp_path, items=8)
    done = advtrain(*command, "--json", "resumed.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert path.read_text().splitlines()[: len(before) - 1] == before[:-1]
    again = advtrain(*command, "--json", "again.json", cwd=tmp_path)
    assert "(from the cache)" in again.stdout
    other = tmp_path / "other"
    other.mkdir()
    torch.save(weights, other / "m.pt")
    done = advtrain(*command, "--json", "whole.json", cwd=other)
    assert done.returncode == 0, done.stderr
    reports = {p.read_bytes() for p in tmp_path.rglob("*.json") if p.parent in (tmp_path, other)}
    assert len(reports) == 1
