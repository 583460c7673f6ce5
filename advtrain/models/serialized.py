"""Serialized models: bytes with a digest that any process or machine can load.

Weights come from a run, from a registered pt2 archive, or from an external file: a pt2 archive, or a state dict
(`.pt`, `.pth`, `.safetensors`) for an architecture that the caller names. Pickled Python objects are never loaded.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from advtrain.errors import UserError
from advtrain.models import build_model
from advtrain.models.archive import load_archive
from advtrain.models.libraries import libraries_used
from advtrain.models.network import Normalized, embeds
from advtrain.models.small import Shape
from advtrain.recipe.model import ModelConfig, runs_code
from advtrain.schema import search_working_folder

#: Keys of the state dict in checkpoints of other training scripts, and prefixes of their parameter names.
WRAPPINGS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "network.")


@dataclass(frozen=True)
class Architecture:
    """Arguments of `build_model`."""

    config: ModelConfig
    shape: Shape
    num_classes: int
    target_scale: tuple[float, float] | None = None

    def build(self) -> Normalized:
        """Build the network, with random weights."""
        return build_model(self.config, self.shape, self.num_classes, self.target_scale)

    def check(self) -> Normalized:
        """Build the network; raise a UserError if it cannot be built or has nothing to train."""
        model = self.build()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(f"model '{self.config.name}' has no parameters that can be trained")
        return model


@dataclass(frozen=True)
class ModelSource:
    """Weights as safetensors with their architecture, or a pt2 archive without one."""

    content: bytes
    architecture: Architecture | None = None

    @classmethod
    def of(cls, weights: dict[str, Tensor], architecture: Architecture) -> ModelSource:
        """Serialize the weights of a network that `architecture` builds."""
        # Cloned: tied weights share their storage, which safetensors refuses.
        plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
        return cls(safetensors.torch.save(plain), architecture)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of weights, architecture and the file of a custom factory, 64 hex digits."""
        total = hashlib.sha256(self.content)
        if (made := self.architecture) is not None:
            facts = [made.config.architecture, made.shape, made.num_classes, made.target_scale]
            total.update(json.dumps(facts).encode())
            total.update(_custom_code(made.config.name))
        return total.hexdigest()

    def require_embeddings(self, name: str) -> None:
        """Raise a UserError if attacks cannot reach the embeddings of texts; `name` is the model's."""
        if self.architecture is None:
            raise UserError(
                f"'{name}' is an archive that maps token ids to logits, and attacks need its embeddings; evaluate the "
                "run that trained it"
            )

    @cached_property
    def embeds(self) -> bool:
        """True if attacks perturb the embeddings of the network; False for an exported model."""
        if self.architecture is None:
            return False
        with torch.random.fork_rng([]):
            return embeds(self.architecture.build())

    @cached_property
    def libraries(self) -> list[str]:
        """Optional libraries that define a layer of the network; none for an exported model."""
        if self.architecture is None or ":" not in self.architecture.config.name:
            return []
        with torch.random.fork_rng([]):
            return libraries_used(self.architecture.build())

    def load(self) -> nn.Module:
        """Return the model on the CPU, in evaluation mode and without parameter gradients.

        Raises:
            UserError: the archive cannot be read, or could run code.
        """
        if self.architecture is None:
            # An exported graph does not support eval(): its behavior was fixed at export.
            return load_archive(self.content).requires_grad_(False)
        model = self.architecture.build()
        model.load_state_dict(safetensors.torch.load(self.content))
        # A custom network may use `view`, which needs NCHW order.
        if ":" not in self.architecture.config.name:
            model = model.to(memory_format=torch.channels_last)
        return model.eval().requires_grad_(False)


def read_model_file(path: Path, architecture: Architecture | None) -> ModelSource:
    """Read a model that was trained elsewhere.

    Args:
        path: `.pt2`, or a state dict as `.pt`, `.pth` or `.safetensors`. The state dict may be inside a checkpoint, or
            have the prefix of a wrapper (DataParallel, torch.compile).
        architecture: architecture of a state dict; not used for `.pt2`.

    Raises:
        UserError: the file is unreadable, holds a pickled object instead of tensors, or has weights of another
            architecture. A pt2 archive is opened only by `load`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    if path.suffix == ".pt2":
        return ModelSource(content)
    if architecture is None:
        raise UserError(
            f"'{path}' contains only weights; set their architecture with --model: a built-in name such as cnn2 "
            "(arguments with --arg), or module:factory with --allow-code"
        )
    model = architecture.build()
    # Weights from elsewhere lack the normalization wrapper, whose prefix `spellings` removes.
    inner: nn.Module = model.network
    reasons = []
    for weights in spellings(read_tensors(path, content), path):
        try:
            inner.load_state_dict(weights)
        except RuntimeError as error:
            reasons.append(error)
            continue
        return ModelSource.of(model.state_dict(), architecture)
    raise UserError(
        f"the weights in '{path}' do not fit {architecture.config.name} {architecture.config.args}: {reasons[-1]}"
    )


def _custom_code(name: str) -> bytes:
    """Return the source of the module in `module:factory`; empty for a built-in name."""
    if not runs_code(name):
        return b""
    module = name.partition(":")[0]
    search_working_folder()
    found = importlib.util.find_spec(module)
    return Path(found.origin).read_bytes() if found is not None and found.origin else b""


def read_tensors(path: Path, content: bytes) -> Any:
    """Return the content of a `.safetensors`, `.pt` or `.pth` file, without Python objects."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # weights_only allows only tensors and Python containers
        raise UserError(
            f"'{path}' is not a state dict of tensors; Python objects are not loaded, because they could run any "
            "code; save model.state_dict() instead"
        ) from error
    except Exception as error:  # torch raises many exception types for other files
        raise UserError(f"'{path}' cannot be read as a state dict: {error}") from error


def spellings(found: Any, path: Path) -> Iterator[dict[str, Tensor]]:
    """Yield the state dict of a checkpoint, then versions with wrapper prefixes removed."""
    for key in WRAPPINGS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"'{path}' holds no state dict (a mapping of names to tensors)")
    weights: dict[str, Tensor] = dict(found)
    yield weights
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        yield weights


def copied(model: nn.Module | ModelSource | None) -> nn.Module | None:
    """Return a copy of a model in the state that it has now; None if it cannot be copied."""
    if isinstance(model, ModelSource):
        return model.load()
    try:
        return copy.deepcopy(model)
    except Exception:  # noqa: BLE001  (a model may refuse in any way; the check then says so)
        return None
