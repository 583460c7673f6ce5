"""The scaling model: its limits and the page with its table."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.benchmarks.scale_model import Step, efficiency, ring_s, step_s, table
from tests.kit import ROOT

STEP = Step(0.2, 22, 44.7e6)


def test_ring_time_is_zero_for_one_worker_and_bounded_for_many():
    assert ring_s(1, 1e6, 1e9) == 0
    assert ring_s(2, 1e6, 1e9, latency_s=0) == pytest.approx(1e-3)
    assert ring_s(1000, 1e6, 1e9, latency_s=0) == pytest.approx(2e-3, rel=0.01)


@pytest.mark.parametrize("workers", [1, 2, 8, 64, 1024])
@pytest.mark.parametrize("gbit", [1, 10, 100, 400])
def test_adversarial_training_never_scales_worse_than_standard_training(workers, gbit):
    speed = gbit * 1e9 / 8
    ours, theirs = efficiency(STEP, workers, speed), efficiency(STEP.standard, workers, speed)
    assert 0 < theirs <= ours <= 1
    assert step_s(STEP, workers, speed) >= STEP.compute_s


def test_scaling_page_matches_output_of_its_command():
    page = (ROOT / "docs" / "explanation" / "scaling.md").read_text()
    (command,) = re.findall(r"python -m tests\.benchmarks\.scale_model (.*)`", page)
    words = shlex.split(command)
    values = dict(zip(words[::2], words[1::2], strict=True))
    step = Step(
        float(values["--step-ms"]) / 1000, int(values["--passes"]), float(values["--gradient-mb"]) * 1e6
    )
    assert table(step, [10, 25, 100, 400]) in page
