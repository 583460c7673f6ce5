"""Samples of the Python API as a data set for an evaluation."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from advtrain.api.checks import NUM_CHECKED, check_model
from advtrain.api.texts import TextClassifier, Texts, text_split, to_tensor
from advtrain.data import ArraySplit, Dataset
from advtrain.data.batches import Labels
from advtrain.data.texts import TextSplit
from advtrain.models.network import embeds


def dataset_of(
    model: nn.Module, x: Tensor | Texts, y: Tensor, name: str, class_names: list[str] | None
) -> Dataset:
    """Return a data set with the samples as test split, which is the only split in use.

    The number of classes is the number of logits.
    """
    split = split_of(model, x, y)
    digest = hashlib.sha256(split.images.tobytes() + split.labels.tobytes()).hexdigest()
    first = to_tensor(model, x[:NUM_CHECKED])
    num_outputs = check_model(model, first.to(device_of(model, first)), y)
    num_classes = 0 if y.is_floating_point() else num_outputs
    text = model.text if isinstance(model, TextClassifier) and isinstance(split, TextSplit) else None
    return Dataset(name, split, split, split, num_classes, tuple(split.shape), digest, class_names, text=text)


def split_of(model: nn.Module, x: Tensor | Texts, y: Tensor) -> ArraySplit:
    """Return inputs (N, ...), or N texts, and labels or targets (N,) as a split."""
    kind = np.float32 if y.is_floating_point() else np.int64
    labels: Labels = y.cpu().numpy().astype(kind)  # type: ignore[assignment]
    if not isinstance(x, Tensor):
        assert isinstance(model, TextClassifier)
        return text_split(model, x, labels)
    is_ids = embeds(model) and x.dtype == torch.int64
    return ArraySplit((x if is_ids else x.detach().float()).cpu().numpy(), labels)


def device_of(model: nn.Module, x: Tensor | Texts) -> torch.device:
    """Return the device of the model's parameters or buffers, else the device of the inputs."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), x)
    return tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")
