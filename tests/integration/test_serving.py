"""The champion served over HTTP without this project, with its signature enforced."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from advtrain.registry import load_registered
from pipelines.workspace import Workspace
from tests.cli_kit import shadow
from tests.kit import digits_data, wait_for
from tests.registry_kit import TenClasses, flags, make_archive, make_evaluation, make_version
from tests.servers import answers, free_port, running

#: Blocks imports of this project in the server and its workers.
STRANGER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("advtrain", "pipelines", "tuning"):
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def champion(store, tmp_path):
    archive = make_archive(store, tmp_path / "archive")
    make_version(store, archive, tmp_path, make_evaluation(flags(1000, 950), flags(1000, 700)))
    make_version(store, archive, tmp_path, make_evaluation(flags(1000, 950), flags(1000, 710)))
    return store


def ask(url: str, body: object) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_champion_serves_over_http_and_rejects_invalid_inputs(champion, tmp_path):
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "sitecustomize.py").write_text(STRANGER)
    env = {
        "MLFLOW_TRACKING_URI": champion,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": str(tmp_path / "strangers"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow starts uvicorn by name
    }
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/digits@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    x = digits_data().test.images[:3].astype(np.float32)
    x = x / 255 if x.max() > 1 else x
    with running(command, tmp_path / "serve.log", env, cwd=tmp_path):
        wait_for(lambda: answers(f"{url}/ping"), "the scoring server", 120)
        status, body = ask(url, {"inputs": x.tolist()})
        assert status == 200, body
        with torch.no_grad():
            expected = TenClasses(64).eval()(torch.from_numpy(x)).numpy()
        assert np.allclose(json.loads(body)["predictions"], expected, atol=1e-5)
        for output, wanted in (
            ("classes", [str(k) for k in expected.argmax(1)]),
            ("probabilities", [10, 10, 10]),
        ):
            status, body = ask(url, {"inputs": x.tolist(), "params": {"output": output}})
            assert status == 200, body
            found = json.loads(body)["predictions"]
            assert (found if output == "classes" else [len(row) for row in found]) == wanted
        status, body = ask(url, {"inputs": (x + 1).tolist()})
        assert json.loads(body)["message"].startswith("input values must lie in [0, 1]")
        for wrong, message in (
            ({"inputs": np.zeros((2, 1, 9, 9)).tolist()}, "Shape of input (2, 1, 9, 9) does not match"),
            ({"inputs": (x + 1).tolist()}, "must lie in [0, 1]"),
            ({"inputs": (x - 0.5).tolist()}, "must lie in [0, 1]"),
            ({"inputs": [[[["a"] * 8] * 8]]}, "could not convert string to float"),
            ({"images": x.tolist()}, "inputs"),
            ({"inputs": x.tolist(), "params": {"output": "no"}}, "output is 'no', expected one of logits"),
        ):
            status, body = ask(url, wrong)
            assert 400 <= status < 500, body
            assert message in body
    assert "not to be had" not in (tmp_path / "serve.log").read_text()


def test_loaded_model_rejects_values_outside_range(champion):
    model = load_registered("models:/digits@champion", champion)[0].load()
    inside = torch.rand(2, 1, 8, 8)
    assert model(inside).shape == (2, 10)
    for wrong in (inside + 1, inside - 1, inside * float("nan")):
        with pytest.raises(RuntimeError, match="must lie in \\[0, 1\\]"):
            model(wrong)


def test_range_check_does_not_change_gradients(champion):
    model = load_registered("models:/digits@champion", champion)[0].load()
    plain = TenClasses(64)
    x = torch.rand(3, 1, 8, 8)
    gradients = []
    for each in (model, plain):
        point = x.clone().requires_grad_(True)
        gradients.append(torch.autograd.grad(each(point).square().sum(), point)[0])
    assert torch.allclose(*gradients)


def test_shadow_run_of_identical_weights_agrees_with_champion(champion, tmp_path, capsys):
    data = digits_data().test
    np.savez(tmp_path / "x.npz", x=data.images, y=data.labels)
    workspace = Workspace(tmp_path, champion, tmp_path)
    assert shadow("digits", tmp_path / "x.npz", workspace, challenger="challenger") == 0
    output = capsys.readouterr().out
    assert "agreement 100.00 %" in output
    assert "+0.00 points (0 against 0 samples" in output
    assert "ms a sample" in output
