"""The base of every configuration: typed fields, numbers such as 8/255, YAML files, names of a user's code."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, model_validator
from yaml.composer import ComposerError

from advtrain.errors import UserError, nearest


def load_attribute(reference: str, what: str) -> Any:
    """Import the `module:attribute` that a user names; raises UserError if either is missing."""
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


class _KeysOnce(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, as YAML does; PyYAML takes the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (name := (key.tag, key.value)) in seen:
                    raise ComposerError(
                        "in the mapping", node.start_mark, f"'{key.value}' stands here again", key.start_mark
                    )
                seen.add(name)
        return node


def read_yaml(path: Path, what: str) -> Any:
    """Return what a YAML file holds; raises UserError if it cannot be read or is no YAML. `what` names its kind."""
    try:
        return yaml.load(path.read_text(), Loader=_KeysOnce)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read the {what} '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the {what} '{path}': it is no text in UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"'{path}' is not YAML: {error}") from error


class Config(BaseModel):
    """Base of all configurations: immutable, no unknown key, no silent conversion ("3" is not 3)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """keys of earlier versions, which are refused with their present name"""

    @model_validator(mode="before")
    @classmethod
    def _refuse_renamed_keys(cls, given: Any) -> Any:
        for old, new in cls.renamed.items():
            if isinstance(given, dict) and old in given:
                raise ValueError(f"{old} is now called {new}")
        return given


def with_present_names(values: Any, config: type[BaseModel]) -> Any:
    """Return the values of a stored configuration, with keys of earlier versions replaced by their present names."""
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
    """Accept `8/255` (exact: the nearest double of the fraction) and `1e-4`, which YAML 1.1 reads as text."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
    return value


def show_number(value: float) -> float | str:
    """Write k/255 as such: a radius in 8-bit grey levels keeps its exact form. Fifths stay decimal."""
    levels = round(value * 255)
    return f"{levels}/255" if 0 < levels < 255 and levels / 255 == value and levels % 51 else value


#: A float in a recipe, which may be written as a fraction of integers.
Number = Annotated[
    float, BeforeValidator(parse_number), PlainSerializer(show_number, return_type=float | str)
]
