"""Threat model of the option --threat: a ball, or edits of texts."""

from __future__ import annotations

import re

from pydantic import ValidationError

from advtrain.documents import parse_yaml
from advtrain.errors import UserError
from advtrain.recipe import parse_override
from advtrain.recipe.edits import DEFAULTS, AnyThreat, EditThreatConfig, ThreatConfig
from advtrain.recipe.explain import explain_all
from advtrain.recipe.sections import EvaluationConfig
from advtrain.threat import ThreatModel

#: A comma, or a list or quoted text, whose commas belong to it.
_COMMA = re.compile(r"""\[[^\]]*\]|"[^"]*"|'[^']*'|,""")


def parse_threat(text: str) -> AnyThreat:
    """Parse `linf:8/255`, `words:2`, or edits with settings such as `chars:1,where=anywhere`.

    The value of a setting may be a list in brackets or a text in quotes.

    Raises:
        UserError: no threat model, an unknown, invalid or repeated setting, or one that the start of the text sets.
    """
    first, *settings = _split(text)
    kind, _, number = first.partition(":")
    if kind in DEFAULTS:
        values: dict[str, object] = {
            "edits": kind,
            "at_most": parse_yaml(number, "--threat: the number of edits"),
        }
        for setting in settings:
            path, value = parse_override(setting)
            if path in ("edits", "at_most"):
                raise UserError(f"--threat: '{path}' is set by '{first}'; leave out '{setting}'")
            if path in values:
                raise UserError(f"--threat: '{path}' is given twice; leave out '{setting}'")
            values[path] = value
        try:
            return EditThreatConfig.model_validate(values)
        except ValidationError as error:
            raise UserError(explain_all(error.errors(), "--threat", EditThreatConfig)) from error
    parsed = ThreatModel.parse(text)
    return ThreatConfig(norm=parsed.norm, eps=parsed.eps)


def _split(text: str) -> list[str]:
    """Return the parts of a text between its commas, except those within brackets or quotes."""
    parts, start = [], 0
    for found in _COMMA.finditer(text):
        if found[0] == ",":
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]


def judged_at(judge: EvaluationConfig, threat: AnyThreat) -> EvaluationConfig:
    """Return evaluation settings with another threat model.

    Attacks on tensors do not apply to edits of texts, and the reverse: the default suite is used then.
    """
    if isinstance(threat, EditThreatConfig) or judge.edits is not None:
        return EvaluationConfig(threat=threat, seed=judge.seed, batch_size=judge.batch_size)
    return judge.model_copy(update={"threat": threat})
