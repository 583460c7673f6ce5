"""Adversarial training with honest evaluation: recipe -> run -> report -> registered model."""

__version__ = "0.1.0"
