"""Threat model of the option --threat: a ball, or edits of texts."""

from __future__ import annotations

from pydantic import ValidationError

from advtrain.documents import parse_yaml
from advtrain.errors import UserError
from advtrain.recipe import parse_override
from advtrain.recipe.edits import DEFAULTS, AnyThreat, EditThreatConfig, ThreatConfig
from advtrain.recipe.explain import explain_all
from advtrain.recipe.sections import EvaluationConfig
from advtrain.threat import ThreatModel


def parse_threat(text: str) -> AnyThreat:
    """Parse `linf:8/255`, `words:2`, or edits with settings such as `chars:1,where=anywhere`."""
    first, *settings = text.split(",")
    kind, _, number = first.partition(":")
    if kind in DEFAULTS:
        values: dict[str, object] = {
            "edits": kind,
            "at_most": parse_yaml(number, "--threat: the number of edits"),
        }
        for setting in settings:
            path, value = parse_override(setting)
            values[path] = value
        try:
            return EditThreatConfig.model_validate(values)
        except ValidationError as error:
            raise UserError(explain_all(error.errors(), "--threat", EditThreatConfig)) from error
    parsed = ThreatModel.parse(text)
    return ThreatConfig(norm=parsed.norm, eps=parsed.eps)


def judged_at(judge: EvaluationConfig, threat: AnyThreat) -> EvaluationConfig:
    """Return evaluation settings with another threat model.

    Attacks on tensors do not apply to edits of texts, and the reverse: the default suite is used then.
    """
    if isinstance(threat, EditThreatConfig) or judge.edits is not None:
        return EvaluationConfig(threat=threat, seed=judge.seed, batch_size=judge.batch_size)
    return judge.model_copy(update={"threat": threat})
