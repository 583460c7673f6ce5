"""Training: recipe -> components -> steps, in this process or on Ray Train workers."""

from advtrain.training.guard import describe as describe_recovery
from advtrain.training.launch import launch, launch_epochs
from advtrain.training.loop import Epochs, Outcome
from advtrain.training.session import Session
from advtrain.training.worker import build_components, run_worker

__all__ = [
    "Epochs",
    "Outcome",
    "Session",
    "build_components",
    "describe_recovery",
    "launch",
    "launch_epochs",
    "run_worker",
]
