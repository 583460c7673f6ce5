"""JSON for other programs is strict: a parser that rejects NaN can read it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from advtrain.documents import dump_json
from pipelines.cli.reports import write_json


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


VALUES = {"loss": math.nan, "steps": [1, math.inf, (-math.inf, 0.5)], "path": Path("a"), "none": None}


def test_dump_json_writes_null_for_nan_and_infinity():
    expected = {"loss": None, "steps": [1, None, [None, 0.5]], "path": "a", "none": None}
    assert strict(dump_json(VALUES)) == expected


def test_json_option_writes_strict_json(tmp_path):
    write_json(tmp_path / "out.json", VALUES)
    assert strict((tmp_path / "out.json").read_text())["loss"] is None
