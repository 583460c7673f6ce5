"""Working tree of a job: the files that Ray uploads, and checks of them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

from advtrain.errors import UserError
from advtrain.user_paths import user_path

#: Largest working tree that is uploaded, in 10^6 bytes; Ray's own limit is 500.
MAX_MB = 100.0


def working_tree(folder: Path | None = None) -> Path:
    """Return the folder that Ray uploads, after a check of its files.

    Args:
        folder: folder; None: the working folder, which must be in a git checkout.

    Raises:
        UserError: there is no such folder, a file may be a secret, or the files are too large. The message lists the
            largest folders and files.
    """
    here = Path.cwd() if folder is None else folder.absolute()
    if folder is None and not any((place / ".git").exists() for place in (here, *here.parents)):
        raise UserError(f"'{here}' is no git checkout; name the folder to send with --working-dir")
    if not here.is_dir():
        raise UserError(f"--working-dir '{here}' is no folder")
    names = uploaded_files(here)
    if private := [name for name in names if _is_private(here / name)]:
        raise UserError(
            f"'{private[0]}' may hold a secret, and it would be sent: add it to .gitignore or .rayignore"
        )
    sizes: Counter[str] = Counter()
    for name in names:
        top, slash, _ = name.partition("/")
        sizes[top + slash] += (here / name).stat().st_size
    total = sizes.total() / 1e6
    if total > MAX_MB:
        shown = ", ".join(f"{name} ({size / 1e6:.0f} MB)" for name, size in sizes.most_common(3))
        raise UserError(
            f"the working tree '{here}' is {total:.0f} MB, above the limit of {MAX_MB:.0f} MB; the largest: {shown}. "
            "Exclude them in .gitignore or .rayignore"
        )
    return here


def uploaded_files(folder: Path) -> list[str]:
    """Return the files that Ray uploads, relative to the folder.

    Those are all that no ignore file excludes. Ray reads .gitignore and .rayignore of the folder and of those in it,
    but no other configuration of git.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found: list[str] = []

    def add(path: Path) -> None:
        if path.is_file():
            found.append(path.relative_to(folder).as_posix())

    use_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"  # as Ray's client does
    excludes = [_get_excludes(folder, get_runtime_env_default_excludes())]
    quiet = logging.Logger("upload", logging.CRITICAL)  # else each ignore file is logged
    try:
        _dir_travel(folder, excludes, add, use_gitignore, quiet)
    except OSError as error:
        raise UserError(f"the working tree '{folder}' cannot be read: {error}") from error
    return found


def _is_private(path: Path) -> bool:
    """Return whether a file is named as keys and secrets are, or is the signing key."""
    named = os.environ.get("ADVTRAIN_SIGNING_KEY")
    is_key = named is not None and path.resolve() == user_path(named, "$ADVTRAIN_SIGNING_KEY").resolve()
    return is_key or any(map(path.match, ("*.pem", "*.key", ".env*", "secret*.env")))
