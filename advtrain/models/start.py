"""Weights that a training starts from, and the modules that it leaves as they are.

`training.worker.build_components` takes them. No recipe sets them yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from advtrain.errors import UserError, nearest


@dataclass(frozen=True)
class StartWeights:
    """A state dict to start from, and which modules are frozen.

    Args:
        weights: of the whole model, as its state_dict() names them.
        frozen: names of modules, as model.named_modules() has them. Their parameters get no gradient and no optimizer
            state, and their batch norm stays in evaluation mode.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> list[nn.Module]:
        """Load the weights and freeze the modules; return these.

        Raises:
            UserError: weights of another architecture, no such module, or nothing left to train.
        """
        if self.weights:
            try:
                model.load_state_dict(dict(self.weights))
            except RuntimeError as error:
                raise UserError(f"the start weights do not fit the model: {error}") from error
        modules = dict(model.named_modules())
        if missing := [name for name in self.frozen if name not in modules]:
            raise UserError(f"there is no module '{missing[0]}' to freeze{nearest(missing[0], modules)}")
        found = [modules[name].requires_grad_(False) for name in self.frozen]
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError("every module is frozen: nothing is left to train")
        return found


#: Random weights, all of them trained.
FROM_SCRATCH = StartWeights()
