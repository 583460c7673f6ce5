"""Registered versions for tests of registry and promotion: real store and archive, given outcomes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from advtrain.evaluation import Evaluation, Report, SampleResults
from advtrain.evaluation.checks import Check
from advtrain.evaluation.report import CurvePoint, build_report
from advtrain.evaluation.worst_case import AttackRecord
from advtrain.promotion import move_champion
from advtrain.registry import Draft, can_sign, public_key, read_chain, replay
from advtrain.registry.aliases import record_registration
from advtrain.registry.copy import Publication, publish
from advtrain.registry.export import FILES_DIGEST_TAG, digest_tags, downloaded, file_digests, log_archive
from advtrain.tracking.store import find_experiment, open_client
from tests.kit import Linear, digits_data, digits_recipe

AUTOATTACK = ("apgd-ce-100", "apgd-t-100x9", "fab-t-100x9", "square-5000")
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RUN_TAGS = {"mlflow.source.git.commit": "c" * 40, "advtrain.git_dirty": "false"}


class TenClasses(Linear):
    """Linear model with ten logits, copied from the two of `Linear`."""

    def forward(self, x):
        return super().forward(x).repeat(1, 5)


def make_archive(store: str, folder: Path) -> Path:
    """Export a small model for digits with the real exporter; return the folder of the MLflow model."""
    client = open_client(store)
    run = client.create_run(find_experiment(client, store, "archive"))
    info = log_archive(run.info.run_id, TenClasses(64).eval(), digits_data())
    with downloaded(client, info.model_uri, run.info.run_id) as found:
        shutil.copytree(found / "model", folder)
    return folder


def flags(n: int, right: int, first: int = 0) -> np.ndarray:
    """Return flags (n,) with `right` True values from row `first` on."""
    found = np.zeros(n, bool)
    found[first : first + right] = True
    return found


def make_evaluation(
    clean: np.ndarray,
    robust: np.ndarray,
    attacks: tuple[str, ...] = AUTOATTACK,
    labels: np.ndarray | None = None,
    **changes: Any,
) -> Evaluation:
    """Return the evaluation that the given outcomes would produce."""
    n = len(clean)
    robust = robust & clean
    labels = np.arange(n) % 10 if labels is None else labels
    predicted = np.where(clean, labels, (labels + 1) % 10)
    broken = np.where(robust, -1, np.where(clean, 0, -2))
    standing = int(robust.sum())  # the first attack breaks all that is broken
    records = [AttackRecord(name, standing, 0, standing) for name in attacks]
    records[:1] = [AttackRecord(attacks[0], int(clean.sum()), int(clean.sum()) - standing, standing)]
    samples = SampleResults(labels, predicted, predicted, broken, records, np.full(n, 0.9))
    share = float(robust.mean())
    curve = [CurvePoint(eps=0.1 * f, value=share, low=share, high=share) for f in FACTORS]
    checks = [Check(name="one_step", question="?", verdict="passed", evidence="fine")]
    facts: dict[str, Any] = {
        "model": "m",
        "norm": "linf",
        "eps": 0.1,
        "data": "digits",
        "split": "test",
        "data_digest": "d" * 64,
        "seed": 0,
        "versions": {},
        "suite": "autoattack",
        "curve": curve,
        "checks": checks,
    }
    report: Report = build_report(samples, None, **(facts | changes))
    return Evaluation(report, samples)


def make_version(
    store: str,
    archive: Path,
    folder: Path,
    evaluation: Evaluation,
    *,
    name: str = "digits",
    run_tags: Mapping[str, str] = RUN_TAGS,
    first_is_champion: bool = True,
) -> str:
    """Register a version with this evaluation, promote a first one without the rules; return its number."""
    client = open_client(store)
    work = folder / f"version-{np.random.default_rng().integers(1 << 40)}"
    shutil.copytree(archive, work / "model")
    evaluation.save(work / "report")
    (work / "recipe.yaml").write_text(digits_recipe().to_yaml())
    report = evaluation.report
    tags = {"advtrain.data_digest": report.data_digest, "advtrain.threat": report.threat}
    tags |= {f"advtrain.{key}": value for key, value in report.tags.items()}
    tags |= digest_tags(file_digests(work))
    made = publish(client, store, name, Publication(work, tags, "made", dict(run_tags), {}, {}))
    shutil.rmtree(work)
    record_registration(client, name, str(made.version), report)
    if first_is_champion and report.trust == "trusted" and can_sign(public_key()):
        chain = read_chain(client, name)
        if replay(chain.decisions).champion is None:
            evidence = {"files_digest": tags[FILES_DIGEST_TAG]}
            move_champion(
                client, name, Draft("allowed", str(made.version), None, made.run_id, evidence=evidence)
            )
    return str(made.version)


def aliases(store: str, name: str = "digits") -> dict[str, str]:
    """Return {alias: version} of a registered model."""
    return {a: str(v) for a, v in (open_client(store).get_registered_model(name).aliases or {}).items()}
