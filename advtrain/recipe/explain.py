"""Errors of a YAML file in words: which key, what is wrong with it, and what would be right."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from advtrain.errors import nearest
from advtrain.schema import configurations

#: Starts of what pydantic adds to the location of an error: the kind of a value that may have several.
_KINDS = ("constrained", "function-", "list[", "literal[", "threat-")


def explain_all(errors: list[Any], where: str, config: type[BaseModel]) -> str:
    """Format pydantic errors, one a line; all missing keys are in the first line."""
    missing = [".".join(map(str, error["loc"])) for error in errors if error["type"] == "missing"]
    if len(missing) < 2:
        return "\n".join(explain(error, where, config) for error in errors)
    rest = [explain(error, where, config) for error in errors if error["type"] != "missing"]
    keys = ", ".join(f"'{path}'" for path in missing)
    return "\n".join([f"{where}: {keys} are missing; they must be given", *rest])


def explain(error: Any, where: str, config: type[BaseModel]) -> str:
    """Format one pydantic error about a configuration as file, path, problem and fix."""
    location = [str(part) for part in error["loc"] if not str(part).startswith(_KINDS)]
    path = ".".join(part for part in location if part not in ("int", "float"))
    if error["type"] == "extra_forbidden":
        fields = _fields_at(error["loc"][:-1], config)
        return f"{where}: unknown key '{path}'{nearest(str(error['loc'][-1]), fields)}"
    if error["type"] == "missing":
        return f"{where}: '{path}' is missing; it must be given"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    value = "" if isinstance(given, dict) else f" (given: {given!r})"
    return f"{where}: '{path}': {message}{value}" if path else f"{where}: {message}"


def _fields_at(location: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    models = [model]
    for part in location:
        named = {
            field.alias or name: field.annotation for m in models for name, field in m.model_fields.items()
        }
        if part in named:  # else an index or key of the list or mapping found in the step before
            models = configurations(named[part])
    return [field.alias or name for m in models for name, field in m.model_fields.items()]
