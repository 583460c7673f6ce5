"""Helpers for tests of texts: a linear network whose gradients have a closed form, and recipes of few texts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advtrain.data import AugmentConfig, Batch, Dataset, load_data
from advtrain.models.text import TextModel
from advtrain.recipe import Recipe
from advtrain.recipe.data import TextShape
from advtrain.training import Session, build_components
from advtrain.training.step import Components

WORDS = [
    "who",
    "where",
    "when",
    "what",
    "made",
    "found",
    "is",
    "was",
    "the",
    "a",
    "place",
    "thing",
    "day",
    "sea",
    "?",
]
LR = 0.5


class Bag(TextModel):
    """Linear classifier of the sum of the embeddings, whose gradients have a closed form."""

    def __init__(self, shape: TextShape, num_classes: int) -> None:
        super().__init__(shape, 4)
        self.head = nn.Linear(4, num_classes)

    def classify(self, z: Tensor) -> Tensor:
        return self.head(z.sum(1))


class DropoutBag(Bag):
    """Bag with dropout, which records the masks of its passes in training mode."""

    def __init__(self, shape: TextShape, num_classes: int) -> None:
        super().__init__(shape, num_classes)
        self.masks: list[Tensor] = []

    def classify(self, z: Tensor) -> Tensor:
        mask = F.dropout(torch.ones(len(z), 4), 0.5, self.training)
        if self.training:
            self.masks.append(mask)
        return self.head(z.sum(1) * mask)


def write_texts(folder: Path) -> Path:
    """Write 90 texts of 4 to 16 words with three labels, and return the folder."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for number in range(90):
        length = int(torch.randint(3, 16, (1,), generator=draw))
        words = [WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=draw)]
        rows.append({"text": " ".join([f"n{number}", *words]), "label": ["a", "b", "c"][number % 3]})
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def text_recipe(folder: Path, adversary: dict, **changes) -> Recipe:
    """Return a recipe of these texts; `changes` replaces whole sections."""
    values = {
        "name": "texts",
        "data": {"source": "text", "path": str(folder / "texts.jsonl"), "vocabulary": 12},
        "model": {"name": "tests.linear_text_kit:Bag"},
        "adversary": {"norm": "l2", "eps": 0.3, **adversary},
        "objective": {"adv_ce": 1},
        "optimizer": {"name": "sgd", "lr": LR, "schedule": {"kind": "constant"}},
        "training": {"epochs": 2, "batch_size": 6},
        "evaluation": {
            "threat": {"norm": "l2", "eps": 0.3},
            "attack": {"name": "pgd", "num_steps": 2},
            "validation": {"name": "pgd", "num_steps": 2},
        },
    }
    return Recipe.model_validate(values | changes)


def built(recipe: Recipe) -> tuple[Components, Dataset]:
    """Return the components of a recipe in training mode, and its data."""
    data = load_data(recipe.data, Path())
    components = build_components(recipe, data, Session())
    components.train_mode()
    return components, data


def batches(data: Dataset, count: int) -> list[Batch]:
    """Return the first training batches."""
    found = data.train.train_batches(6, 0, 0, AugmentConfig(), Session().place)
    return [batch for _, batch in zip(range(count), found, strict=False)]


class ByHand:
    """Weights of a Bag, with the gradients of its cross-entropy in closed form."""

    def __init__(self, model: Bag) -> None:
        self.table = model.table.weight.detach().clone().double()
        self.weight = model.head.weight.detach().clone().double()
        self.bias = model.head.bias.detach().clone().double()

    def embed(self, x: Tensor) -> Tensor:
        return self.table[x] * (x != 0).unsqueeze(-1)

    def gradients(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of the mean loss at z for table, weight and bias, and that of each text for a token."""
        total = z.sum(1)
        logits = total @ self.weight.T + self.bias
        error = logits.softmax(1) - torch.eye(len(self.bias), dtype=torch.float64)[y]  # d l / d logits
        token = error @ self.weight  # (N, D): every token of a text has the same gradient
        table = torch.zeros_like(self.table)
        for row, ids in enumerate(x):
            for word in ids[ids != 0]:
                table[word] += token[row] / len(x)
        return table, error.T @ total / len(x), error.mean(0), token

    def step(self, gradients: tuple[Tensor, Tensor, Tensor]) -> None:
        for weights, gradient in zip((self.table, self.weight, self.bias), gradients, strict=True):
            weights -= LR * gradient

    def assert_equals(self, model: Bag) -> None:
        for found, wanted in (
            (model.table.weight, self.table),
            (model.head.weight, self.weight),
            (model.head.bias, self.bias),
        ):
            assert torch.allclose(found.detach().double(), wanted, atol=1e-6)


def ascended(d: Tensor, token: Tensor, mask: Tensor, alpha: float, eps: float) -> Tensor:
    """Return Proj(d + alpha g / norm(g)) by text, for a gradient that all tokens share; mask is (N, L, 1)."""
    g = token.unsqueeze(1) * mask
    moved = d + alpha * g / g.flatten(1).norm(dim=1)[:, None, None]
    length = moved.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(length > eps, moved * eps / length, moved)
