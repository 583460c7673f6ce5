"""Initial weights of a training, and its frozen modules.

`training.worker.build_components` uses them. No recipe sets them yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from advtrain.errors import UserError, nearest


@dataclass(frozen=True)
class StartWeights:
    """State dict to start from, and names of the frozen modules.

    Args:
        weights: state dict of the whole model.
        frozen: module names from model.named_modules(). Their parameters get no gradient and no optimizer state, and
            their batch norm stays in evaluation mode.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> list[nn.Module]:
        """Load the weights, freeze the modules, and return the frozen modules.

        Raises:
            UserError: the weights have another architecture, a module is missing, or nothing is left to train.
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


#: Random weights, and no frozen module.
FROM_SCRATCH = StartWeights()
