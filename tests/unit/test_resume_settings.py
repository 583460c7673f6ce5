"""A resumed run takes only settings that do not affect its result."""

from __future__ import annotations

import pytest

from advtrain.errors import UserError
from pipelines.train import resume
from pipelines.workspace import Workspace


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "training.epochs=20",
            "--set training.epochs: a resumed run keeps its recipe, except for training.num_work",
        ),
        ("optimizer.lr=1", "to change optimizer.lr, name a recipe and start a new run"),
        ("training.timeout_s=9", "no run 'nothing'"),
    ],
)
def test_resume_takes_placement_settings_only(setting, message, tmp_path):
    with pytest.raises(UserError, match=message):
        resume("nothing", Workspace(tmp_path, "", tmp_path), overrides=[setting])
