"""Pretrained encoders of transformers: `hf:FOLDER_OR_NAME`.

Attacks change the word embeddings, before positions and LayerNorm are added. Padding and the special tokens, such as
[CLS] and [SEP], have radius 0. Attention is eager, because fused kernels have no second derivative.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advtrain.errors import UserError, nearest
from advtrain.hub import PREFIX, pretrained_folder, read_config
from advtrain.models.lora import LORA, add_lora, pop_lora
from advtrain.models.network import EmbeddingModel, pick_logits
from advtrain.models.pooling import POOLING, check_padding, mean_pooled, pop_pooling
from advtrain.models.text import is_token
from advtrain.recipe.data import TextShape
from advtrain.text import listed, reason
from advtrain.threat import ThreatModel

#: Keys of config.json that do not define the network, or that `build_hf` sets.
_UNUSED = {
    *("architectures", "transformers_version", "torch_dtype", "dtype", "problem_type", "attn_implementation"),
    *("num_labels", "id2label", "label2id", "finetuning_task", "gradient_checkpointing", "use_cache"),
    *("task_specific_params", "auto_map", "quantization_config", "transformers_weights"),
}
#: Vocabularies are often rounded up to a multiple of this, so the table may have up to that many unused rows.
_ROUNDED = 128
#: Files with pickled weights.
_PICKLED = ("pytorch_model*.bin", "pytorch_model*.pt", "tf_model.h5", "flax_model.msgpack")
#: Files with weights, whole or in several files.
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class PretrainedText(EmbeddingModel):
    """Sequence classifier of transformers whose word embeddings are perturbed."""

    special: Tensor

    def __init__(self, transformer: Any, special: tuple[int, ...]) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.register_buffer("special", torch.tensor(special, dtype=torch.int64), persistent=False)

    @property
    def table(self) -> nn.Embedding:
        """Table of word embeddings."""
        found: nn.Embedding = self.transformer.get_input_embeddings()
        return found

    @property
    def head_modules(self) -> list[str]:
        """Names of the modules after the pretrained encoder, which are the head."""
        body = self.transformer.base_model_prefix
        return [
            f"transformer.{name}"
            for name, module in self.transformer.named_children()
            if name != body and next(module.parameters(), None) is not None
        ]

    def is_unused(self, name: str) -> bool:
        """Return whether a tensor of transformers' own classifier has no place in this network."""
        own, prefix = getattr(self.transformer, "is_unused", None), "transformer."
        return own is not None and name.startswith(prefix) and own(name.removeprefix(prefix))

    def embed(self, x: Tensor) -> Tensor:
        """Map token ids (N, L) int64 to their word embeddings (N, L, D); those of padding are zeros."""
        z: Tensor = self.table(x) * (x != 0).unsqueeze(-1)
        return z

    def classify(self, z: Tensor) -> Tensor:
        """Map word embeddings (N, L, D) to logits (N, K)."""
        return self.classify_masked(z, is_token(z).squeeze(-1).long())

    def classify_masked(self, z: Tensor, mask: Tensor) -> Tensor:
        """Map word embeddings (N, L, D) and a mask (N, L) int64, 0 for padding, to logits (N, K)."""
        logits: Tensor = pick_logits(self.transformer(inputs_embeds=z, attention_mask=mask))  # type: ignore[assignment]
        return logits

    def threat_at(self, z: Tensor, threat: ThreatModel) -> ThreatModel:
        """Return `threat` without a box, and with radius 0 for padding and special tokens."""
        free = is_token(z)
        with torch.no_grad():
            rows = self.table(self.special)  # a call, because FSDP gathers the table in it
        for row in rows:
            free = free & (z != row).any(-1, keepdim=True)
        return replace(threat, low=-math.inf, high=math.inf, free=free)


def _library() -> Any:
    try:
        import transformers  # optional, slow
    except ImportError as error:
        raise UserError("hf:NAME needs the package transformers: pip install 'advtrain[text]'") from error
    return transformers


def complete_args(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a network, those of its config.json changed by `args`.

    Settings that hold a `model_type` are complete, and no folder is read.

    Raises:
        UserError: the folder cannot be used, or its network has no such setting.
    """
    if "model_type" in args:
        return dict(args)
    stored = read_config(pretrained_folder(name))
    kind = _config_class(str(stored["model_type"]))
    known = set(kind().to_dict()) - _UNUSED | {POOLING, LORA}
    for key in args:
        if key not in known:
            raise UserError(f"model.args.{key}: '{PREFIX}{name}' has no such setting{nearest(key, known)}")
    kept = {key: value for key, value in stored.items() if key not in _UNUSED and not key.startswith("_")}
    return kept | dict(args)


def build_hf(name: str, args: Mapping[str, Any], shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build the encoder `hf:NAME` with a classifier and random weights.

    Args:
        name: folder or name on the hub.
        args: changes of its config.json, or all settings, with model_type; `pooling`: own or mean; `lora`: a rank.
        shape: a TextShape.
        num_classes: number of logits.

    Raises:
        UserError: the folder cannot be used, or the network does not suit the tokens of the data.
    """
    if not isinstance(shape, TextShape):
        raise UserError(f"model '{PREFIX}{name}' takes texts, but the samples are not")
    pooling, settings = pop_pooling(complete_args(name, args))
    rank, settings = pop_lora(settings)
    config = _config(name, settings, num_classes)
    _check_tokens(name, config, shape)
    try:
        with _quiet():
            network = _library().AutoModelForSequenceClassification.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"model '{PREFIX}{name}' cannot be built: {reason(error)}") from error
    network = network.float()
    if pooling == "mean":
        network = mean_pooled(network, num_classes, f"{PREFIX}{name}")
    made = PretrainedText(network, shape.special)
    check_padding(network, made.classify_masked, f"{PREFIX}{name}")
    if rank:
        add_lora(getattr(network, network.base_model_prefix), rank)
    return made


def hf_weights(name: str) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """Return the pretrained weights, the settings and the number of classes of `hf:NAME`.

    The weights are in the names of `build_hf`. They lack a head that the folder does not have.

    Raises:
        UserError: the folder cannot be used, or its weights are pickled or missing.
    """
    folder = pretrained_folder(name)
    settings = complete_args(name, {})
    _require_safetensors(folder)
    classes = _stored_classes(folder)
    config = _config(name, settings, classes)
    try:
        with _quiet():
            network, info = _library().AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                attn_implementation="eager",
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"the weights in '{folder}' cannot be loaded: {reason(error)}") from error
    absent = set(info["missing_keys"])
    found = {key: value for key, value in network.state_dict().items() if key not in absent}
    if not found:
        raise UserError(f"'{folder}': no tensor of model.safetensors belongs to a {config.model_type}")
    return {f"transformer.{key}": value for key, value in found.items()}, settings, classes


def _stored_classes(folder: Path) -> int:
    stored = read_config(folder)
    names, number = stored.get("id2label"), stored.get("num_labels")
    if isinstance(names, dict) and names:
        return len(names)
    return number if isinstance(number, int) and number > 0 else 2


def _require_safetensors(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"'{folder}' holds an adapter; merge it (merge_and_unload) and save the whole network"
        )
    if (other := read_config(folder).get("transformers_weights")) not in (None, _WEIGHTS, _INDEX):
        raise UserError(
            f"'{folder}': config.json names other weights (transformers_weights: {other!r}) than {_WEIGHTS}; save the "
            "network with model.save_pretrained(FOLDER)"
        )
    if (folder / _WEIGHTS).is_file():
        return
    if (folder / _INDEX).is_file():
        _check_index(folder / _INDEX)
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if not pickled:
        raise UserError(f"'{folder}' has no model.safetensors with weights")
    raise UserError(
        f"'{folder}' has pickled weights ({pickled[0]}), which are not loaded because they could run any code; save "
        "them as model.safetensors, with model.save_pretrained(FOLDER) where you trust them"
    )


def _check_index(path: Path) -> None:
    """Raise a UserError unless an index of weights names safetensors files only."""
    try:
        files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        wrong = sorted(file for file in files if not file.endswith(".safetensors"))
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is damaged: {reason(error)}") from error
    if wrong:
        raise UserError(
            f"'{path}' names '{wrong[0]}', which is not loaded because it could run any code; save the weights as "
            "safetensors, with model.save_pretrained(FOLDER) where you trust them"
        )


def _config_class(kind: str) -> Any:
    """Return the configuration class of an encoder that takes embeddings instead of ids."""
    lib = _library()
    known = {each.model_type: each for each in lib.MODEL_FOR_MASKED_LM_MAPPING}
    usable = {each.model_type for each in lib.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING}
    if kind not in known or kind not in usable:
        raise UserError(
            f"model_type '{kind}' is no encoder of transformers {lib.__version__} with a sequence classifier; known: "
            f"{listed(sorted(known.keys() & usable), 200)}"
        )
    return known[kind]


def _config(name: str, settings: Mapping[str, Any], num_classes: int) -> Any:
    """Return the configuration object of transformers for these settings."""
    kind = _config_class(str(settings["model_type"]))
    values = {key: value for key, value in settings.items() if key not in _UNUSED and key != "model_type"}
    try:
        config = kind(**json.loads(json.dumps(values)), num_labels=num_classes)
    except Exception as error:  # classes of transformers raise many kinds
        raise UserError(f"model.args of '{PREFIX}{name}': {reason(error)}") from error
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise UserError(f"model '{PREFIX}{name}' has a decoder; only encoders such as BERT take embeddings")
    if getattr(config, "pad_token_id", 0) not in (0, None):
        raise UserError(
            f"model '{PREFIX}{name}': its padding is token {config.pad_token_id}, but token 0 is padding here; use an "
            "encoder such as BERT, DistilBERT, ELECTRA, ALBERT or MiniLM"
        )
    return config


def _check_tokens(name: str, config: Any, shape: TextShape) -> None:
    """Raise a UserError if the token ids of the data are not those of the network."""
    rows = int(config.vocab_size)
    if not rows - _ROUNDED < shape.vocabulary <= rows:
        raise UserError(
            f"model '{PREFIX}{name}' embeds {rows:,} tokens, but the tokenizer has {shape.vocabulary:,}, so "
            f"it does not belong to the network; set data.tokenizer: {PREFIX}{name}"
        )
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < shape[0]:
        raise UserError(
            f"model '{PREFIX}{name}' has {most} positions, but the texts have up to {shape[0]} tokens; set "
            f"data.max_length: {most}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and reports of transformers."""
    log = _library().logging
    level, is_on = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if is_on:
            log.enable_progress_bar()
