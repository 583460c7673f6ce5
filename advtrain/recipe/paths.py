"""Paths of a configuration, such as `optimizer.lr`: functions that read, set and list them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from advtrain.documents import parse_yaml
from advtrain.errors import UserError
from advtrain.hub import is_pretrained
from advtrain.recipe.attack import ATTACKS
from advtrain.recipe.edit_attack import SHARED_SETTINGS
from advtrain.schema import Relative


def nested_values(config: BaseModel) -> dict[str, Any]:
    """Return plain values that recreate the configuration; null only if it is not the default."""
    dumped = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            dumped[field.alias or name] = nested_values(value)
        elif value is None and field.default is None:
            del dumped[field.alias or name]
    return dumped


def leaves(config: BaseModel, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (path, value, description) of every field that is not a section, in order.

    The value of a relative length is text such as 0.5x.
    """
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), field.alias or name
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            shown = str(value) if isinstance(value, Relative) else value
            yield f"{prefix}{key}", shown, " ".join((field.description or "").split())


def parse_override(text: str) -> tuple[str, Any]:
    """Return path and value of `path=value`; the value is parsed as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"--set takes path=value, for example --set optimizer.lr=0.1, not '{text}'")
    return path, parse_yaml(value, f"--set {path}: the value")


def flattened(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of settings whose values may be nested mappings."""
    for path, value in settings.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{path}.")
        else:
            yield f"{prefix}{path}", value


def override(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set paths of a resolved recipe.

    Another adversary.name also removes the settings that the preset of the old attack has filled in. To or from edits,
    it removes all settings that only one of the two has. Another model.from or objective.teacher removes the digest of
    the old weights, and another data.tokenizer that of the old tokenizer. Another model.name removes what belongs to
    the old network, as `forget_network`.
    """
    first = ("adversary.name", "model.name")
    for path, value in sorted(changes.items(), key=lambda item: item[0] not in first):
        if path == "adversary.name" and (old := values["adversary"].get("name", "pgd")) != value:
            if "edits" in (old, value):  # nothing else carries over between edits and embeddings
                adversary = values["adversary"]
                values["adversary"] = {k: v for k, v in adversary.items() if k in SHARED_SETTINGS}
            for key in {"step_size", "args"} | _filled_in(old) | _filled_in(str(value)):
                values["adversary"].pop(key, None)
        if path == "model.name":
            forget_network(values, value)
        if path == "data.tokenizer" and values["data"].get("tokenizer") != value:
            values["data"].pop("tokenizer_digest", None)
        if path == "model.from" and values["model"].get("from") != value:
            values["model"].pop("from_digest", None)
        if path == "objective.teacher" and values["objective"].get("teacher") != value:
            values["objective"].pop("teacher_digest", None)
        set_path(values, path, value)


def forget_network(values: dict[str, Any], name: Any) -> None:
    """Remove what a run has filled in for a pretrained network if another one is named.

    This is model.args with a `model_type`, and the tokenizer of the old network.
    """
    model, data = values.get("model"), values.get("data")
    if not isinstance(model, dict) or model.get("name") == name or not is_pretrained(str(model.get("name"))):
        return
    if "model_type" in (model.get("args") or {}):
        del model["args"]
    if isinstance(data, dict) and data.get("tokenizer") == model["name"]:
        del data["tokenizer"]
        data.pop("tokenizer_digest", None)


def _filled_in(attack: str) -> set[str]:
    """Return the settings that the presets fill in; `loss` only if this attack's preset does."""
    every = {key for preset in ATTACKS.values() for key in preset.settings} - {"loss"}
    return every | (ATTACKS[attack].settings.keys() if attack in ATTACKS else set())


def set_overrides(values: dict[str, Any], overrides: list[str]) -> None:
    """Set the paths of a recipe that `path=value` texts name, model.name first.

    Raises:
        UserError: a text is no override, or part of its path is a value.
    """
    parsed = [(text, *parse_override(text)) for text in overrides]
    for text, path, value in sorted(parsed, key=lambda each: each[1] != "model.name"):
        if path == "model.name":
            forget_network(values, value)
        try:
            set_path(values, path, value)
        except UserError as error:
            raise UserError(f"--set {text}: {error}") from error


def set_path(values: dict[str, Any], path: str, value: Any) -> None:
    """Set one path of a nested mapping and create missing sections.

    Raises:
        UserError: part of the path is a value, not a section.
    """
    *parents, leaf = path.split(".")
    node = values
    for key in parents:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"'{key}' is a value, not a section")
    node[leaf] = value
