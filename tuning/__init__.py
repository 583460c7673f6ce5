"""Hyperparameter search campaigns: propose points, train trials, select winners."""
