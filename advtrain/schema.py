"""Base of all configurations: typed fields, numbers such as 8/255, YAML files, custom code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, model_validator
from yaml.composer import ComposerError

from advtrain.errors import UserError, nearest


def load_attribute(reference: str, what: str) -> Any:
    """Import `module:attribute`; raise a UserError if either is missing.

    Call it only where user code may run. The working folder is searched last, so its modules replace no installed one.
    """
    search_working_folder()
    module_name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{what} '{reference}': cannot import '{module_name}' ({error}); "
            "it must be importable from the working folder or installed"
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"{what} '{reference}': no '{attribute}' in it{nearest(attribute, vars(module))}")
    return getattr(module, attribute)


def search_working_folder() -> None:
    """Add the working folder to the end of the import path.

    Call it only where user code may run.
    """
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)


class _KeysOnce(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys; PyYAML silently keeps the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (name := (key.tag, key.value)) in seen:
                    raise ComposerError(
                        "in the mapping", node.start_mark, f"'{key.value}' is a duplicate key", key.start_mark
                    )
                seen.add(name)
        return node


def read_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file; raise a UserError if it cannot be read or parsed.

    `what` names the kind of file in messages.
    """
    try:
        return yaml.load(path.read_text(), Loader=_KeysOnce)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read the {what} '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the {what} '{path}': it is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise UserError(f"'{path}' is not YAML: {error}") from error


class Config(BaseModel):
    """Base of all configurations: immutable, no unknown keys, no conversion ("3" is not 3)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """keys of earlier versions, which are rejected, and their current names"""

    @model_validator(mode="before")
    @classmethod
    def _refuse_renamed_keys(cls, given: Any) -> Any:
        for old, new in cls.renamed.items():
            if isinstance(given, dict) and old in given:
                raise ValueError(f"{old} is now called {new}")
        return given


def with_present_names(values: Any, config: type[BaseModel]) -> Any:
    """Return the values of a stored configuration, with keys of earlier versions renamed."""
    if not isinstance(values, dict):
        return values
    renamed: Mapping[str, str] = getattr(config, "renamed", {})
    found = {renamed.get(key, key): value for key, value in values.items()}
    for name, field in config.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            key = field.alias or name
            if key in found and isinstance(kind, type) and issubclass(kind, BaseModel):
                found[key] = with_present_names(found[key], kind)
    return found


def parse_number(value: object) -> object:
    """Convert text such as `8/255` or `1e-4` to the nearest float.

    YAML 1.1 reads both as text. Other values are returned unchanged.
    """
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
    return value


def show_number(value: float) -> float | str:
    """Return k/255 as text, so that a radius in 8-bit gray levels keeps its exact form.

    Other numbers and multiples of 1/5 stay decimal.
    """
    levels = round(value * 255)
    return f"{levels}/255" if 0 < levels < 255 and levels / 255 == value and levels % 51 else value


#: Float in a recipe, which may be written as a fraction of integers.
Number = Annotated[
    float, BeforeValidator(parse_number), PlainSerializer(show_number, return_type=float | str)
]
