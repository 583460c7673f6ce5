"""The driver's own time in a campaign of 2,000 synthetic trials through Ray Tune."""

from __future__ import annotations

import pytest

from tests.benchmarks.bench_driver import LIMIT_S, plan_of, run, tenths

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.study, pytest.mark.timeout(1800)]


@pytest.mark.usefixtures("ray_cluster")
def test_driver_spends_less_than_the_limit_on_each_trial(tmp_path):
    ledger, timed = run(tmp_path, plan_of(2000, "tpe", 2))
    assert len(ledger.searched) == 2000
    assert {trial.status for trial in ledger.searched} == {"finished"}
    assert max(own for own, _ in tenths(timed)) < LIMIT_S
