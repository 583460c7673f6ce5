"""Evaluation settings of a model under the threat model of the option --threat."""

from __future__ import annotations

from advtrain.recipe.edits import AnyThreat, EditThreatConfig
from advtrain.recipe.sections import EvaluationConfig


def judged_at(judge: EvaluationConfig, threat: AnyThreat) -> EvaluationConfig:
    """Return evaluation settings with another threat model.

    Attacks on tensors do not apply to edits of texts, and the reverse: the default suite is used then.
    """
    if isinstance(threat, EditThreatConfig) or judge.edits is not None:
        return EvaluationConfig(threat=threat, seed=judge.seed, batch_size=judge.batch_size)
    return judge.model_copy(update={"threat": threat})
