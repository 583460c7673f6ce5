"""Questions of two kinds, and a recipe that trains on them in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advtrain.recipe import Recipe, parse_override, set_path

KINDS = ("human", "location")


def question(number: int) -> str:
    """Return a question; the even ones are about a human, the odd ones about a location."""
    return [f"who made thing {number} ?", f"where is place {number} ?"][number % 2]


def write_questions(path: Path, numbers: range, columns: tuple[str, str] = ("text", "label")) -> Path:
    """Write questions as JSON lines, with the columns of text and label."""
    rows = [{columns[0]: question(n), columns[1]: KINDS[n % 2]} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_recipe(folder: Path, *overrides: str) -> Recipe:
    """Return a recipe of 160 questions, which are written into the folder."""
    values: dict[str, Any] = {
        "name": "questions",
        "data": {
            "source": "text",
            "path": str(write_questions(folder / "q.jsonl", range(160))),
            "vocabulary": 30,
        },
        "model": {"name": "text_cnn", "args": {"dim": 8, "channels": 6}},
        "adversary": {"name": "pgd", "norm": "l2", "eps": 0.2, "num_steps": 2},
        "objective": {"clean_ce": 1, "adv_ce": 1},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "training": {"epochs": 3, "batch_size": 16},
        "evaluation": {
            "threat": {"norm": "l2", "eps": 0.2},
            "attack": {"name": "pgd", "num_steps": 2},
            "validation": {"name": "pgd", "num_steps": 2},
        },
    }
    for override in overrides:
        set_path(values, *parse_override(override))
    return Recipe.model_validate(values)
