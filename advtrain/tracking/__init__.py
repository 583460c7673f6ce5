"""Tracking of runs in MLflow and Prometheus."""
