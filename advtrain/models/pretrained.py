"""Pretrained weights of timm, torchvision and transformers, from local files or the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advtrain.errors import UserError, nearest
from advtrain.hub import download
from advtrain.models.archive import weights_only
from advtrain.models.hf import hf_weights
from advtrain.models.libraries import library_names
from advtrain.models.small import Shape

#: Files with weights in a repository of the Hugging Face hub.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Pretrained:
    """State dict of a library's network, and its normalization."""

    name: str  # network, without the tag of its weights
    weights: dict[str, Tensor]
    mean: list[float] | None
    std: list[float] | None
    shape: Shape | None  # (C, H, W); None: any size
    num_classes: int
    args: Mapping[str, Any] = field(default_factory=dict)  # of the network; transformers: all its settings


def pretrained_weights(library: str, name: str, *, allow_download: bool) -> Pretrained:
    """Return the pretrained weights of a network of timm, torchvision or transformers.

    Args:
        library: timm, torchvision or hf.
        name: NAME or NAME.TAG of timm, NAME/WEIGHTS of torchvision, FOLDER_OR_NAME of transformers.
        allow_download: whether a file that is not in the cache may be downloaded.

    Raises:
        UserError: there are no such weights, or they are not in the cache and may not be downloaded.
    """
    with weights_only(), torch.random.fork_rng([]):
        return _READERS[library](name, allow_download)


def _of_torchvision(reference: str, allow_download: bool) -> Pretrained:
    import torchvision

    name, slash, chosen = reference.partition("/")
    if name not in (known := library_names("torchvision")):
        raise UserError(f"unknown torchvision model '{name}'{nearest(name, known)}")
    choices = {each.name: each for each in torchvision.models.get_model_weights(name)}
    if not slash or chosen not in choices:
        raise UserError(f"name its weights, as torchvision:{name}/WEIGHTS; there are {', '.join(choices)}")
    weights = choices[chosen]
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    _require_file(file, weights.url, allow_download)
    network = _loaded(lambda: torchvision.models.get_model(name, weights=weights))
    scale = weights.transforms()
    mean, std = getattr(scale, "mean", None), getattr(scale, "std", None)
    return Pretrained(
        name, network.state_dict(), _numbers(mean), _numbers(std), None, len(weights.meta["categories"])
    )


def _of_timm(reference: str, allow_download: bool) -> Pretrained:
    known = library_names("timm")  # first: it says how to install timm
    import timm

    name = reference.partition(".")[0]
    if name not in known:
        raise UserError(f"unknown timm model '{name}'{nearest(name, known)}")
    tags = timm.list_pretrained(f"{name}*")
    is_known = reference == name or reference in tags
    usual = timm.models.get_pretrained_cfg(reference) if is_known else None
    if usual is None or not (usual.hf_hub_id or usual.url):
        raise UserError(f"timm has no pretrained weights '{reference}'{nearest(reference, tags)}")
    if usual.hf_hub_id:
        file = _hub_file(usual.hf_hub_id, usual.hf_hub_filename, allow_download)
    else:
        url = str(usual.url)
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        _require_file(file, url, allow_download)
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            _loaded(lambda: torch.hub.download_url_to_file(url, str(file), progress=False))
    overlay = {"file": str(file)}
    network = _loaded(lambda: timm.create_model(reference, pretrained=True, pretrained_cfg_overlay=overlay))
    return Pretrained(
        name,
        network.state_dict(),
        _numbers(usual.mean),
        _numbers(usual.std),
        usual.input_size,
        usual.num_classes,
    )


def _of_transformers(name: str, allow_download: bool) -> Pretrained:
    if allow_download:
        download(name)
    weights, settings, num_classes = hf_weights(name)
    return Pretrained(name, weights, None, None, None, num_classes, settings)


_READERS: dict[str, Callable[[str, bool], Pretrained]] = {
    "torchvision": _of_torchvision,
    "timm": _of_timm,
    "hf": _of_transformers,
}


def _hub_file(repository: str, name: str | None, allow_download: bool) -> Path:
    """Return the file with the weights in a repository of the Hugging Face hub, from its cache if it is there."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    names = [name] if name else list(_HUB_FILES)
    for each in names:
        if isinstance(found := try_to_load_from_cache(repository, each), str):
            return Path(found)
    if not allow_download:
        raise UserError(_missing(f"'{repository}' of the Hugging Face hub"))
    for each in names:
        try:
            return Path(hf_hub_download(repository, each))
        except Exception as error:  # from the hub, the network or the file system
            # LocalEntryNotFoundError: the hub cannot be reached, so it is not known which files it has.
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            raise UserError(f"'{repository}' cannot be downloaded: {error}") from error
    raise UserError(f"'{repository}' of the Hugging Face hub has none of the files {', '.join(names)}")


def _require_file(file: Path, url: str, allow_download: bool) -> None:
    if not file.is_file() and not allow_download:
        raise UserError(_missing(f"'{file.name}'") + f", or save {url} as '{file}'")


def _missing(what: str) -> str:
    return f"{what} is not in the local cache; allow its download with --allow-download"


def _loaded(build: Callable[[], Any]) -> Any:
    try:
        return build()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the libraries raise many kinds, as does a download
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the weights cannot be loaded: {type(error).__name__}: {reason}") from error


def _numbers(values: Any) -> list[float] | None:
    return None if values is None else [float(value) for value in values]
