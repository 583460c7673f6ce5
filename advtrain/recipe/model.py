"""Model section of a recipe: the architecture, its initial weights and frozen blocks."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from advtrain.hub import is_pretrained
from advtrain.schema import Config, Number

#: Libraries whose networks are built by name.
MODEL_LIBRARIES = ("torchvision", "timm", "hf")


def runs_code(name: str) -> bool:
    """Return whether a model's name is module:factory of user code, not timm:NAME."""
    return ":" in name and name.partition(":")[0] not in MODEL_LIBRARIES


class ModelConfig(Config):
    """Architecture, the normalization in its first layer, and the weights to start from."""

    name: str
    """architecture: mlp, cnn2, cnn4, preact_resnet18, wide_resnet, torchvision:NAME, timm:NAME, or module:factory
    for your own; for texts: text_cnn, char_cnn, transformer, or hf:FOLDER_OR_NAME, an encoder of transformers"""
    args: dict[str, Any] = Field(default_factory=dict)
    """keyword arguments of the architecture (wide_resnet: depth, width, activation); hf: settings of config.json, which
    a new run completes"""
    mean: list[Number] | None = None
    """per-channel mean that the first layer subtracts, in [0, 1]; null: 0"""
    std: list[Number] | None = None
    """per-channel standard deviation that the first layer divides by, > 0; null: 1"""
    from_: str | None = Field(default=None, alias="from", min_length=1)
    """weights to start from: models:/NAME@ALIAS, models:/NAME/VERSION, a run, a .safetensors, .pth or .pt file,
    timm:NAME, torchvision:NAME/WEIGHTS or hf:FOLDER_OR_NAME; null: random weights"""
    from_digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the weights that `from` names; a new run fills it in, and other weights are refused"""
    load: Literal["all", "backbone"] = "all"
    """tensors to take from `from`: all, or backbone (all but the last layer, which starts from random weights)"""

    freeze: str | list[str] | None = None
    """blocks that are not trained: backbone (all but the head), or a list of block names; null: none"""
    unfreeze_epoch: int | None = Field(default=None, ge=1)
    """number of finished epochs after which all blocks are trained, with a new optimizer state (LP-FT, Kumar et al.
    2022); null: frozen blocks stay frozen"""

    @model_validator(mode="after")
    def _needs_weights(self) -> Self:
        if self.from_ is None and (self.from_digest is not None or self.load != "all"):
            raise ValueError("load and from_digest need `from`, the weights to start from")
        return self

    @field_validator("freeze", mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        if isinstance(given, list) and given:
            names = [str(name) if type(name) is int else name for name in given]
            if all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names):
                return names
        elif given is None or given == "backbone":
            return given
        raise ValueError(
            "takes backbone or a list of different block names, in quotes where they look like numbers: ['0.2']"
        )

    @model_validator(mode="after")
    def _freezes_before(self) -> Self:
        if self.unfreeze_epoch is not None and self.freeze is None:
            raise ValueError(
                "unfreeze_epoch does nothing without freeze; set freeze, for example to backbone"
            )
        return self

    @property
    def architecture(self) -> dict[str, Any]:
        """Settings that define the network, without those for its weights."""
        return self.model_dump(mode="json", include={"name", "args", "mean", "std"})

    @property
    def starts_from_library(self) -> bool:
        """True if `from` names weights of a library; those of images bring their normalization."""
        return self.from_ is not None and self.from_.partition(":")[0] in MODEL_LIBRARIES

    def pinned_as(self, stored: ModelConfig) -> ModelConfig:
        """Return the model with the values that a run filled in for its name and its `from`."""
        if is_pretrained(self.name) and self.name == stored.name and "model_type" not in self.args:
            args = {**stored.args, **self.args}
            return self.model_copy(update={"args": args}).pinned_as(stored)
        if self.from_ is None or self.from_ != stored.from_:
            return self
        filled = ("from_digest", "mean", "std") if self.starts_from_library else ("from_digest",)
        unset = {key: getattr(stored, key) for key in filled if getattr(self, key) is None}
        return self.model_copy(update=unset)
