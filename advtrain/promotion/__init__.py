"""Promotion gate: checks a version against a policy and records the decision."""

from advtrain.promotion.comparison import Case, different, names_of
from advtrain.promotion.evidence import ChangedError, Evidence, Outcomes, Repetition, read_evidence
from advtrain.promotion.gate import LostRaceError, draft_of, failed, move_champion, put_on_record
from advtrain.promotion.policy import Policy, load_policy
from advtrain.promotion.repeat import repeat
from advtrain.promotion.request import (
    PromotionRequest,
    consider,
    find_challenger,
    find_champion,
    load_record,
    require_signed,
)
from advtrain.promotion.rules import RULES, changed_finding, judge
from advtrain.registry import Finding

__all__ = [
    "PromotionRequest",
    "consider",
    "find_challenger",
    "find_champion",
    "load_record",
    "RULES",
    "Case",
    "ChangedError",
    "Evidence",
    "Finding",
    "LostRaceError",
    "Outcomes",
    "Policy",
    "changed_finding",
    "different",
    "draft_of",
    "failed",
    "judge",
    "load_policy",
    "move_champion",
    "names_of",
    "put_on_record",
    "Repetition",
    "read_evidence",
    "repeat",
    "require_signed",
]
