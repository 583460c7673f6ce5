"""Adversarial training and evaluation: recipe -> run -> report -> registered model.

For notebooks and custom training loops: `attack`, `evaluate`, `Adversary`, `Objective`, `ThreatModel`, `load_recipe`,
`load_model`, `wrap_model`. They load on first use, so `import advtrain` itself is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advtrain.api import Adversary, Objective, attack, evaluate, load_model
    from advtrain.errors import UserError
    from advtrain.models.outputs import wrap_model
    from advtrain.recipe import load_recipe
    from advtrain.threat import ThreatModel

__version__ = "0.2.0"
__all__ = [
    "Adversary",
    "Objective",
    "ThreatModel",
    "UserError",
    "attack",
    "evaluate",
    "load_model",
    "load_recipe",
    "wrap_model",
]

_MODULES = {
    "ThreatModel": "advtrain.threat",
    "UserError": "advtrain.errors",
    "load_recipe": "advtrain.recipe",
    "wrap_model": "advtrain.models.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'advtrain' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_MODULES.get(name, "advtrain.api")), name)


def __dir__() -> list[str]:
    return __all__
