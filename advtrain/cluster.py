"""Device of this process, and the Ray cluster that it joins or starts."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from advtrain.environment import (
    available_cores,
    bypass_proxy_for_loopback,
    can_write,
    drop_launcher,
    has_ray_token,
    prepare_home,
    private_folder,
    use_ray_token,
    warn_after,
)
from advtrain.errors import UserError
from advtrain.text import reason

logger = logging.getLogger(__name__)

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


#: Seconds that a cluster has to answer before it counts as gone, and until a warning that Ray does not answer yet.
ANSWER_S, WARN_AFTER_S = 15.0, 10.0
#: Ray's error about versions, in one line.
_VERSIONS = re.compile(r"Version mismatch: .*?Ray: (\S+) Python: (\S+).*Ray: (\S+) Python: (\S+)")
#: Bytes of a Unix socket's path (macOS: 103), and what Ray adds to its temporary folder for one.
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_local = False  # whether this process started its own Ray


class SharesMemory(Protocol):
    """Object with arrays that can be replaced by those of an equal object."""

    def share_memory_of(self, equal: Any) -> None:
        """Replace the arrays by those of `equal`, which frees their memory."""


def put_shared(value: SharesMemory) -> Any:
    """Put an object into Ray's store, and make its arrays views of it; return its ObjectRef.

    The views are read-only, and remain valid after Ray has stopped.
    """
    import ray

    reference = ray.put(value)
    value.share_memory_of(ray.get(reference))
    return reference


def start_ray(address: str | None) -> None:
    """Connect to the cluster at `address`, or start one on this machine.

    A local cluster has one CPU per core (`available_cores`). If already connected, nothing is done.

    Raises:
        UserError: the cluster does not answer, or Ray cannot be started here.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    bypass_proxy_for_loopback()
    prepare_home()
    address = cluster_address(address)
    waiting = f"waiting for Ray at '{address}'" if address else "waiting for Ray to start on this machine"
    launcher = drop_launcher()  # else a local Ray's workers inherit them
    try:
        with _ray_errors(address), _own_sigterm(address), warn_after(WARN_AFTER_S, waiting):
            if address:
                address = check_answer(address)
            _init(address)
    finally:
        os.environ |= launcher  # torchrun may have started the caller


def cluster_address(given: str | None) -> str | None:
    """Return the address of the cluster: the argument, else $RAY_ADDRESS; None for a local Ray."""
    address = (given or os.environ.get("RAY_ADDRESS") or "").strip()
    return address if address not in ("", "local") else None


def check_cores(workers: int, cpus_per_worker: int, address: str | None) -> None:
    """Raise a UserError if a Ray that is started here lacks the cores that workers ask for.

    A cluster, or a Ray that is already connected, has its own check.
    """
    cores, need = available_cores(), max(1, workers) * cpus_per_worker
    if cluster_address(address) or ray_is_up() or need <= cores:
        return
    raise UserError(
        f"training.num_workers = {workers} with training.cpus_per_worker = {cpus_per_worker} needs {need} cores, but "
        f"this machine has {cores}; lower them, or name a cluster with --address"
    )


def limit_threads(number: int | None = None) -> None:
    """Set torch's number of threads (None: as it is now), at most one per core."""
    now, cores = torch.get_num_threads(), available_cores()
    if (wanted := min(number or now, cores)) != now:
        torch.set_num_threads(wanted)


def ray_is_local() -> bool:
    """Return True if this process started its own Ray, to which no node can be added."""
    return ray_is_up() and _local


def _init(address: str | None) -> None:
    """Call ray.init."""
    global _local
    import ray
    from ray.job_config import JobConfig

    class InstalledCode(JobConfig):  # type: ignore[misc]
        """Job whose workers do not search the driver's working folder first, as Ray's default is."""

        def _runtime_env_has_working_dir(self) -> bool:
            return True

    verbose = logger.isEnabledFor(logging.INFO)
    common: dict[str, Any] = {
        "job_config": InstalledCode(),
        "log_to_driver": verbose,
        "logging_level": "INFO" if verbose else "ERROR",
    }
    if address:
        ray.init(address=address, **common)
    else:
        folder = _temporary_folder()
        _prepare_token()
        ray.init(
            address="local",  # never a cluster that another user started on this machine
            num_cpus=available_cores(),
            include_dashboard=False,
            **({"_temp_dir": str(folder)} if folder else {}),
            **common,
        )
    _local = not address


def _prepare_token() -> None:
    """Set a token for a local Ray, if there is none and Ray cannot write one to the home folder."""
    if not has_ray_token() and not can_write(Path.home() / ".ray" / "auth_token"):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _temporary_folder() -> Path | None:
    """Return a folder for Ray's files, or None if Ray's own choice can be used."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    given = Path(os.environ[name] if name else "/tmp")  # noqa: S108 (as Ray chooses)
    length = len(os.fsencode(os.path.abspath(given) + _SOCKET))
    place = given / "ray" if (given / "ray").exists() else given
    if length <= _SOCKET_BYTES and given.is_absolute() and os.access(place, os.W_OK | os.X_OK):
        return None
    # a folder inside: Ray opens it to all users
    folder = private_folder("set RAY_TMPDIR to a folder of your own, of at most 38 characters") / "ray"
    why = f"is too long for Ray's sockets ({length} of {_SOCKET_BYTES} bytes)"
    if length <= _SOCKET_BYTES:
        why = "is not a folder that can be written"
    logger.warning("%s '%s' %s; Ray uses '%s'", name or "the folder", given, why, folder)
    return folder


def check_answer(address: str) -> str:
    """Return HOST:PORT of the Ray head; raise an error if none answers.

    Without this check, ray.init waits two minutes and then ends the process. If the head requires a token, Ray will
    send the user's. Otherwise Ray must not send it, because workers of a cluster without tokens could not answer a
    process that requires one. With TLS the head is not asked.

    Raises:
        ConnectionError: nothing answers, it is no Ray head, or it requires a token and there is none.
        ValueError: the address is of another kind.
    """
    import grpc
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import Config  # type: ignore[attr-defined]

    if "://" in address:  # Ray Client is not meant for training
        raise ValueError(
            "an address is HOST:PORT or auto, on a node of the cluster; elsewhere use `advtrain submit COMMAND`"
        )
    try:
        target = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError) as error:
        raise ValueError(
            "no Ray runs on this machine" if address == "auto" else "an address is HOST:PORT or auto"
        ) from error
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return str(target)  # needs the cluster's certificates
    with grpc.insecure_channel(target, options=(("grpc.enable_http_proxy", 0),)) as channel:
        is_alive = channel.unary_unary(
            "/ray.rpc.NodeInfoGcsService/CheckAlive", lambda _: b"", lambda reply: reply
        )
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
            is_alive(None, timeout=ANSWER_S)
        except grpc.FutureTimeoutError as error:
            raise ConnectionError(f"nothing that speaks Ray's protocol answers at {target}") from error
        except grpc.RpcError as error:  # other errors are left to Ray
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise ConnectionError(f"{target} is not the port of a Ray head (default: 6379)") from error
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                if not use_ray_token():
                    raise ConnectionError(
                        f"{target} requires the cluster's token; write it to ~/.ray/auth_token or set "
                        "RAY_AUTH_TOKEN_PATH to its file, and unset RAY_AUTH_MODE"
                    ) from error
                Config.initialize("")
    return str(target)


@contextmanager
def _ray_errors(address: str | None) -> Iterator[None]:
    """Convert what ray.init raises into one UserError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) or (isinstance(error, SystemExit) and not address):
            raise
        first = " ".join(str(error).split())[:300]
        if versions := _VERSIONS.search(first):
            theirs, their_python, ours, our_python = versions.groups()
            raise UserError(
                f"the cluster at '{address}' has Ray {theirs} and Python {their_python}, this process has Ray {ours} "
                f"and Python {our_python}; install the same versions on both, or run the command there with "
                "`advtrain submit`"
            ) from error
        if isinstance(error, SystemExit):  # Ray's, after a signal
            first = "ended while connecting"
        if address:
            raise UserError(
                f"cannot reach Ray at '{address}': {first}; start the cluster, or omit --address and unset "
                "RAY_ADDRESS to run locally"
            ) from error
        raise UserError(f"Ray could not be started on this machine: {reason(error)}") from error


@contextmanager
def _own_sigterm(address: str | None) -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray's own exits at once.

    Raises:
        KeyboardInterrupt: SIGTERM came while a local Ray was starting, and the caller has a handler of its own.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM and callable(before) and not address:
            raise KeyboardInterrupt from error
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def build_actor_class(kind: type, *, on_gpu: bool) -> Any:
    """Return the Ray actor class of `kind`.

    Each actor has one GPU or one core. Ray restarts an actor that dies, and retries its task.
    """
    import ray

    resources = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_cpus": 1}
    return ray.remote(max_restarts=5, max_task_retries=5, **resources)(kind)


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
    global _local
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
        _local = False
