"""YAML and JSON documents with bounds: a damaged or hostile file ends in one error."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from advtrain.errors import UserError

#: Largest files, in bytes. The largest shipped recipe has 3 KB; the JSON of a run stays below 100 MB.
MOST_YAML, MOST_JSON = 2**20, 2**28
#: Most values in a YAML document, counting each use of an alias: ten lines of aliases can stand for a billion values.
MOST_VALUES = 100_000


class _UnclearError(ConstructorError):
    """Scalar that versions of YAML read differently."""

    def __init__(self, node: yaml.ScalarNode, why: str) -> None:
        super().__init__(None, None, f"'{node.value}' {why}", node.start_mark)
        self.node = node


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys and what YAML 1.1 and 1.2 read differently.

    `yes`, `no`, `on` and `off` are text as keys, and refused as values. Dates are text.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.tag == f"{_TAG}bool":
                    key.tag = f"{_TAG}str"
                if (name := (key.tag, key.value)) in seen:
                    raise ComposerError(
                        "in the mapping", node.start_mark, f"'{key.value}' is a duplicate key", key.start_mark
                    )
                seen.add(name)
        return node

    def number(self, node: yaml.ScalarNode) -> int | float:
        """Return a number; YAML 1.1 would read 2:00 as 120 and 010 as 8."""
        if ":" in node.value:
            raise _UnclearError(
                node, "is a number in base 60; write a time with units, such as 1h30m, and text in quotes"
            )
        made = self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)
        if isinstance(made, float):
            return made
        if re.fullmatch("[+-]?0[0-9_b]+", node.value):
            raise _UnclearError(
                node, f"is {made} in YAML 1.1 only; write {made}, or '{node.value}' in quotes for text"
            )
        return int(made)

    def text(self, node: yaml.ScalarNode) -> str:
        """Return the text of a date."""
        return str(node.value)

    def boolean(self, node: yaml.ScalarNode) -> bool:
        """Return a boolean; YAML 1.1 would read `no` as false."""
        made = bool(self.construct_yaml_bool(node))
        if node.value.lower() not in ("true", "false"):
            word = str(made).lower()
            raise _UnclearError(
                node, f"is {word} in YAML 1.1 only; write {word}, or '{node.value}' in quotes for text"
            )
        return made


def _path_of(wanted: yaml.Node, tree: yaml.Node | None) -> str:
    """Return the dotted path of a scalar, as in `budget.wall`; "" if it is the document itself."""
    found, seen = [("", tree)], set()
    for path, node in found:  # grows while it is read
        if node is None or id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            found += [(f"{path}.{key.value}".strip("."), value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            found += [(path, part) for part in node.value]
        elif node.start_mark.index == wanted.start_mark.index:
            return path
    return ""


_TAG = "tag:yaml.org,2002:"
for _kind in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_kind}", _Loader.number)
_Loader.add_constructor(f"{_TAG}bool", _Loader.boolean)
_Loader.add_constructor(f"{_TAG}timestamp", _Loader.text)


def parse_yaml(text: str, what: str) -> Any:
    """Return the value of a YAML text; `what` names it in errors.

    Raises:
        UserError: it is not YAML, is too large or nested too deeply, or has a duplicate key or a value that versions of
            YAML read differently.
    """
    if len(text) > MOST_YAML:
        raise UserError(f"{what} has {len(text):,} characters; at most {MOST_YAML:,} are read")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        _count(value, 0)
    except _UnclearError as error:
        line = f", line {error.node.start_mark.line + 1}" if "\n" in text.strip() else ""
        path = _path_of(error.node, yaml.compose(text, Loader=_Loader))
        raise UserError(f"{what}{line}: {f'{path}: ' if path else ''}{error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply") from error
    except ValueError as error:  # numbers with thousands of digits, impossible dates
        raise UserError(f"{what} is not YAML: {error}") from error
    return value


def read_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file; `what` names the kind of file in errors.

    Raises:
        UserError: the file cannot be read, or `parse_yaml` refuses its text.
    """
    try:
        if path.stat().st_size > MOST_YAML:
            raise UserError(
                f"the {what} '{path}' has {path.stat().st_size:,} bytes; at most {MOST_YAML:,} are read"
            )
        return parse_yaml(path.read_text("utf-8"), f"'{path}'")
    except OSError as error:
        raise UserError(f"cannot read the {what} '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the {what} '{path}': it is not UTF-8 text; save it as UTF-8") from error


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def dump_json(value: Any, indent: int | None = None) -> str:
    """Return the JSON text of a value for other programs: NaN and infinity become null.

    Values of types that JSON lacks become text.
    """
    return json.dumps(finite(value), indent=indent, default=str, allow_nan=False)


def finite(value: Any) -> Any:
    """Return the value with None for every NaN and infinity in it, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file.
        keys: keys that the object must have.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too large, not a JSON object, or lacks a key.
    """
    if (size := path.stat().st_size) > MOST_JSON:
        raise ValueError(f"it has {size:,} bytes; at most {MOST_JSON:,} are read")
    value = parse_json(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")  # noqa: TRY004 (of the file, not of an argument)
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"it has no '{missing[0]}'")
    return value


def _count(value: Any, count: int) -> int:
    """Return `count` plus the number of values; an alias counts each time."""
    count += 1
    if count > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        count = _count(part, count)
    return count
