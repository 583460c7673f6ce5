"""Device of this process, and the Ray cluster that it joins or starts."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import torch

from advtrain.environment import available_cores
from advtrain.errors import UserError

#: Ray settings; values in the user's environment take precedence.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # delay until a dead worker is detected (Ray: 2)
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # a spot node's notice can be as short as 30 s (Ray: 5)
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # timeout of a worker that does not respond (Ray: 600)
    "RAY_DATA_LOG_LEVEL": "ERROR",  # same level as ray.init below
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def default_device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():  # with its index, because tensors report cuda:0, which is not equal to cuda
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def start_ray(address: str | None, num_cpus: int = 0) -> None:
    """Connect to the cluster at `address`, or start one on this machine.

    A local cluster has one CPU per core, and at least `num_cpus`. If already connected, nothing is done.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    from ray.job_config import JobConfig

    class InstalledCode(JobConfig):  # type: ignore[misc]
        """Job whose workers do not search the driver's working folder first, as Ray's default is."""

        def _runtime_env_has_working_dir(self) -> bool:
            return True

    address = address or os.environ.get("RAY_ADDRESS")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    verbose = logging.getLogger(__name__).isEnabledFor(logging.INFO)
    level = "INFO" if verbose else "ERROR"
    try:
        if address:
            ray.init(address=address, job_config=InstalledCode(), log_to_driver=verbose, logging_level=level)
        else:
            ray.init(
                job_config=InstalledCode(),
                address="local",  # never a cluster that another user started on this machine
                num_cpus=max(available_cores(), num_cpus),
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=level,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot reach Ray at '{address}': {error}; start the cluster, or omit --address to run locally"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray's own handler exits at once
            signal.signal(signal.SIGTERM, on_sigterm)


def workers_take_gpus(accelerator: str) -> bool:
    """Return True if each worker gets a GPU, by `training.accelerator` or the cluster's GPUs."""
    import ray

    return accelerator == "gpu" or (accelerator == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)


def ray_is_up() -> bool:
    """Return True if this process is connected to a cluster."""
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def stop_ray() -> None:
    """Leave the cluster, or stop the local one; do nothing if there is none.

    Without this call, the process takes ten seconds longer to exit.
    """
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
