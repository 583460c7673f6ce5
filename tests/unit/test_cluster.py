"""Start of Ray: cores, temporary folder, addresses that do not answer, proxies."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
import torch
from ray._private import services
from ray._private.utils import check_version_info

from advtrain import cluster
from advtrain.cluster import check_cores, limit_threads, start_ray
from advtrain.environment import bypass_proxy_for_loopback, warn_after
from advtrain.errors import UserError
from advtrain.training.on_ray import _check_resources, _why_waiting
from tests.kit import digits_recipe
from tests.servers import free_port


@pytest.fixture
def started(monkeypatch) -> list[dict[str, Any]]:
    """Replace ray.init; return the arguments of its calls."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(cluster, "available_cores", lambda: 2)
    monkeypatch.setattr(cluster, "_local", False)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("workers", "each", "fits"),
    [(0, 1, True), (2, 1, True), (1, 2, True), (3, 1, False), (0, 64, False), (2, 64, False), (2, 2, False)],
)
def test_check_cores_rejects_workers_that_need_more_cores(started, workers, each, fits):
    message = f"needs {max(1, workers) * each} cores, but this machine has 2; .*--address"
    with nullcontext() if fits else pytest.raises(UserError, match=message):
        check_cores(workers, each, None)


def test_check_cores_leaves_a_cluster_alone(started, monkeypatch):
    check_cores(2, 64, "head:6379")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    check_cores(2, 64, None)


@pytest.mark.parametrize("address", [None, "local", ""])
def test_start_ray_claims_the_cores_of_the_machine(started, address):
    start_ray(address)
    assert (started[0]["num_cpus"], started[0]["address"]) == (2, "local")


@pytest.mark.parametrize(
    ("given", "has_file", "is_writable", "is_made"),
    [
        (None, False, False, True),
        (None, False, True, False),
        (None, True, False, False),
        ("RAY_AUTH_TOKEN", False, False, False),
        ("RAY_AUTH_TOKEN_PATH", False, False, False),
    ],
)
def test_start_ray_makes_a_token_if_ray_cannot(
    started, monkeypatch, tmp_path, given, has_file, is_writable, is_made
):
    monkeypatch.setattr(cluster, "can_write", lambda path: is_writable)
    for name in ("HOME", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} - {given}:
        monkeypatch.delenv(name)
    if has_file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    start_ray(None)
    assert (len(os.environ.get("RAY_AUTH_TOKEN", "")) == 64) == is_made


def test_start_ray_hides_the_variables_of_torchrun(started, monkeypatch):
    inside = []
    monkeypatch.setattr(ray, "init", lambda **kwargs: inside.append(dict(os.environ)))
    for name in ("RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    start_ray(None)
    assert not {"RANK", "TORCHELASTIC_USE_AGENT_STORE"} & set(inside[0])
    assert os.environ["RANK"] == "1"


@pytest.mark.parametrize(("cores", "number", "threads"), [(8, None, 4), (2, None, 2), (8, 3, 3), (2, 64, 2)])
def test_limit_threads_sets_at_most_one_per_core(monkeypatch, cores, number, threads):
    monkeypatch.setattr(cluster, "available_cores", lambda: cores)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        limit_threads(number)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("settings", "gpu", "have", "local", "message"),
    [
        (["training.num_workers=2"], False, {"CPU": 2}, False, None),
        (["training.num_workers=[2, 9]"], False, {"CPU": 2}, True, None),
        (["training.num_workers=3"], False, {"CPU": 2}, False, "needs 3 CPUs, but the cluster has 2; .*autoscaler"),
        (["training.num_workers=3", "training.accelerator=cpu"], False, {"CPU": 2}, False, None),
        (["training.num_workers=3", "training.accelerator=cpu"], False, {"CPU": 2}, True, "needs 3 CPUs.*--address"),
        (["training.num_workers=1", "training.accelerator=gpu"], True, {"CPU": 8}, True, "needs 1 GPU.*--address"),
        (["training.num_workers=1", "training.cpus_per_worker=64"], True, {"GPU": 1, "CPU": 8}, False, "64 CPUs"),
        (["training.num_workers=2"], True, {"GPU": 1, "CPU": 8}, False, "needs 2 GPUs, but the cluster has 1"),
    ],
)  # fmt: skip
def test_check_resources_waits_only_where_nodes_can_come(monkeypatch, settings, gpu, have, local, message):
    monkeypatch.setattr("advtrain.training.on_ray.ray_is_local", lambda: local)
    recipe = digits_recipe(*settings)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        _check_resources(recipe, gpu, have)


def test_start_ray_replaces_temporary_folder_that_is_too_long(started, monkeypatch, tmp_path, caplog):
    start_ray(None)
    assert "_temp_dir" not in started[0]
    long = tmp_path / ("slurm_jobdir" * 8)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    start_ray(None)
    folder = started[1]["_temp_dir"]
    assert folder == f"/tmp/advtrain-{os.getuid()}/ray"
    assert f"RAY_TMPDIR '{long}' is too long" in caplog.text
    assert folder in caplog.text


def test_start_ray_names_error_of_local_start(started, monkeypatch):
    def fail(**kwargs: Any) -> None:
        raise OSError("no room in\n/dev/shm")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(UserError, match="could not be started on this machine: OSError: no room in /dev/shm"):
        start_ray(None)


def test_start_ray_names_address_that_does_not_answer(started, monkeypatch, caplog):
    monkeypatch.setattr(cluster, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, but is no Ray
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot reach Ray at '{address}'.* unset RAY_ADDRESS"):
            start_ray(address)
    for given in (address, "http://head:8265", "ray://head:10001", "nonsense"):
        with pytest.raises(UserError, match=f"cannot reach Ray at '{given}'"):
            start_ray(given)
    assert not started


def test_start_ray_turns_exit_of_ray_into_error(started, monkeypatch):
    def leave(**kwargs: Any) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray, "init", leave)
    monkeypatch.setattr(cluster, "check_answer", lambda address: address)
    with pytest.raises(UserError, match="cannot reach Ray at 'head:6379': ended while connecting"):
        start_ray("head:6379")


@pytest.mark.parametrize(
    ("handler", "error"), [(lambda *_: None, KeyboardInterrupt), (signal.SIG_DFL, SystemExit)]
)
def test_start_ray_interrupts_on_sigterm_during_local_start(started, monkeypatch, handler, error):
    def leave(**kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ray, "init", leave)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(error):
            start_ray(None)
        assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_start_ray_names_both_versions_of_a_mismatch(started, monkeypatch):
    def differ(**kwargs: Any) -> None:
        check_version_info({"ray_version": "2.50.0", "python_version": "3.9.1"}, "node 10.0.0.1")

    monkeypatch.setattr(ray, "init", differ)
    monkeypatch.setattr(cluster, "check_answer", lambda address: address)
    message = (
        f"'head:6379' has Ray 2.50.0 and Python 3.9.1, this process has Ray {ray.__version__} and Python 3"
    )
    with pytest.raises(UserError, match=message):
        start_ray("head:6379")


@pytest.mark.parametrize("is_left", [True, False])
def test_start_ray_names_leftover_address_of_auto(started, monkeypatch, tmp_path, is_left):
    monkeypatch.setattr(cluster, "ANSWER_S", 0.3)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    port = free_port()
    if is_left:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    message = f"'auto': nothing .* answers at .*:{port}" if is_left else "'auto': no Ray runs on this machine"
    with pytest.raises(UserError, match=message):
        start_ray("auto")
    start_ray(None)  # ignores the leftover
    assert [call["address"] for call in started] == ["local"]


def test_start_ray_rejects_port_of_another_grpc_server(started):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        with pytest.raises(UserError, match=f":{port} is not the port of a Ray head"):
            start_ray(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


@pytest.fixture
def head(monkeypatch, tmp_path) -> Iterator[Callable[[bool], str]]:
    """Return a function that starts a server that answers like a Ray head; there is no token but the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    server = grpc.server(ThreadPoolExecutor(1))

    def start(requires_token: bool) -> str:
        def is_alive(request: bytes, context: grpc.ServicerContext) -> bytes:
            if requires_token:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        methods = {"CheckAlive": grpc.unary_unary_rpc_method_handler(is_alive)}
        service = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", methods)
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("0.0.0.0:0")
        server.start()
        return f"127.0.0.1:{port}"

    monkeypatch.setattr("ray._raylet.Config", SimpleNamespace(initialize=lambda text: None))
    yield start
    server.stop(None)


@pytest.mark.parametrize(
    ("requires_token", "token", "mode", "expected"),
    [
        (True, "file", None, "token"),
        (True, "RAY_AUTH_TOKEN", None, "token"),
        (True, "RAY_AUTH_TOKEN_PATH", None, "token"),
        (True, None, "token", "token"),
        (False, "file", None, None),
        (False, "file", "token", "token"),
        (False, None, None, None),
    ],
)
def test_start_ray_sends_token_if_head_requires_it(
    started, head, monkeypatch, tmp_path, requires_token, token, mode, expected
):
    if token == "file":  # noqa: S105
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    elif token:
        monkeypatch.setenv(token, str(tmp_path / "token"))
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    start_ray(head(requires_token))
    assert os.environ.get("RAY_AUTH_MODE") == expected
    assert len(started) == 1


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_start_ray_names_missing_token(started, head, monkeypatch, mode):
    if mode:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(
        UserError, match="requires the cluster's token; .* RAY_AUTH_TOKEN_PATH .*RAY_AUTH_MODE"
    ):
        start_ray(head(True))
    assert not started


@pytest.mark.parametrize("use_gpu", [True, False])
def test_training_names_free_resources_if_no_worker_starts(monkeypatch, caplog, use_gpu):
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0, "memory": 1e9})
    recipe = digits_recipe("training.num_workers=[2, 4]")
    free = "0 GPUs and 1 CPUs" if use_gpu else "1 CPUs"
    with warn_after(0.01, lambda: _why_waiting(recipe, use_gpu, 0)):
        time.sleep(0.2)
    assert caplog.messages == [f"waiting for 2 workers: {free} are free on the cluster"]
    assert _why_waiting(recipe, use_gpu, 1) == ""


@pytest.mark.parametrize("address", [None, "head:6379"])
def test_start_ray_says_what_it_waits_for(started, monkeypatch, caplog, address):
    monkeypatch.setattr(cluster, "WARN_AFTER_S", 0.05)
    monkeypatch.setattr(cluster, "check_answer", lambda address: address)
    monkeypatch.setattr(ray, "init", lambda **kwargs: time.sleep(0.3))
    start_ray(address)
    assert caplog.messages == [
        f"waiting for Ray {'at ' + repr(address) if address else 'to start on this machine'}"
    ]


@pytest.mark.parametrize("before", [None, "internal.example", "*"])
def test_loopback_bypasses_proxy(monkeypatch, before):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "")  # restored after the test
    monkeypatch.setenv("NO_PROXY", "")
    bypass_proxy_for_loopback()
    assert os.environ["no_proxy"] == ""
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    if before:
        monkeypatch.setenv("NO_PROXY", before)
    bypass_proxy_for_loopback()
    bypass_proxy_for_loopback()
    hosts = {None: "", "internal.example": "internal.example,", "*": "*"}[before]
    assert os.environ["no_proxy"] == (hosts if before == "*" else f"{hosts}localhost,127.0.0.1,::1")
