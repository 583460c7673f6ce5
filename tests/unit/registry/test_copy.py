"""MLflow's page of registered models: a model, its copy and their audit logs."""

from __future__ import annotations

import pytest

from advtrain.registry import copy
from advtrain.tracking.store import open_client
from tests.registry_kit import flags, make_archive, make_evaluation, make_version


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
