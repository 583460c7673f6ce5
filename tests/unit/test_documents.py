"""YAML and JSON documents: values with one meaning, and JSON that a strict parser can read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from advtrain.documents import dump_json, parse_yaml, read_yaml
from advtrain.errors import UserError
from advtrain.recipe import parse_override
from advtrain.schema import parse_duration, with_numbers
from pipelines.cli.reports import write_json
from tests.kit import digits_recipe


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


VALUES = {"loss": math.nan, "steps": [1, math.inf, (-math.inf, 0.5)], "path": Path("a"), "none": None}


def test_dump_json_writes_null_for_nan_and_infinity():
    expected = {"loss": None, "steps": [1, None, [None, 0.5]], "path": "a", "none": None}
    assert strict(dump_json(VALUES)) == expected


def test_json_option_writes_strict_json(tmp_path):
    write_json(tmp_path / "out.json", VALUES)
    assert strict((tmp_path / "out.json").read_text())["loss"] is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 0x10", 16),
        ("a: -3", -3),
        ("a: 0", 0),
        ("a: 0.5", 0.5),
        ("a: True", True),
        ("a: 'no'", "no"),
        ("a: '010'", "010"),
        ("a: 2026-11-30", "2026-11-30"),
        ("a: y", "y"),
        ("\ufeffa: 1", 1),
        ("b: 2\r\na: 1\r\n", 1),
        ("b: &x {a: 1}\n<<: *x", 1),
    ],
)
def test_yaml_has_one_meaning(text, value):
    found = parse_yaml(text, "f")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("key", ["on", "off", "yes", "No", "true", "y"])
def test_yaml_key_is_text(key):
    assert parse_yaml(f"{key}: 1", "f") == {key: 1}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("b: 1\na: 010", 2, "write 8, or '010' in quotes"),
        ("b: 1\na: 0b11", 2, "write 3, or '0b11' in quotes"),
        ("b: 1\na: [x, no]", 2, "write false, or 'no' in quotes"),
        ("b: 1\na: On", 2, "write true, or 'On' in quotes"),
        ("b: 1\na:\n  x: [2, {y: 1:30}]", 3, "a.x.y: '1:30' is .* a time with units, such as 1h30m"),
        ("b: 1\na: 1\na: 2", 3, "'a' is a duplicate key"),
        ("b: 1\n'no': 1\nno: 2", 3, "'no' is a duplicate key"),
        ("b: 1\n---\na: 1", 2, "another document"),
        ("b: 1\n\ta: 1", 2, r"'\\t'"),
        ("b: 1\n? [1]\n: 2", 2, "unhashable"),
    ],
)
def test_yaml_is_refused_with_its_line(text, line, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(text, "'f'")
    assert f"line {line}" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_file_that_is_not_utf8_is_refused(encoding, tmp_path):
    path = tmp_path / "f.yaml"
    path.write_bytes("name: ä".encode(encoding))
    with pytest.raises(UserError, match="UTF-8|special characters"):
        read_yaml(path, "recipe")


def test_option_and_file_read_the_same_value():
    for text in ("3", "1e-3", "8/255", "true", "[1, 2]", "{a: 1}", "'010'", "null", "a b#c", "~"):
        assert parse_override(f"x={text}") == ("x", parse_yaml(f"x: {text}", "f")["x"])
    for text in ("010", "no", "1:30"):
        with pytest.raises(UserError, match=f"--set x: the value: '{text}' is "):
            parse_override(f"x={text}")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2h30m", 9000), ("1d", 86400), ("1.5h", 5400), ("1h 5s", 3605)],
)
def test_duration_is_text_with_units(text, seconds):
    assert parse_duration(text) == seconds
    assert parse_duration(text, "h") == seconds / 3600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:30", "'1:30' may mean 1m30s or 1h30m"),
        ("1:30:00", "write 1h30m00s"),
        ("90", "'90' may mean 90s, 90m or 90h"),
        (90, "'90' may mean 90s, 90m or 90h"),
        ("30m2h", "takes a time"),
        ("2 hours", "takes a time"),
        ("-1h", "takes a time"),
        ("1,5h", "takes a time"),
        ("inf", "takes a time"),
        ("h", "takes a time"),
        ("", "takes a time"),
    ],
)
def test_duration_is_refused_if_unclear(text, message):
    with pytest.raises(ValueError, match=message):
        parse_duration(text)


def test_field_with_its_unit_in_the_name_takes_numbers_and_durations():
    for given in ("90", "90s", "1m30s"):
        assert digits_recipe(f"training.timeout_s={given}").training.timeout_s == 90
    for given in ("1.5", "1.5s", "soon", "1:30"):
        with pytest.raises(UserError, match=r"training\.timeout_s"):
            digits_recipe(f"training.timeout_s={given}")


def test_arguments_of_factories_may_have_exponents():
    given = {"rate": "1e-3", "sizes": ["1E2", 3], "more": {"a": "-2.5e+1"}, "name": "e3", "text": "3"}
    expected = {"rate": 1e-3, "sizes": [100.0, 3], "more": {"a": -25.0}, "name": "e3", "text": "3"}
    assert with_numbers(given) == expected
