"""Paths that a user writes: `~` and `$VAR` are expanded, every other character is plain."""

from __future__ import annotations

import os
import re
from pathlib import Path

from advtrain.errors import UserError

_VARIABLE = re.compile(r"\$(?:\$|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")


def expand(text: str, what: str) -> str:
    """Return the text of a path or URI with `~` and `$VAR` or `${VAR}` expanded.

    `~` counts at the beginning only. `$$` is a plain dollar sign, and so is one before anything but a name.

    Args:
        text: what the user wrote, in an option, a variable or a recipe.
        what: names it in errors, such as "--runs" or "data.path".

    Raises:
        UserError: a variable is not set or empty, or there is no such user.
    """

    def value(found: re.Match[str]) -> str:
        name = found["name"] or found["braced"]
        if name is None:
            return "$"
        if not (given := os.environ.get(name, "") if name else ""):
            raise UserError(
                f"{what} '{text}': the variable ${name} is not set or empty; set it, or write $$ for a plain $"
            )
        return given

    home = re.match("~[^/]*", text)
    try:
        start = str(Path(home[0]).expanduser()) if home else ""
    except RuntimeError as error:
        raise UserError(
            f"{what} '{text}': {home and home[0]} has no home folder; write ./{text} if that is the name of a file"
        ) from error
    return start + _VARIABLE.sub(value, text[home.end() if home else 0 :])


def user_path(text: str | Path, what: str) -> Path:
    """Return the path that the user wrote, see `expand`."""
    return Path(expand(str(text), what))


def as_written(path: Path) -> str:
    """Return the text that `expand` turns into this absolute path."""
    return str(path).replace("$", "$$")
