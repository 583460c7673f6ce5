"""Threat model as text: a ball such as `linf:8/255`, or edits of texts such as `words:2`."""

from __future__ import annotations

import re

from pydantic import ValidationError

from advtrain.documents import parse_yaml
from advtrain.errors import UserError
from advtrain.recipe.edits import DEFAULTS, EditThreatConfig, ThreatConfig
from advtrain.recipe.explain import explain_all
from advtrain.recipe.paths import parse_override
from advtrain.threat import ThreatModel

#: A comma, or a list or quoted text, whose commas belong to it.
_COMMA = re.compile(r"""\[[^\]]*\]|"[^"]*"|'[^']*'|,""")


def parse_threat(text: str) -> ThreatConfig | EditThreatConfig:
    """Parse a ball such as `linf:8/255`, or edits as `parse_edits`.

    Raises:
        UserError: no threat model, or as `parse_edits`.
    """
    if (edits := parse_edits(text, "--threat")) is not None:
        return edits
    parsed = ThreatModel.parse(text)
    return ThreatConfig(norm=parsed.norm, eps=parsed.eps)


def parse_edits(text: str, where: str) -> EditThreatConfig | None:
    """Parse edits such as `words:2` or `chars:1,where=anywhere`; return None for anything else.

    The value of a setting may be a list in brackets or a text in quotes. `where` names the text in errors.

    Raises:
        UserError: an unknown, invalid or repeated setting, or one that the start of the text already sets.
    """
    first, *settings = _split(text)
    kind, _, number = first.partition(":")
    if kind not in DEFAULTS:
        return None
    values: dict[str, object] = {
        "edits": kind,
        "at_most": parse_yaml(number, f"{where}: the number of edits"),
    }
    for setting in settings:
        path, value = parse_override(setting)
        if path in ("edits", "at_most"):
            raise UserError(f"{where}: '{path}' is set by '{first}'; leave out '{setting}'")
        if path in values:
            raise UserError(f"{where}: '{path}' is given twice; leave out '{setting}'")
        values[path] = value
    try:
        return EditThreatConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(explain_all(error.errors(), where, EditThreatConfig)) from error


def _split(text: str) -> list[str]:
    """Return the parts of a text between its commas, except those within brackets or quotes."""
    parts, start = [], 0
    for found in _COMMA.finditer(text):
        if found[0] == ",":
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]
