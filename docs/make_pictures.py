"""Makes the pictures of README and docs: `python docs/make_pictures.py --data-root DIR` (MNIST, half an hour).

    --only report,dashboard    some of them: mnist, report, dashboard, search, losses

Screenshots need Debian's chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
BROWSER = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def run(folder: Path, *words: str) -> None:
    """Run an advtrain command in `folder`."""
    subprocess.run([sys.executable, "-m", "pipelines", *words], cwd=folder, check=True)


def newest(folder: Path, pattern: str) -> Path:
    """Return the file below `folder` that was written last."""
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)


def screenshot(page: Path, picture: Path, width: int, height: int) -> None:
    """Render an HTML page with an empty browser profile."""
    with tempfile.TemporaryDirectory() as profile:
        options = [
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--screenshot={picture}",
        ]
        subprocess.run([*BROWSER, *options, page.as_uri()], check=True, capture_output=True, timeout=120)


def mnist(folder: Path, data_root: str) -> None:
    """Draw adversarial examples and the robustness curve of the recipe mnist."""
    run(folder, "train", "mnist", "--data-root", data_root, "--set", "evaluation.suite=standard")
    shutil.copy(newest(folder, "examples.png"), IMAGES / "mnist_examples.png")
    shutil.copy(newest(folder, "robustness_curve.png"), IMAGES / "mnist_curve.png")


def report(folder: Path, data_root: str) -> None:
    """Take a screenshot of the report of the recipe digits."""
    run(folder, "train", "digits", "--workers", "0")
    screenshot(newest(folder, "report.html"), IMAGES / "report.png", 900, 1500)


def dashboard(folder: Path, data_root: str) -> None:
    """Take a screenshot of the dashboard after promotions; the policy accepts runs outside of a clean commit."""
    policy = folder / "policy.yaml"
    policy.write_text("{name: pictures, version: 1, min_gain: null, clean_git: false}")
    for seed in (0, 1, 2):
        overrides = [f"seed={seed}", f"training.epochs={5 + 8 * seed}"]
        words = [word for override in overrides for word in ("--set", override)]
        run(folder, "train", "digits", "--workers", "0", *words)
        if seed:
            words = ["promote", "digits", "--reason", f"seed {seed}", "--policy", str(policy)]
            subprocess.run([sys.executable, "-m", "pipelines", *words], cwd=folder, check=False)
    run(folder, "dashboard")
    screenshot(folder / "dashboard.html", IMAGES / "dashboard.png", 1000, 1650)


def search(folder: Path, data_root: str) -> None:
    """Copy the figures of the demo campaign."""
    run(folder, "tune", "digits_quick")
    shutil.copy(newest(folder, "history.png"), IMAGES / "tune_history.png")
    shutil.copy(newest(folder, "parallel.png"), IMAGES / "tune_parallel.png")


def losses(folder: Path, data_root: str) -> None:
    """Copy the Pareto front of the study losses on digits."""
    run(folder, "compare", "losses", "--quick")
    shutil.copy(newest(folder, "digits-front.png"), IMAGES / "losses_digits_front.png")


PICTURES: dict[str, Callable[[Path, str], None]] = {
    "mnist": mnist,
    "report": report,
    "dashboard": dashboard,
    "search": search,
    "losses": losses,
}


def main() -> None:
    """Make the pictures that the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--only", default=",".join(PICTURES))
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            PICTURES[name](Path(folder), str(Path(arguments.data_root).resolve()))


if __name__ == "__main__":
    main()
