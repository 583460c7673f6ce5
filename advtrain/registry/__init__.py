"""The registry: what is registered, who is champion, and the record of every decision."""

from advtrain.registry.champion import CHALLENGER, CHAMPION, PREVIOUS, Standing, replay, settle
from advtrain.registry.decisions import (
    Chain,
    Decision,
    Draft,
    OvertakenError,
    append,
    log_name,
    read_chain,
    require_whole,
)
from advtrain.registry.transfer import copy
from advtrain.registry.versions import (
    Registered,
    load_registered,
    opened,
    register,
    registered_model,
    registered_names,
    resolve,
    versions,
)

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "PREVIOUS",
    "Chain",
    "Decision",
    "Draft",
    "OvertakenError",
    "Registered",
    "Standing",
    "append",
    "copy",
    "load_registered",
    "log_name",
    "opened",
    "read_chain",
    "register",
    "registered_model",
    "registered_names",
    "replay",
    "require_whole",
    "resolve",
    "settle",
    "versions",
]
