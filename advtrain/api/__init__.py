"""Python API: attacks, evaluation, and building blocks for custom training loops.

Everything here is plain PyTorch: it does not start Ray or MLflow, and writes no files. Only `load_model` uses MLflow
for `models:/` URIs, and Ray Data for run folders whose data it decodes.
"""

from advtrain.api.attack import Adversary, attack
from advtrain.api.evaluate import evaluate
from advtrain.api.load import load_model
from advtrain.api.objective import Objective
from advtrain.models.outputs import wrap_model

__all__ = ["Adversary", "Objective", "attack", "evaluate", "load_model", "wrap_model"]
