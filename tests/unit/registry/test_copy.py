"""MLflow's page of registered models: a model, its copy and their audit logs."""

from __future__ import annotations

import pytest

from advtrain.registry import build_dashboard, copy
from advtrain.runs.lineage import ANCESTORS_TAG, Ancestor, ancestors_tag, named_in_tag
from advtrain.tracking.store import open_client
from tests.registry_kit import RUN_TAGS, flags, make_archive, make_evaluation, make_version


@pytest.mark.parametrize("elsewhere", [False, True])
def test_every_registered_model_has_a_description_and_comes_before_its_logs(store, tmp_path, elsewhere):
    archive = make_archive(store, tmp_path / "archive")
    make_version(store, archive, tmp_path, make_evaluation(flags(8, 8), flags(8, 8)))
    target = f"sqlite:///{tmp_path / 'other.db'}" if elsewhere else store
    if elsewhere:
        (tmp_path / "other.db").write_bytes((tmp_path / "mlflow.db").read_bytes())
    copy("models:/digits@champion", store, "digits-production", target)
    models = {model.name: model for model in open_client(target).search_registered_models()}
    for name in ("digits", "digits-production"):
        assert f"Audit logs: {name}.decisions, {name}.registrations." in models[name].description
        assert "Audit log of the model" in models[f"{name}.registrations"].description
        assert list(models).index(name) < list(models).index(f"{name}.registrations")
    assert models["digits-production"].description.startswith("Copies of")
    assert "Audit log of the model digits: its decisions" in models["digits.decisions"].description


def test_copy_on_another_server_names_the_server_of_its_ancestors(store, tmp_path):
    parents = [Ancestor("start", "models:/digits/1", "a" * 64), Ancestor("teacher", "w.pth", "b" * 64)]
    tag = ancestors_tag(parents)
    archive = make_archive(store, tmp_path / "archive")
    evaluation = make_evaluation(flags(8, 8), flags(8, 8))
    make_version(store, archive, tmp_path, evaluation, run_tags=RUN_TAGS | tag)
    open_client(store).set_model_version_tag("digits", "1", ANCESTORS_TAG, tag[ANCESTORS_TAG])
    target = f"sqlite:///{tmp_path / 'other.db'}"
    (tmp_path / "other.db").write_bytes((tmp_path / "mlflow.db").read_bytes())
    made = copy("models:/digits/1", store, "digits-production", target)
    client = open_client(target)
    version = client.get_model_version("digits-production", made.version)
    for tags in (version.tags, client.get_run(version.run_id).data.tags):
        named = [ancestor.reference for ancestor in named_in_tag(tags[ANCESTORS_TAG])]
        assert named == [f"models:/digits/1 at {store}", "w.pth"]
    page = build_dashboard(client, ["digits-production"], "store", "http://mlflow")
    assert f"start: models:/digits/1 at {store}<br>" in page
