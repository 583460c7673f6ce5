"""The shipped campaigns are valid: their paths, ranges and corner points."""

from __future__ import annotations

import pytest

from pipelines.cli.options import CAMPAIGNS, RECIPES
from tuning.campaign import load_campaign


@pytest.mark.parametrize("path", sorted(CAMPAIGNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_campaign_is_valid(path):
    plan = load_campaign(path, lambda name: RECIPES / f"{name}.yaml", [], {}, allow_code=False)
    assert plan.campaign.description
    assert plan.campaign.name == path.stem
    assert {"optimizer.lr"} <= set(plan.space)
