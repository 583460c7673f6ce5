"""Digest of a recipe: a hash over the settings that affect the result."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from advtrain.hub import is_pretrained
from advtrain.recipe.edit_attack import EDIT_SETTINGS
from advtrain.recipe.objective import ObjectiveConfig

#: Settings of `training` for placement and fault tolerance; they do not affect the result.
PLACEMENT = (
    "num_workers",
    "accelerator",
    "cpus_per_worker",
    "max_failures",
    "sharding",
    "timeout_s",
    "checkpoint_steps",
    "keep_checkpoints",
)
#: Settings that earlier versions lack, with their defaults. The digest leaves them out where they have the default.
LATER_SETTINGS: dict[str, Any] = {
    "data.image": None,
    "data.label": None,
    "data.channels": None,
    "data.on_error": "stop",
    "data.features": None,
    "data.scale": None,
    "data.missing": "stop",
    "data.text": None,
    "data.encoding": None,
    "data.tokenizer": None,
    "data.tokenizer_digest": None,
    "data.vocabulary": None,
    "data.max_length": None,
    "data.group_by_length": False,
    "data.classes": None,
    "data.train_samples": None,
    "data.center_crop": None,
    "adversary.per": "sequence",
    "adversary.embedding_norm": None,
    "adversary.init_mag": None,
    **{f"adversary.{name}": None for name in EDIT_SETTINGS},
    "adversary.eps_delay_epochs": 0.0,
    "adversary.eps_schedule": "linear",
    "training.accumulate": 1,
    **{
        f"objective.{term}": 0.0
        for term in ("distill_adv", "distill_clean", "feature_match", "l2_sp", "kl_sym")
    },
    "objective.distill_temperature": 1.0,
    "objective.teacher_digest": None,
    "model.from": None,
    "model.from_digest": None,
    "model.load": "all",
    "model.freeze": None,
    "model.unfreeze_epoch": None,
    "optimizer.head_lr": None,
    "optimizer.layer_decay": None,
}


def digest_of(values: dict[str, Any]) -> str:
    """Return a SHA-256 in hexadecimal over the settings that affect the result.

    `values` is a dumped recipe without its name and description; entries are removed from it.
    """
    for key in PLACEMENT:
        del values["training"][key]
    if not values["training"]["changes"]:
        del values["training"]["changes"]  # keeps the digest of recipes without changes
    del values["data"]["download"]
    for path in ("model.from", "objective.teacher", "data.tokenizer", "adversary.table"):
        section, _, key = path.partition(".")
        if values[section][f"{key}_digest"] is not None:
            values[section][key] = None  # the digest names the content, wherever it was read
    if is_pretrained(values["model"]["name"]) and "model_type" in values["model"]["args"]:
        values["model"]["name"] = "hf"  # its settings are complete, wherever its folder was
    for path, default in LATER_SETTINGS.items():
        section, _, key = path.rpartition(".")
        if values[section][key] == default:
            del values[section][key]
    for attack in (
        values["adversary"],
        values["evaluation"]["attack"],
        values["evaluation"]["validation"],
    ):
        if attack is not None and not attack["args"]:
            del attack["args"]  # keeps the digest of earlier versions
    for old, new in ObjectiveConfig.renamed.items():  # the digest has the names of earlier versions
        values["objective"][old] = values["objective"].pop(new)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
