"""Leaks are refused before a training and in an evaluation, unless the training has allowed them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advtrain.data import DataConfig, load_data
from advtrain.data.rows import record_rows
from advtrain.errors import UserError
from advtrain.events import Message, ignore
from advtrain.registry import Chain, Decision
from advtrain.runs import leaks
from advtrain.runs.leaks import Lineage, write_rows
from advtrain.runs.lineage import Ancestor, ancestors_tag
from pipelines import train as job
from pipelines import tune
from pipelines.cli.models import show_history
from pipelines.leaks import ALLOW_LEAK, check_training, count_copies, training_keys
from pipelines.study_cells import LeakChecks, run_folder
from pipelines.workspace import Workspace
from tests.kit import digits_recipe, run_here
from tests.unit.registry.test_weights import NET, stored_run
from tests.unit.tuning.surface import plan_of

PARENT, CHILD = (load_data(DataConfig(source="digits", split_seed=seed), None) for seed in (0, 1))  # type: ignore[arg-type]
ANCESTOR = Ancestor("start", "models:/digits/1", "f" * 64, "digits-1", PARENT.digest)
RECORDS = {data.digest: record_rows(data) for data in (PARENT, CHILD)}
UNKNOWN = Ancestor("start", "weights.pth", "e" * 64)
LEAKS = r"100 of 144 validation samples are training samples of its ancestor models:/digits/1 \(digits\), numbers 0"


def test_another_split_is_refused_before_training():
    with pytest.raises(UserError, match=LEAKS) as found:
        check_training(CHILD, [ANCESTOR], RECORDS, None, lambda event: None)
    assert "--allow-leak" not in str(found.value)  # tune and compare do not have it
    with pytest.raises(UserError, match=f"{LEAKS}.*--allow-leak REASON"):
        check_training(CHILD, [ANCESTOR], RECORDS, None, lambda event: None, ALLOW_LEAK)


@pytest.mark.parametrize("ancestors", [[], [ANCESTOR]], ids=["no ancestor", "the same split"])
def test_training_without_leaks_records_nothing_and_refuses_the_option(ancestors):
    assert check_training(PARENT, ancestors, RECORDS, None, lambda event: None) == {}
    with pytest.raises(UserError, match="--allow-leak: no sample of an ancestor was found"):
        check_training(PARENT, ancestors, RECORDS, "a demo", lambda event: None)


def test_an_allowed_leak_is_recorded_and_a_warning():
    events: list[Message] = []
    facts = check_training(CHILD, [ANCESTOR], RECORDS, "a demo", events.append)
    assert facts["allowed_leak"]["reason"] == "a demo"
    assert len(facts["allowed_leak"]["leaks"]) == len(events) > 1
    assert {event.level for event in events} == {"warning"}
    with pytest.raises(UserError, match="needs a reason"):
        check_training(CHILD, [ANCESTOR], RECORDS, " ", events.append)


def test_an_unknown_ancestor_is_named():
    events: list[Message] = []
    assert check_training(CHILD, [UNKNOWN], RECORDS, None, events.append) == {}
    assert "the training data of weights.pth is unknown" in events[0].text


@pytest.mark.parametrize("allowed", [None, "a demo"])
def test_evaluation_refuses_or_counts_samples_of_an_ancestor(allowed):
    lineage = Lineage(CHILD.digest, (ANCESTOR,), RECORDS, allowed)
    events: list[Message] = []

    def count():
        return count_copies("models:/child/1", CHILD.test, CHILD, lineage, None, events.append)

    if allowed is None:
        with pytest.raises(UserError, match="test samples are training samples of its ancestor"):
            count()
    else:
        found = count()
        assert 200 < found <= len(CHILD.test)
        assert "which was allowed (a demo)" in events[0].text


def test_samples_of_the_own_training_in_other_data_are_counted_not_refused():
    """A model and an ancestor with the same training data: the samples are known as the model's own."""
    lineage = Lineage(PARENT.digest, (ANCESTOR,), RECORDS)
    training = training_keys(lineage, lambda: CHILD.test, lambda event: None)
    other = PARENT.train.take(range(50))
    data = type(PARENT)("other", other, other, other, 10, (1, 8, 8), "d" * 64)
    assert count_copies("m", other, data, lineage, training, lambda event: None) == 50


def test_training_keys_are_read_from_the_data_only_without_a_record():
    read: list[str] = []

    def train():
        read.append("read")
        return CHILD.train

    known = training_keys(Lineage(CHILD.digest, (), RECORDS), train, lambda event: None)
    assert (read, len(known)) == ([], len(RECORDS[CHILD.digest].keys["train"]))
    assert len(training_keys(Lineage(), train, lambda event: None)) == len(CHILD.train)


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    """Return a workspace with a source run; runs are created and not trained."""
    for module in (job, tune):
        monkeypatch.setattr(module, "check_store", lambda *args: None)
    monkeypatch.setattr(job, "_start_tracking", lambda *args: None)
    monkeypatch.setattr(job, "_drive", lambda run, *args: run)
    run, _ = stored_run(tmp_path / "runs")
    write_rows(run.rows, PARENT)
    return Workspace(tmp_path / "runs", "", tmp_path)


def names(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in workspace.runs.iterdir())


def test_train_refuses_a_leak_before_it_creates_a_run(workspace):
    (source,) = names(workspace)
    recipe = digits_recipe(NET, f"model.from={source}", "data.split_seed=1")
    with pytest.raises(UserError, match=f"training samples of its ancestor {source}.*--allow-leak REASON"):
        job.train(recipe, workspace)
    assert names(workspace) == [source]


def test_train_keeps_an_allowed_leak_and_the_records_of_both(workspace):
    (source,) = names(workspace)
    recipe = digits_recipe(NET, f"model.from={source}", "data.split_seed=1")
    run = job.train(recipe, workspace, allow_leak="a demo")
    lineage = Lineage.of_run(run)
    assert (lineage.allowed_leak, lineage.ancestors[0].reference) == ("a demo", source)
    assert set(lineage.records) == {PARENT.digest, CHILD.digest}
    assert {leak.split for leak in lineage.check().leaks} == {"validation", "test"}


def test_campaign_refuses_a_leak_before_it_begins(workspace):
    (source,) = names(workspace)
    plan = plan_of({"space": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}}})
    base = digits_recipe(NET, f"model.from={source}", "data.split_seed=1")
    with pytest.raises(UserError, match=f"training samples of its ancestor {source}"):
        tune.tune(replace(plan, base=base), workspace)
    assert names(workspace) == [source]


def begin_run(workspace):
    job.train(digits_recipe(NET), workspace)


def begin_campaign(workspace):
    tune.tune(plan_of({"space": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}}}, NET), workspace)


def begin_cell(workspace):
    path = workspace.runs / "study" / "cells" / "one"
    checks = LeakChecks(workspace.runs / "study" / "rows", ignore)
    run_folder(path, digits_recipe(NET), PARENT, workspace.weights, checks)


@pytest.mark.parametrize("begin", [begin_run, begin_campaign, begin_cell])
def test_samples_are_recorded_before_a_folder_counts(workspace, monkeypatch, begin):
    def killed(dataset):
        raise KeyboardInterrupt

    monkeypatch.setattr(leaks, "record_rows", killed)
    before = {*workspace.runs.rglob("run.json"), *workspace.runs.rglob("campaign.json")}
    with pytest.raises(KeyboardInterrupt):
        begin(workspace)
    assert {*workspace.runs.rglob("run.json"), *workspace.runs.rglob("campaign.json")} == before


def test_resume_takes_no_allow_leak(capsys):
    assert run_here("train", "--resume", "digits-1", "--allow-leak", "a demo") == 2
    assert "--allow-leak is for a new run" in capsys.readouterr().err


def test_history_names_the_ancestors_of_a_registration(capsys):
    facts = {
        "kind": "registered",
        "model": "m",
        "version": "1",
        "champion": None,
        "actor": "a",
        "sequence": 1,
    }
    origin = {"ancestors": ancestors_tag([ANCESTOR])["advtrain.ancestors"]}
    record = Decision(**facts, time="2026-01-02T03:04:05.000+00:00", previous="", evidence={"origin": origin})
    show_history("m", Chain([], [], [record]), verify=False)
    expected = f"start: models:/digits/1, weights {'f' * 12}, training data {PARENT.digest[:12]}"
    assert expected in " ".join(capsys.readouterr().out.split())
