"""Registered models loaded with MLflow's pyfunc, as a client without advtrain loads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from torch import nn

from advtrain.data.tables import Column, TableSpec
from advtrain.registry.advtrain_pyfunc_v1 import ServedModel
from advtrain.registry.export import downloaded, file_digests, log_archive
from advtrain.tracking.store import find_experiment, open_client
from tests.kit import digits_data
from tests.registry_kit import TenClasses

NAMES = ["zero", "Übung", "two words", *"3456789"]


@pytest.fixture(scope="module")
def logged(_store_template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return a client and the logged model."""
    file = tmp_path_factory.mktemp("pyfunc") / "mlflow.db"
    file.write_bytes(_store_template.read_bytes())
    client = open_client(f"sqlite:///{file}")
    run = client.create_run(find_experiment(client, f"sqlite:///{file}", "served"))
    model = TenClasses(64).eval()
    return client, log_archive(run.info.run_id, model, replace(digits_data(), class_names=NAMES))


@pytest.fixture(scope="module")
def served(logged: tuple[Any, Any]) -> Any:
    return mlflow.pyfunc.load_model(logged[1].model_uri)


X = np.linspace(0, 1, 3 * 64, dtype=np.float32).reshape(3, 1, 8, 8)


def logits() -> np.ndarray:
    with torch.no_grad():
        return TenClasses(64)(torch.from_numpy(X)).numpy()


@pytest.mark.parametrize("params", [None, {"output": "logits"}])
def test_default_output_is_an_array_of_logits(served, params):
    found = served.predict(X, params=params)
    assert isinstance(found, np.ndarray)
    assert np.allclose(found, logits(), atol=1e-5)


def test_outputs_with_class_names(served):
    labels = served.predict(X, params={"output": "classes"})
    assert labels.tolist() == [NAMES[k] for k in logits().argmax(1)]
    shares = served.predict(X, params={"output": "probabilities"})
    assert list(shares.columns) == NAMES
    assert np.allclose(shares.to_numpy(), torch.from_numpy(logits()).softmax(1).numpy(), atol=1e-5)


def changed(value: float) -> np.ndarray:
    found = X.copy()
    found[1, 0, 2, 3] = value
    return found


@pytest.mark.parametrize(
    ("values", "params", "reason"),
    [
        (changed(1.5), {}, r"^input values must lie in \[0, 1\].*\(got 1.5 in row 1, at \[0, 2, 3\]\)$"),
        (changed(np.nan), {}, r"\(got nan in row 1"),
        (X, {"output": "labels"}, "^output is 'labels', expected one of logits, probabilities, classes$"),
        (X[..., :7], {}, r"Shape of input \(3, 1, 8, 7\) does not match expected shape \(-1, 1, 8, 8\)"),
        (X.astype(np.float64), {}, "dtype of input float64 does not match expected dtype float32"),
    ],
)
def test_wrong_request_is_answered_with_its_reason(served, values, params, reason):
    with pytest.raises(MlflowException, match=reason) as raised:
        served.predict(values, params=params)
    assert raised.value.get_http_status_code() == 400


def test_scoring_server_puts_the_reason_first(served):
    body = json.dumps({"inputs": changed(-1).tolist()}).encode()
    with pytest.raises(MlflowException) as raised:
        scoring_server.invocations(body, "application/json", served, served.metadata.get_input_schema())
    answer = json.loads(raised.value.serialize_as_json())
    assert answer["message"].startswith("input values must lie in [0, 1]")
    assert answer["error_code"] == "INVALID_PARAMETER_VALUE"


class Plain(nn.Module):
    """Stands for MLflow's wrapper of a torch model."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def predict(self, data: np.ndarray) -> np.ndarray:
        return np.zeros((len(data), self.outputs), np.float32)


def test_column_of_a_table_is_named():
    columns = [
        Column(name="age", low=0, high=99),
        Column(name="color", categories=["red", "green"]),
    ]
    facts = {"table": TableSpec(label="y", columns=columns).model_dump(mode="json")}
    model = ServedModel(Plain(2), facts)
    with pytest.raises(MlflowException, match="got 3 in row 0, column 'color=green'"):
        model.predict(np.array([[0.5, 0, 3]], np.float32))
    with pytest.raises(MlflowException, match="got 37 in row 0, column 'age'"):
        model.predict(np.array([[37, 0, 1]], np.float32))
    assert model.predict(np.zeros((1, 3)), {"output": "classes"}).tolist() == ["0"]


def test_regression_has_no_classes():
    with pytest.raises(MlflowException, match="the model predicts a number"):
        ServedModel(Plain(1), {}).predict(np.zeros((1, 3)), {"output": "classes"})


def test_loading_in_place_does_not_change_the_digests(logged):
    client, info = logged
    place = Path(client.get_logged_model(info.model_id).artifact_location)
    with downloaded(client, info.model_uri, None) as folder:
        before = file_digests(folder)
    assert "model/code/advtrain_pyfunc_v1.py" in before
    (place / "code" / "__pycache__").mkdir(exist_ok=True)
    (place / "code" / "__pycache__" / "advtrain_pyfunc_v1.cpython-311.pyc").write_bytes(b"cached")
    with downloaded(client, info.model_uri, None) as folder:
        assert file_digests(folder) == before
