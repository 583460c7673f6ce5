"""Folders of pretrained networks of texts, as transformers saves them: `hf:FOLDER_OR_NAME`.

A name is looked up in the local cache of the Hugging Face hub. Nothing here imports transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advtrain.errors import UserError
from advtrain.user_paths import user_path

#: Prefix in model.name, model.from and data.tokenizer.
PREFIX = "hf:"
#: Files of a repository of the hub that are read.
FILES = ("config.json", "tokenizer.json", "model*.safetensors", "model*.safetensors.index.json")
#: Largest config.json in bytes; usual ones have 1 KB.
_MOST_CONFIG = 2**20


def is_pretrained(name: str | None) -> bool:
    """Return whether a setting names a folder or repository of transformers."""
    return name is not None and name.startswith(PREFIX)


def pretrained_folder(name: str) -> Path:
    """Return a folder, or the folder with the cached files of a repository of the hub.

    Args:
        name: what follows `hf:`; a relative folder is looked up in the working folder.

    Raises:
        UserError: there is neither.
    """
    if not name:
        raise UserError("hf: needs the folder or the name of a pretrained network, as hf:FOLDER_OR_NAME")
    path = user_path(name, "hf:")
    if path.is_dir():
        return path
    cached = None if _is_path(name) else _cached(name)
    if cached is not None:
        return cached
    download = "" if _is_path(name) else f", or download it from the hub: hf download {name}"
    raise UserError(
        f"'{PREFIX}{name}': there is no such folder{download and ', and the cache of the Hugging Face hub lacks it'}; "
        f"name a folder with config.json, tokenizer.json and model.safetensors{download}"
    )


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "$")) or name.count("/") > 1


def _cached(name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache  # optional
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name of a repository
        return None
    return Path(found).parent if isinstance(found, str) else None


def download(name: str) -> None:
    """Download the files of a repository of the hub into its local cache, unless they are there.

    Args:
        name: what follows `hf:`; nothing is downloaded for a folder.

    Raises:
        UserError: they cannot be downloaded.
    """
    if user_path(name, "hf:").is_dir() or _is_path(name) or _cached(name) is not None:
        return
    try:
        from huggingface_hub import snapshot_download  # optional

        snapshot_download(name, allow_patterns=list(FILES))
    except Exception as error:  # from the hub, the network or the file system
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"'{PREFIX}{name}' cannot be downloaded from the Hugging Face hub: {reason}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json in a folder of transformers.

    Raises:
        UserError: it is missing or damaged, or the network needs code from the folder.
    """
    path = folder / "config.json"
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise ValueError(f"it has more than {_MOST_CONFIG:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"'{folder}' is no folder of transformers: config.json: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is damaged: it holds no JSON object")
    if values.get("auto_map"):
        raise UserError(
            f"'{path}' needs Python code from outside transformers (auto_map), which is not run; build the network in "
            "your own module:factory, and pass --allow-code"
        )
    if not isinstance(values.get("model_type"), str):
        raise UserError(f"'{path}' has no model_type, so it does not say which network it describes")
    return values
