"""Model registry: versions, aliases, and an audit log of every decision."""

from advtrain.registry.aliases import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    adoptable,
    find_recorded,
    origin_of,
    reconcile_aliases,
)
from advtrain.registry.audit_log import (
    Chain,
    ConflictError,
    append,
    log_name,
    read_chain,
    registration,
    require_model,
    require_whole,
)
from advtrain.registry.copy import copy
from advtrain.registry.dashboard import build_dashboard
from advtrain.registry.decision import MOVES, Decision, Draft, Finding, Standing, replay
from advtrain.registry.signing import can_sign, public_key, signatures_of, unsigned
from advtrain.registry.summary import (
    figures_of,
    interval_of,
    number_of,
    promotion_of,
    versions_with_aliases,
    when,
)
from advtrain.registry.versions import (
    Registered,
    load_registered,
    opened,
    register,
    registered_model,
    registered_names,
    require_registered,
    resolve,
    versions,
)

__all__ = [
    "can_sign",
    "public_key",
    "signatures_of",
    "unsigned",
    "build_dashboard",
    "figures_of",
    "interval_of",
    "number_of",
    "promotion_of",
    "require_registered",
    "versions_with_aliases",
    "when",
    "CHALLENGER",
    "CHAMPION",
    "MOVES",
    "PREVIOUS",
    "Chain",
    "Decision",
    "Draft",
    "Finding",
    "ConflictError",
    "Registered",
    "Standing",
    "adoptable",
    "append",
    "copy",
    "load_registered",
    "log_name",
    "opened",
    "origin_of",
    "find_recorded",
    "read_chain",
    "register",
    "registration",
    "registered_model",
    "registered_names",
    "replay",
    "require_model",
    "require_whole",
    "resolve",
    "reconcile_aliases",
    "versions",
]
