"""The wheel installs and runs outside of the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.kit import ROOT


@pytest.mark.slow
def test_wheel_runs_outside_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("advtrain-*.whl")
    # The dependencies are those of the test environment; its editable install of the checkout is not visible.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(packages), str(wheel)], check=True)
    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-m", "pipelines", "recipes"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout
    where = [str(tmp_path / "venv" / "bin" / "python"), "-c", "import advtrain; print(advtrain.__file__)"]
    shown = subprocess.run(where, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert Path(shown.stdout.strip()).is_relative_to(packages)
