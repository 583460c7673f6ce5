"""Masked mean of the states of an encoder of transformers, and a linear head over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from advtrain.errors import UserError
from advtrain.text import reason

#: Setting of `model.args` that chooses the classifier: own is that of transformers.
POOLING = "pooling"
POOLINGS = ("own", "mean")
#: Settings of config.json for the dropout before a classifier; the first that is a number counts.
_DROPOUTS = (
    *("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "cls_dropout"),
    *("hidden_dropout_prob", "hidden_dropout", "dropout"),
)
#: Tokens of a text in a trial, and the padding after it.
_TOKENS, _PADDING = 5, 3
#: Largest change of logits that counts as rounding, relative to the largest logit.
_ROUNDING = 1e-3


class MeanPooled(nn.Module):
    """Linear classifier over the mean of the last hidden states, without those of padding.

    This is the sentence embedding of sentence encoders (Reimers and Gurevych 2019, arXiv 1908.10084) before its
    normalization. The mean includes special tokens, as theirs does.

    Args:
        network: sequence classifier of transformers, of which the encoder without its pooler is taken.
        num_classes: number of logits.
    """

    def __init__(self, network: Any, num_classes: int) -> None:
        super().__init__()
        self.config, self.base_model_prefix = network.config, str(network.base_model_prefix)
        encoder = getattr(network, self.base_model_prefix)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # unused, and parameters without gradients stop a distributed training
        self.add_module(self.base_model_prefix, encoder)
        self.dropout = nn.Dropout(_dropout(self.config))
        self.head = nn.Linear(int(self.config.hidden_size), num_classes)

    @property
    def encoder(self) -> Any:
        """Encoder of transformers; its module has the name that it has in transformers."""
        return getattr(self, self.base_model_prefix)

    def get_input_embeddings(self) -> Any:
        """Return the table of word embeddings."""
        return self.encoder.get_input_embeddings()

    def is_unused(self, name: str) -> bool:
        """Return whether a tensor belongs to the pooler or head of the class of transformers."""
        prefix = f"{self.base_model_prefix}."
        return name.startswith(f"{prefix}pooler.") or not name.startswith((prefix, "head."))

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Map word embeddings (N, L, D) and a mask (N, L), 0 for padding, to logits (N, K)."""
        h = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(h.dtype)
        logits: Tensor = self.head(self.dropout((h * mask).sum(1) / mask.sum(1)))
        return logits


def pop_pooling(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the pooling in the settings of a network, and the other settings.

    Raises:
        UserError: there is no such pooling.
    """
    others = dict(settings)
    pooling = others.pop(POOLING, "own")
    if pooling not in POOLINGS:
        raise UserError(f"model.args.{POOLING} must be {' or '.join(POOLINGS)}, not {pooling!r}")
    return pooling, others


def mean_pooled(network: Any, num_classes: int, name: str) -> MeanPooled:
    """Return the encoder of a sequence classifier with mean pooling and a new head.

    Args:
        network: sequence classifier of transformers with random weights.
        num_classes: number of logits.
        name: name of the network for errors.

    Raises:
        UserError: the encoder returns no hidden state of each token.
    """
    refused = UserError(
        f"model.args.{POOLING}: the encoder of '{name}' ({network.config.model_type}) returns no hidden state of each "
        f"token without its pooler, so there is no mean of them; leave out model.args.{POOLING}"
    )
    try:
        pooled = MeanPooled(network, num_classes)
    except (AttributeError, TypeError) as error:
        raise refused from error
    z = _trial_embeddings(pooled)
    try:
        found = _on_trial(
            pooled, lambda: pooled.encoder(inputs_embeds=z, attention_mask=_mask(z)).last_hidden_state
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise refused from error
    if not isinstance(found, Tensor) or found.shape != (*z.shape[:2], pooled.head.in_features):
        raise refused
    return pooled


def check_padding(network: nn.Module, classify: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    """Raise a UserError unless a text has the same logits however much padding follows it.

    Args:
        network: network of transformers on the CPU.
        classify: function of word embeddings (N, L, D) and a mask (N, L) that returns logits (N, K).
        name: name of the network for errors.
    """
    z = _trial_embeddings(network)
    longer = torch.cat([z, torch.zeros(1, _PADDING, z.shape[2])], 1)
    mask = torch.cat([_mask(z), torch.zeros(1, _PADDING, dtype=torch.int64)], 1)
    try:
        short, long = _on_trial(network, lambda: (classify(z, _mask(z)), classify(longer, mask)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"model '{name}' fails on word embeddings (1, {_TOKENS}, {z.shape[2]}): {reason(error)}"
        ) from error
    if not (short - long).abs().max() <= _ROUNDING * short.abs().max():
        raise UserError(
            f"model '{name}': the logits of a text depend on the padding after it, so they would depend on the other "
            "texts of a batch; use an encoder such as BERT, DistilBERT, ELECTRA, ALBERT or MiniLM"
        )


def _trial_embeddings(network: Any) -> Tensor:
    table: Tensor = network.get_input_embeddings().weight.detach()
    return table[torch.arange(1, 1 + _TOKENS).clamp(max=len(table) - 1)].unsqueeze(0)


def _mask(z: Tensor) -> Tensor:
    return torch.ones(z.shape[:2], dtype=torch.int64)


def _on_trial(network: nn.Module, call: Callable[[], Any]) -> Any:
    """Return the result of a call in evaluation mode, without gradients; random numbers are not used up."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            return call()
    finally:
        network.train(was_training)


def _dropout(config: Any) -> float:
    values = (getattr(config, name, None) for name in _DROPOUTS)
    return next((float(value) for value in values if isinstance(value, int | float)), 0.0)
