"""`make gpu-check` with --tiny on the CPU, where neither Ray nor MLflow can be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kit import ROOT


@pytest.mark.slow
def test_gpu_check_runs_without_ray_and_mlflow():
    code = (
        "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None\n"
        "sys.argv = ['gpu_check', '--tiny']\n"
        "from tests.benchmarks.gpu_check import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    for line in ("cnn2             plain loop", "vit              advtrain, bf16, compiled", "are refused"):
        assert line in done.stdout
