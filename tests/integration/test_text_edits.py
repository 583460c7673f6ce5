"""Training, validation and evaluation of texts under edits, through the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from advtrain.evaluation.edit_checks import TEXT_CHECKS
from tests.kit import RECIPES, advtrain, kill_evaluation

GOOD = ["good", "fine", "nice", "great", "lovely", "bright"]
BAD = ["bad", "poor", "awful", "dull", "weak", "boring"]
OTHER = ["film", "plot", "cast", "scene", "the", "a", "story", "music"]
#: Each word may become the next two of its kind, and the last ones of the other kind.
TABLE = {
    word: [words[(i + 1) % 6], words[(i + 2) % 6], *(others[:1] if i == 5 else [])]
    for words, others in ((GOOD, BAD), (BAD, GOOD))
    for i, word in enumerate(words)
}
THREAT = {"edits": "words", "at_most": 2, "table": "table.json", "budget": 300, "validation_budget": 20}


def write_texts(folder: Path, n: int = 500, name: str = "texts.txt") -> None:
    """Write texts with labels, and the table of the edits."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(n):
        kind = [BAD, GOOD][i % 2]
        words = [*rng.choice(kind, 2 + i % 2), *rng.choice(OTHER, 2 + i % 4), f"no{i}"]
        lines.append(f"{['bad', 'good'][i % 2]} {' '.join(rng.permutation(words))}")
    (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "table.json").write_text(json.dumps(TABLE))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_texts(folder)
    return folder


def train(work: Path, *more: str) -> None:
    """Train text_cnn with edits as threat model, and with more settings."""
    settings = [
        "name=texts",
        "data={source: text, path: texts.txt}",
        f"evaluation={json.dumps({'threat': THREAT, 'validation_samples': 40})}",
        "training.epochs=2",
        "training.num_workers=0",
        "model.args={dim: 16, channels: 8}",
        *more,
    ]
    options = [word for setting in settings for word in ("--set", setting)]
    done = advtrain("train", str(RECIPES / "trec.yaml"), *options, "--data-root", ".", cwd=work)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.fixture(scope="module")
def run(work):
    train(work)
    (folder,) = (work / "runs").glob("texts-*")
    return folder


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report" / "report.json").read_text())


def test_training_selects_and_judges_by_edits(run):
    report, epochs = report_of(run), (run / "metrics.jsonl").read_text().splitlines()
    assert (report["norm"], report["eps"], report["attacks"][0]["name"]) == ("words", 2.0, "edits-300")
    assert report["edits"]["proven"]["value"] <= report["robust_accuracy"] <= report["clean_accuracy"]
    assert [point["eps"] for point in report["curve"]] == [0, 1, 2]
    assert {"temperature", "guided", "free_words", "batch"} <= {check["name"] for check in report["checks"]}
    for line in map(json.loads, epochs):
        assert 0 <= line["val_robust_accuracy"] <= line["val_clean_accuracy"] <= 1
    samples = pq.read_table(run / "report" / "samples.parquet").to_pydict()
    assert sum(samples["queries"]) == report["edits"]["queries"]
    assert (run / "report" / "robustness_curve.png").stat().st_size > 1000


@pytest.mark.slow
def test_training_under_edits_pins_its_table_and_reports_the_attack(tmp_path):
    write_texts(tmp_path)
    adversary = {"name": "edits", "edits": "words", "at_most": 1, "table": "table.json", "budget": 20}
    train(tmp_path, f"adversary={json.dumps(adversary)}", "training.batch_size=20")
    (run,) = (tmp_path / "runs").glob("texts-*")
    stored = yaml.safe_load((run / "recipe.yaml").read_text())["adversary"]
    assert stored["table_digest"] == report_of(run)["edits"]["table_digest"]
    assert "edits, words:1, greedy" in (run / "report" / "report.html").read_text()
    first, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert last["train_adv_ce"] < first["train_adv_ce"]
    assert all(line["train_adv_accuracy"] <= line["train_clean_accuracy"] for line in (first, last))


@pytest.mark.slow
def test_evaluation_under_edits_resumes_after_sigkill(work, run, tmp_path):
    """A resumed evaluation searches no stored text again, and its report is that of an uninterrupted one."""
    write_texts(work, 4000, "many.txt")
    command = (
        "evaluate",
        run.name,
        "--data",
        "many.txt",
        "--threat",
        "words:1,table=table.json",
        "--data-root",
        ".",
    )
    whole = tmp_path / "whole"
    shutil.copytree(work, whole)
    path, before = kill_evaluation(*command, cwd=work, items=3)
    assert not (path.parent / "report").exists()
    done = advtrain(*command, "--json", "resumed.json", cwd=work)
    assert done.returncode == 0, done.stderr
    lines = path.read_text().splitlines()
    assert lines[: len(before) - 1] == before[:-1]
    units = [json.loads(line)["unit"] for line in lines]
    assert len(units) == len(set(units)) == 125 + len(TEXT_CHECKS)
    assert len(before) < 125, "the kill was too late"
    assert "(from the cache)" in advtrain(*command, cwd=work).stdout
    assert path.read_text().splitlines() == lines
    done = advtrain(*command, "--json", "whole.json", cwd=whole)
    assert done.returncode == 0, done.stderr
    assert (work / "resumed.json").read_bytes() == (whole / "whole.json").read_bytes()
    (other,) = whole.glob(f"runs/*/evaluations/{path.parent.name}")
    for name in ("report.json", "samples.parquet"):
        assert (path.parent / "report" / name).read_bytes() == (other / "report" / name).read_bytes()
