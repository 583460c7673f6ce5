"""Promotion, rollback and audit log on a real SQLite registry, through the commands."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from advtrain.data import Inputs
from advtrain.errors import UserError
from advtrain.promotion import Policy, PromotionRequest, load_policy
from advtrain.registry import load_registered, log_name, read_chain
from advtrain.registry.export import FILES_DIGEST_TAG, FILES_TAG
from advtrain.registry.predictor import load_served, records_of
from advtrain.tracking.store import open_client
from pipelines.workspace import Workspace
from tests.cli_kit import dashboard, history, models, predict, promote, rollback
from tests.kit import ROOT, digits_data
from tests.registry_kit import aliases, flags, make_archive, make_evaluation, make_version

#: Without repetition, because the outcomes in these tests are given, and no model has them.
DEFAULT = load_policy(ROOT / "pipelines" / "policies" / "default.yaml").model_copy(update={"repeat_units": 0})


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    return make_archive(f"sqlite:///{folder / 'mlflow.db'}", folder / "model")


@pytest.fixture
def workspace(store, tmp_path):
    return Workspace(tmp_path / "runs", store, tmp_path)


@pytest.fixture
def add(store, archive, tmp_path):
    """Return a function that registers a version of digits with `robust` robust samples of 1,000."""

    def make(robust: int, clean: int = 950, n: int = 1000, attacks=None, run_tags=None, **report) -> str:
        how = {} if attacks is None else {"attacks": attacks}
        found = make_evaluation(flags(n, clean), flags(n, robust), **how, **report)
        tags = {} if run_tags is None else {"run_tags": run_tags}
        return make_version(store, archive, tmp_path, found, **tags)

    return make


def ask(workspace, version=None, policy=DEFAULT, dry_run=False, reason="", evaluate=False) -> int:
    return promote("digits", workspace, PromotionRequest(version, policy, dry_run, reason, evaluate, 0))


def kinds(workspace):
    decisions = read_chain(open_client(workspace.tracking_uri), "digits").decisions
    return [d.kind for d in decisions if d.kind != "registered"]


def test_promote_makes_better_challenger_champion_and_records_decision(workspace, add, capsys):
    add(700), add(760)
    assert aliases(workspace.tracking_uri) == {"champion": "1", "challenger": "2"}
    assert ask(workspace, reason="better data") == 0
    assert aliases(workspace.tracking_uri) == {"champion": "2", "previous": "1"}
    assert kinds(workspace) == ["allowed", "asked", "allowed"]
    decision = read_chain(open_client(workspace.tracking_uri), "digits").decisions[-1]
    assert (decision.version, decision.champion, decision.reason) == ("2", "1", "better data")
    assert decision.policy["digest"] == DEFAULT.digest
    rules = {finding["rule"]: finding for finding in decision.evidence["rules"]}
    assert "60 against 0" in rules["robust_gain"]["figures"]
    assert decision.evidence["challenger"]["figures"]["robust_accuracy"] == 0.76
    assert "models:/digits/2 is champion" in capsys.readouterr().out


def unpromoted(workspace, archive, tmp_path, robust, n=1000, **report) -> str:
    """Register a version of digits that no decision made champion."""
    found = make_evaluation(flags(n, n), flags(n, robust), **report)
    return make_version(workspace.tracking_uri, archive, tmp_path, found, first_is_champion=False)


def test_first_version_becomes_champion_only_by_decision_of_gate(workspace, archive, tmp_path):
    unpromoted(workspace, archive, tmp_path, 700)
    assert aliases(workspace.tracking_uri) == {"challenger": "1"}
    assert kinds(workspace) == []
    assert ask(workspace) == 0
    assert aliases(workspace.tracking_uri) == {"champion": "1"}
    decision = read_chain(open_client(workspace.tracking_uri), "digits").decisions[-1]
    assert (decision.kind, decision.policy["name"]) == ("allowed", "default")


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        ("suite", {"attacks": ("pgd-20",)}),
        ("samples", {"n": 299}),
        ("trust", {"checks": []}),
        ("worst_class", {"labels": np.repeat(np.arange(10), 100)}),
    ],
)
def test_first_version_is_refused_by_absolute_rule(rule, how, workspace, archive, tmp_path, capsys):
    unpromoted(workspace, archive, tmp_path, **({"robust": 290 if rule == "samples" else 900} | how))
    assert ask(workspace, version="1") == 1
    assert f"refused: {rule}" in " ".join(capsys.readouterr().out.split())
    assert "champion" not in aliases(workspace.tracking_uri)


def test_alias_champion_set_by_hand_is_removed_before_first_decision(workspace, archive, tmp_path, capsys):
    unpromoted(workspace, archive, tmp_path, 700, attacks=("pgd-20",))
    unpromoted(workspace, archive, tmp_path, 700)
    open_client(workspace.tracking_uri).set_registered_model_alias("digits", "champion", "1")
    assert ask(workspace, dry_run=True) == 0
    assert ask(workspace) == 0
    assert "alias champion removed: no decision made version 1 champion" in " ".join(
        capsys.readouterr().out.split()
    )
    assert aliases(workspace.tracking_uri) == {"champion": "2"}


def test_promote_names_failed_rules_and_keeps_aliases_when_refused(workspace, add, capsys):
    add(700), add(650, clean=900)
    assert ask(workspace) == 1
    assert "refused: robust_not_worse, robust_gain, clean_drop" in capsys.readouterr().out
    assert aliases(workspace.tracking_uri) == {"champion": "1", "challenger": "2"}
    assert kinds(workspace) == ["allowed", "asked", "refused"]


def test_promote_dry_run_prints_verdict_and_changes_nothing(workspace, add, capsys):
    add(700), add(760), add(600)
    before = aliases(workspace.tracking_uri)
    assert ask(workspace, version="2", dry_run=True) == 0
    assert ask(workspace, version="3", dry_run=True) == 1
    assert "it would be refused: robust_not_worse" in capsys.readouterr().out
    assert aliases(workspace.tracking_uri) == before
    assert kinds(workspace) == ["allowed"]


def test_promote_succeeds_when_version_is_already_champion(workspace, add, capsys):
    add(700), add(760)
    assert ask(workspace) == 0
    assert ask(workspace, version="2") == 0
    assert "champion already" in capsys.readouterr().out
    assert kinds(workspace) == ["allowed", "asked", "allowed"]


def test_version_that_failed_masking_check_gets_no_alias(workspace, add):
    from advtrain.evaluation.checks import Check

    broken = [Check(name="zero_gradients", question="?", verdict="failed", evidence="all of them")]
    add(900, checks=broken)
    assert aliases(workspace.tracking_uri) == {}
    add(700)
    add(990, checks=broken)
    assert aliases(workspace.tracking_uri) == {"champion": "2"}
    assert ask(workspace, version="3") == 1


def test_promote_reevaluates_champion_when_evaluations_differ(workspace, add, capsys):
    """Both versions are the same linear model, so that the new evaluation on real data finds them equal."""
    real = {"n": 359, "data_digest": digits_data().digest, "labels": digits_data().test.labels}
    policy = Policy(
        repeat_units=0,
        name="p",
        version=1,
        suite="pgd-3",
        min_gain=None,
        min_worst_class=None,
        min_neighbour_share=None,
    )
    add(300, clean=300, attacks=("pgd-3",), **real, eps=0.2)
    add(200, clean=300, attacks=("pgd-3",), **real)
    assert ask(workspace, policy=policy, dry_run=True) == 0
    output = capsys.readouterr().out
    assert "evaluating version 1 again at linf:0.1 with pgd-3" in output
    assert "re-evaluated" in output
    assert "dry run, nothing was changed; it would be allowed" in output


def test_promote_reevaluates_weak_challenger_report_on_request(workspace, add, capsys):
    real = {"n": 359, "data_digest": digits_data().digest, "labels": digits_data().test.labels}
    policy = Policy(
        repeat_units=0,
        name="p",
        version=1,
        suite="pgd-3x2",
        min_gain=None,
        min_worst_class=None,
        min_neighbour_share=None,
    )
    add(10, clean=100, attacks=("pgd-3",), **real)
    add(200, clean=300, attacks=("pgd-3",), **real)
    assert ask(workspace, policy=policy, dry_run=True) == 1
    assert "evaluating version" not in capsys.readouterr().out
    ask(workspace, policy=policy, dry_run=True, evaluate=True)
    output = capsys.readouterr().out
    assert "evaluating version 2 again at linf:0.1 with pgd-3x2" in output


def the_file(workspace: Workspace, version: str, name: str) -> Path:
    client = open_client(workspace.tracking_uri)
    run = client.get_run(client.get_model_version("digits", version).run_id)
    (found,) = Path(run.info.artifact_uri.removeprefix("file://")).rglob(name)
    return found


@pytest.mark.parametrize("name", ["model.pt2", "MLmodel", "samples.parquet", "report.json"])
def test_promote_and_load_reject_modified_file(workspace, add, capsys, name):
    add(700), add(760)
    path = the_file(workspace, "2", name)
    path.write_bytes(path.read_bytes() + b"\n")
    assert ask(workspace) == 1
    output = capsys.readouterr().out
    assert "refused: integrity" in output
    assert f"{name} was changed" in output.replace("\n", "")
    assert aliases(workspace.tracking_uri)["champion"] == "1"
    assert kinds(workspace)[-1] == "refused"
    with pytest.raises(UserError, match="is not what was registered"):
        load_served("models:/digits/2", workspace.tracking_uri)
    if name in ("model.pt2", "MLmodel"):
        with pytest.raises(UserError, match=f"{name} was changed"):
            load_registered("models:/digits/2", workspace.tracking_uri)


def test_promote_refuses_when_champion_files_were_modified(workspace, add):
    add(700), add(760)
    path = the_file(workspace, "1", "samples.parquet")
    path.write_bytes(b"no parquet")
    assert ask(workspace) == 1
    decision = read_chain(open_client(workspace.tracking_uri), "digits").decisions[-1]
    assert "version 1 of 'digits' is not what was registered" in decision.evidence["rules"][0]["figures"]


def test_rollback_rejects_modified_version(workspace, add, capsys):
    add(700), add(760)
    assert ask(workspace) == 0
    the_file(workspace, "1", "model.pt2").write_bytes(b"other weights")
    assert rollback("digits", workspace, to=None, reason="try") == 1
    assert "model.pt2 was changed" in capsys.readouterr().out
    assert aliases(workspace.tracking_uri)["champion"] == "2"
    assert kinds(workspace)[-1] == "refused"


def test_rollback_detects_modified_digests_from_audit_log(workspace, add, capsys):
    """The decision that made the version champion reveals that a file and its tags were both changed."""
    import hashlib

    add(700), add(760)
    assert ask(workspace) == 0
    client = open_client(workspace.tracking_uri)
    tags = client.get_model_version("digits", "1").tags
    forged = tags[FILES_TAG].replace(json.loads(tags[FILES_TAG])["model/MLmodel"], "0" * 64)
    client.set_model_version_tag("digits", "1", FILES_TAG, forged)
    client.set_model_version_tag("digits", "1", FILES_DIGEST_TAG, hashlib.sha256(forged.encode()).hexdigest())
    assert rollback("digits", workspace, to=None, reason="try") == 1
    assert "the digests themselves were changed" in capsys.readouterr().out
    assert aliases(workspace.tracking_uri)["champion"] == "2"


def test_rollback_restores_previous_or_named_champion(workspace, add, capsys):
    add(700), add(760), add(820)
    assert ask(workspace, "2") == 0
    assert ask(workspace, "3") == 0
    assert rollback("digits", workspace, to=None, reason="complaints") == 0
    assert aliases(workspace.tracking_uri) == {"champion": "2", "previous": "1"}
    assert rollback("digits", workspace, to="3", reason="they were wrong") == 0
    assert aliases(workspace.tracking_uri) == {"champion": "3", "previous": "2"}
    assert kinds(workspace)[-2:] == ["rolled_back", "rolled_back"]


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("2", "never was champion"),
        ("1", "is champion"),
        ("9", "never was champion"),
        (None, "no champion before"),
    ],
)
def test_rollback_rejects_invalid_target(workspace, add, to, message):
    add(700), add(760)
    with pytest.raises(UserError, match=message):
        rollback("digits", workspace, to=to, reason="r")


def test_unknown_model_or_version_is_named_in_error(workspace, add):
    add(700)
    with pytest.raises(UserError, match="did you mean 'digits'"):
        promote("digit", workspace, PromotionRequest(None, DEFAULT, False, "", False, 0))
    with pytest.raises(UserError, match="cannot load 'models:/digits/7'"):
        ask(workspace, version="7")
    with pytest.raises(UserError, match="no registered model"):
        history("none", workspace, verify=True)


def test_history_and_models_show_audit_log(workspace, add, capsys):
    add(700), add(760), add(500)
    ask(workspace, "2", reason="new [data]"), ask(workspace, "3")
    capsys.readouterr()
    assert models(None, workspace) == 0
    listed = capsys.readouterr().out
    assert "champion" in listed
    assert log_name("digits") not in listed
    assert history("digits", workspace, verify=False) == 0
    output = capsys.readouterr().out
    assert "reason: new [data]" in output
    assert "failed  robust_not_worse" in output
    assert history("digits", workspace, verify=True) == 0
    assert "is intact: 5 decisions, 3 registrations" in capsys.readouterr().out
    open_client(workspace.tracking_uri).delete_model_version(log_name("digits"), "3")
    assert history("digits", workspace, verify=True) == 1
    assert "record 3 is missing" in capsys.readouterr().out
    with pytest.raises(UserError, match="is damaged"):
        ask(workspace, "3")


def test_moved_alias_is_restored_by_next_command(workspace, add, capsys):
    add(700), add(760)
    open_client(workspace.tracking_uri).set_registered_model_alias("digits", "champion", "2")
    assert models("digits", workspace) == 0
    assert "alias champion reset from 2 to 1" in capsys.readouterr().out
    assert aliases(workspace.tracking_uri)["champion"] == "1"


def test_concurrent_promotions_leave_consistent_audit_log(workspace, add, capfd):
    add(700)
    numbers = [add(800 + n) for n in range(4)]
    barrier, codes = threading.Barrier(len(numbers)), {}

    def run(version: str) -> None:
        barrier.wait()
        codes[version] = ask(workspace, version)

    threads = [threading.Thread(target=run, args=(n,)) for n in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [v for v, code in codes.items() if code == 0]
    allowed = [
        d.version
        for d in read_chain(open_client(workspace.tracking_uri), "digits").decisions
        if d.kind == "allowed"
    ]
    # A promotion that starts after another has won is compared with the winner and may still be better.
    assert sorted(["1", *winners]) == sorted(allowed)
    assert aliases(workspace.tracking_uri)["champion"] == allowed[-1]
    assert read_chain(open_client(workspace.tracking_uri), "digits").faults == []


def test_predict_writes_model_outputs_in_every_format(workspace, add, tmp_path, capsys):
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from tests.registry_kit import TenClasses

    add(700)
    x = digits_data().test.images
    np.savez(tmp_path / "x.npz", x=x)
    for name in ("p.parquet", "p.csv", "p.jsonl"):
        assert (
            predict("models:/digits@champion", tmp_path / "x.npz", workspace, out=tmp_path / name, workers=0)
            == 0
        )
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    floats = torch.from_numpy(x).float() / (255 if x.dtype == np.uint8 else 1)
    with torch.no_grad():
        expected = TenClasses(64).eval()(floats).softmax(1).numpy()
    assert np.allclose(np.array(table["probabilities"]), expected, atol=1e-6)
    assert [json.loads(line)["label"] for line in (tmp_path / "p.jsonl").read_text().splitlines()] == table[
        "label"
    ]
    assert len((tmp_path / "p.csv").read_text().splitlines()) == len(x) + 1
    assert not list(tmp_path.glob(".p.*"))


@pytest.mark.slow
def test_predict_on_ray_matches_local_predictions_and_copies_few_batches(
    workspace, add, tmp_path, ray_cluster, monkeypatch
):
    import numpy as np
    import pyarrow.parquet as pq

    add(700)
    drawn, ahead = [], []

    def tasks(*how):
        for task in all_tasks(*how):
            drawn.append(task["row"][0])
            yield task

    def records(served, inputs, rows, outputs):
        ahead.append(drawn[-1] - rows[0])
        return records_of(served, inputs, rows, outputs)

    all_tasks = Inputs.tasks
    monkeypatch.setattr("advtrain.registry.predictor.BATCH", 20)
    monkeypatch.setattr(Inputs, "tasks", tasks)
    monkeypatch.setattr("pipelines.predict.records_of", records)
    np.savez(tmp_path / "x.npz", x=digits_data().test.images)
    for workers in (0, 2):
        out = tmp_path / f"{workers}.parquet"
        assert (
            predict("models:/digits@champion", tmp_path / "x.npz", workspace, out=out, workers=workers) == 0
        )
    assert len(drawn) == 2 * 18
    assert 0 < max(ahead) <= 4 * 20
    here, there = (pq.read_table(tmp_path / f"{workers}.parquet").to_pydict() for workers in (0, 2))
    assert here["input"] == there["input"]
    assert here["label"] == there["label"]
    assert np.allclose(here["probability"], there["probability"], atol=1e-6)


@pytest.mark.parametrize(
    ("out", "message"), [("p.xlsx", "known: .csv, .jsonl, .parquet"), ("none/p.csv", "cannot write")]
)
def test_predict_rejects_invalid_output_path(workspace, add, tmp_path, out, message):
    import numpy as np

    add(700)
    np.savez(tmp_path / "x.npz", x=digits_data().test.images)
    with pytest.raises(UserError, match=message):
        predict("models:/digits@champion", tmp_path / "x.npz", workspace, out=tmp_path / out, workers=0)


def test_dashboard_shows_versions_and_decisions_with_escaped_markup(workspace, add, tmp_path):
    add(700), add(760), add(500)
    ask(workspace, "2", reason="<script>alert(1)</script>"), ask(workspace, "3")
    out = tmp_path / "page.html"
    assert dashboard(workspace, out, "http://mlflow.example:8080/") == 0
    page = out.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert ">version</text>" in page
    assert ">accuracy, %</text>" in page
    assert page.count("http://mlflow.example:8080/#/models/digits/versions/2") >= 3
    assert (
        "refused</b> version 3: robust_not_worse, robust_gain, clean_drop" not in page
    )  # the clean accuracy is unchanged
    assert "refused</b> version 3: robust_not_worse, robust_gain" in page
    for number, robust in (("1", "70.00"), ("2", "76.00"), ("3", "50.00")):
        assert f"version {number}: robust {robust} %" in page
    assert "http" not in page.replace("http://mlflow.example:8080", "").replace("http-equiv", ""), (
        "the page must need no network"
    )


def test_dashboard_reports_empty_registry(workspace, tmp_path):
    assert dashboard(workspace, tmp_path / "page.html", None) == 0
    assert "No model is registered yet" in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="cannot write"):
        dashboard(workspace, tmp_path / "none" / "page.html", None)


def test_archive_with_pickle_is_neither_loaded_nor_promoted(workspace, archive, add, tmp_path, store, capsys):
    """torch.export.load would unpickle the example input. The archive is otherwise intact and registered."""
    import io
    import shutil
    import zipfile

    import torch

    add(700)
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            import os

            return (os.system, (f"touch {trace}",))

    evil = io.BytesIO()
    torch.save(Evil(), evil)
    changed = tmp_path / "changed"
    shutil.copytree(archive, changed)
    path = changed / "data" / "model.pt2"
    with zipfile.ZipFile(archive / "data" / "model.pt2") as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            record = evil.getvalue() if "sample_inputs" in info.filename else source.read(info)
            target.writestr(info.filename, record)
    version = make_version(store, changed, tmp_path, make_evaluation(flags(1000, 950), flags(1000, 800)))
    assert ask(workspace, version, dry_run=True) == 1
    assert "refused: provenance" in capsys.readouterr().out
    with pytest.raises(UserError, match="could run any code"):
        load_registered(f"models:/digits/{version}", workspace.tracking_uri)[0].load()
    assert not trace.exists()


def test_models_of_other_projects_are_not_modified(workspace, add, capsys):
    client = open_client(workspace.tracking_uri)
    client.create_registered_model("it's theirs")
    run = client.create_run("0")
    for _ in range(2):
        client.create_model_version("it's theirs", f"runs:/{run.info.run_id}/model", run_id=run.info.run_id)
    for version in ("1", "2"):
        client.set_registered_model_alias("it's theirs", "champion", version)
        assert models(None, workspace) == 0
        assert dashboard(workspace, workspace.runs.parent / "page.html", None) == 0
        assert str(client.get_model_version_by_alias("it's theirs", "champion").version) == version
    assert not [m.name for m in client.search_registered_models() if m.name.endswith(".decisions")]
    with pytest.raises(UserError, match="advtrain did not register it"):
        promote("it's theirs", workspace, PromotionRequest("1", DEFAULT, False, "", False, 0))


def test_recreated_model_does_not_inherit_champion_of_deleted_model(workspace, add):
    add(700), add(760)
    assert ask(workspace) == 0
    client = open_client(workspace.tracking_uri)
    client.delete_registered_model("digits")
    add(100), add(150)
    assert "champion" not in aliases(workspace.tracking_uri)
    assert models("digits", workspace) == 0
    assert "champion" not in aliases(workspace.tracking_uri)
    add(760)
    assert ask(workspace, "3") == 0, "there is nothing left to compare with"
    assert aliases(workspace.tracking_uri)["champion"] == "3"


def test_rollback_and_promote_work_when_champions_were_deleted(workspace, add):
    add(700), add(760), add(820), add(400)
    assert ask(workspace, "2") == 0
    assert ask(workspace, "3") == 0
    client = open_client(workspace.tracking_uri)
    client.delete_model_version("digits", "2")
    assert rollback("digits", workspace, to=None, reason="the one before is gone") == 0
    assert aliases(workspace.tracking_uri)["champion"] == "1"
    client.delete_model_version("digits", "1")
    assert ask(workspace, "4") == 0
    assert aliases(workspace.tracking_uri)["champion"] == "4"


def test_history_detects_deleted_refusal(workspace, add):
    add(700), add(500)
    assert ask(workspace) == 1
    client = open_client(workspace.tracking_uri)
    last = client.search_model_versions("name = 'digits.decisions'", order_by=["version_number DESC"])[0]
    client.delete_model_version("digits.decisions", last.version)
    assert history("digits", workspace, verify=True) == 1


def test_promote_detects_replaced_report_from_registration_record(workspace, add, tmp_path, capsys):
    """Report, outcomes and tags of a challenger are rewritten before the first decision about it."""
    from advtrain.registry.export import digest_tags, downloaded, file_digests

    add(700), add(600)
    client = open_client(workspace.tracking_uri)
    version = client.get_model_version("digits", "2")
    folder = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://"))
    make_evaluation(flags(1000, 950), flags(1000, 900)).save(folder / "report")
    with downloaded(client, "models:/digits/2", version.run_id) as found:
        for key, value in digest_tags(file_digests(found)).items():
            client.set_model_version_tag("digits", "2", key, value)
    assert ask(workspace) == 1
    assert "refused: integrity" in capsys.readouterr().out


def test_provenance_rule_ignores_run_tags_changed_after_registration(workspace, add, capsys):
    add(700)
    add(800, run_tags={"mlflow.source.git.commit": "c" * 40, "advtrain.git_dirty": "true"})
    client = open_client(workspace.tracking_uri)
    client.set_tag(client.get_model_version("digits", "2").run_id, "advtrain.git_dirty", "false")
    assert ask(workspace) == 1
    assert "refused: provenance" in capsys.readouterr().out


def test_promote_refuses_when_run_was_deleted(workspace, add, capsys):
    add(700), add(800)
    client = open_client(workspace.tracking_uri)
    client.delete_run(client.get_model_version("digits", "2").run_id)
    assert ask(workspace) == 1
    assert "refused: provenance" in capsys.readouterr().out


def test_load_champion_follows_audit_log_when_alias_was_moved(workspace, add):
    add(700), add(100)
    open_client(workspace.tracking_uri).set_registered_model_alias("digits", "champion", "2")
    assert load_served("models:/digits@champion", workspace.tracking_uri).uri == "models:/digits/1"


def test_copied_version_needs_promotion_in_target_model(workspace, add):
    from advtrain.registry import copy

    add(700)
    made = copy("models:/digits@champion", workspace.tracking_uri, "production")
    assert not made.champion
    assert aliases(workspace.tracking_uri, "production") == {"challenger": "1"}
    assert promote("production", workspace, PromotionRequest(None, DEFAULT, False, "", False, 0)) == 0
    assert aliases(workspace.tracking_uri, "production") == {"champion": "1"}
    with pytest.raises(UserError, match="holds decisions"):
        copy("models:/digits@champion", workspace.tracking_uri, "digits.decisions")


def test_predict_does_not_overwrite_input(workspace, add, tmp_path):
    add(700)
    (tmp_path / "x.parquet").write_bytes(b"precious")
    with pytest.raises(UserError, match="would overwrite the input"):
        predict(
            "models:/digits@champion",
            tmp_path / "x.parquet",
            workspace,
            out=tmp_path / "x.parquet",
            workers=0,
        )
    assert (tmp_path / "x.parquet").read_bytes() == b"precious"


def test_models_creates_no_store_and_rollback_needs_reason(tmp_path, workspace, add):
    add(700)
    with pytest.raises(UserError, match="needs a --reason"):
        rollback("digits", workspace, to=None, reason=" ")
    nowhere = Workspace(tmp_path, f"sqlite:///{tmp_path / 'typo.db'}", tmp_path)
    with pytest.raises(UserError, match="there is no store"):
        models(None, nowhere)
    assert not (tmp_path / "typo.db").exists()


def test_models_and_dashboard_show_figures_used_for_promotion(workspace, add, tmp_path, capsys):
    """The report of the version shows a higher figure than the evaluation for its promotion."""
    real = {"n": 359, "data_digest": digits_data().digest, "labels": digits_data().test.labels}
    policy = Policy(
        repeat_units=0,
        name="p",
        version=1,
        suite="pgd-3x2",
        min_gain=None,
        max_clean_drop=None,
        min_worst_class=None,
        min_neighbour_share=None,
    )
    add(0, clean=1, attacks=("pgd-3x2",), **real)
    add(350, clean=355, attacks=("pgd-3",), **real)
    assert ask(workspace, policy=policy, evaluate=True) == 0
    capsys.readouterr()
    assert models("digits", workspace) == 0
    listed = capsys.readouterr().out
    assert "re-evaluated" in " ".join(listed.split())
    assert f"{100 * 350 / 359:.2f}" not in listed
    assert dashboard(workspace, tmp_path / "page.html", None) == 0
    assert f"{100 * 350 / 359:.2f}" not in (tmp_path / "page.html").read_text()


def test_dashboard_shows_champion_of_audit_log_when_alias_was_moved(workspace, add, tmp_path):
    add(700), add(100)
    open_client(workspace.tracking_uri).set_registered_model_alias("digits", "champion", "2")
    assert dashboard(workspace, tmp_path / "page.html", None) == 0
    tile = (tmp_path / "page.html").read_text().partition("champion<b>")[2][:200]
    assert "version 1" in tile
