"""The Python interface: attack, evaluate, and the parts of a training loop of one's own.

Everything here is plain PyTorch: Ray and MLflow are not started, and no file is written. `load_model` alone uses MLflow
for `models:/` URIs, and Ray Data for run folders whose data it decodes.
"""

from advtrain.api.attack import Adversary, attack
from advtrain.api.evaluate import evaluate
from advtrain.api.load import load_model
from advtrain.api.objective import Objective

__all__ = ["Adversary", "Objective", "attack", "evaluate", "load_model"]
