"""What MLflow and Prometheus see of a run."""
