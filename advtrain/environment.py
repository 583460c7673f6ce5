"""Environment of a run: library versions, git commit, machine, memory allocation."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import stat
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from advtrain.errors import UserError

logger = logging.getLogger(__name__)

LIBRARIES = ("advtrain", "torch", "torchvision", "ray", "mlflow", "numpy", "pydantic", "safetensors")
#: Variables that torchrun sets for its processes.
_LAUNCHER = re.compile(
    "(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


def library_versions(model: str = "", others: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of each library that affects results.

    Args:
        model: name of the network; timm:NAME adds timm, and hf:NAME transformers.
        others: more libraries.
    """
    versions = {"python": platform.python_version()}
    source = {"timm": "timm", "hf": "transformers"}.get(model.partition(":")[0])
    for name in [*LIBRARIES, *([source] if source and ":" in model else []), *others]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def has_ray_token() -> bool:
    """Return True if the user has a token for Ray clusters."""
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return given or (Path.home() / ".ray" / "auth_token").is_file()


def use_ray_token() -> bool:
    """Make Ray send the user's token, if there is one; return True if it does.

    $RAY_AUTH_MODE is set, unless the user has set it. If Ray has read it before, it must read it again.
    """
    if has_ray_token() and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def code_digest() -> str:
    """Return 12 hexadecimal digits of a hash of this library's source.

    Any change of the source may change results.
    """
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def git_state(folder: Path | None = None) -> dict[str, str]:
    """Return {"commit": ..., "dirty": "true" | "false"} of the project in a folder, or {}.

    The library's own state is in `library_versions` and `code_digest`. No program that the project's git configuration
    names is run: no monitor, no hook and no filter.

    Args:
        folder: folder in the project; None: the working folder.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments],
            cwd=folder or Path.cwd(),
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        keys = [
            key for key in git("config", "--list", "--name-only").split("\n") if key.startswith("filter.")
        ]
        off = [
            f"{key.rpartition('.')[0]}.{name}"
            for key in keys
            for name in ("clean=", "process=", "required=false")
        ]
        options = [word for setting in dict.fromkeys(off) for word in ("-c", setting)]
        changed = git(*options, "status", "--porcelain", "--ignore-submodules=all")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "dirty": str(bool(changed)).lower()}


def available_cores() -> int:
    """Return the number of cores that this process may use, at most a container's CPU limit."""
    from joblib import cpu_count  # affinity, and the CPU quota of a control group, rounded up

    count = getattr(os, "process_cpu_count", os.cpu_count)()  # Python 3.13: $PYTHON_CPU_COUNT
    return min(int(cpu_count()), count or 1)


def bypass_proxy_for_loopback() -> None:
    """Add this machine to $NO_PROXY: a proxy cannot reach a server on our loopback interface."""
    if not any(
        os.environ.get(name)
        for kind in ("http", "https", "all")
        for name in (f"{kind}_proxy", f"{kind}_proxy".upper())
    ):
        return
    before = (
        os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    )  # libraries read them in this order
    hosts = [host.strip() for host in before.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += [host for host in ("localhost", "127.0.0.1", "::1") if host not in hosts]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


def private_folder(remedy: str, parent: str = "/tmp") -> Path:  # noqa: S108 (short, and checked to be ours)
    """Return the folder advtrain-UID, which only this user can access; make it if there is none.

    Args:
        remedy: what to do if the folder cannot be used, as text for the error.
        parent: folder that contains it.
    """
    folder = Path(parent) / f"advtrain-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{folder}' cannot be made ({error.strerror}); {remedy}") from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"'{folder}' must be a folder that only you can access; remove it, or {remedy}")
    return folder


def can_write(path: Path) -> bool:
    """Return True if a file can be written, or made in the nearest folder that exists."""
    # os.path.exists: Path.exists raises in a folder of another user
    return os.access(next(p for p in (path, *path.parents) if os.path.exists(p)), os.W_OK)


def prepare_home() -> None:
    """Set $HOME or $MPLCONFIGDIR if libraries cannot write to the home folder.

    MLflow cannot be imported without a home, as of a user ID without an entry in the password file.
    """
    home = Path(os.path.expanduser("~"))
    has_home = home.is_absolute() and home.is_dir()
    if has_home and all(can_write(home / place / "matplotlib") for place in (".config", ".cache")):
        return
    own = private_folder("set HOME to a folder of your own") / "home"
    own.mkdir(exist_ok=True)
    if has_home:
        os.environ.setdefault("MPLCONFIGDIR", str(own))
    else:
        os.environ["HOME"] = str(own)


def drop_launcher() -> dict[str, str]:
    """Remove the variables of torchrun from the environment, and return them.

    Ray sets the ranks of its workers itself. With $TORCHELASTIC_USE_AGENT_STORE, no worker would open the store.
    """
    names = [name for name in os.environ if _LAUNCHER.fullmatch(name)]
    return {name: os.environ.pop(name) for name in names}


def check_interfaces(backend: str, where: str = "this machine") -> None:
    """Raise a UserError if the user's setting names a network interface that does not exist.

    Args:
        backend: gloo or nccl; $GLOO_SOCKET_IFNAME or $NCCL_SOCKET_IFNAME is read.
        where: this machine, as text for the message.
    """
    name = f"{backend.upper()}_SOCKET_IFNAME"
    value = os.environ.get(name, "")
    there = sorted(psutil.net_if_addrs())
    wanted = [part.strip() for part in value.removeprefix("=").split(",") if part.strip()]
    if backend == "gloo":
        is_valid = set(wanted) <= set(there)
    elif value.startswith("="):
        is_valid = not set(wanted).isdisjoint(there)
    else:  # NCCL: prefixes; "^": all but these
        is_valid = value.startswith("^") or any(i.startswith(tuple(wanted)) for i in there) or not wanted
    if not is_valid:
        raise UserError(
            f"{name}={value} names no network interface of {where}, which has {', '.join(there)}; "
            f"unset {name}, or set it to one of them"
        )


@contextmanager
def warn_after(seconds: float, text: str | Callable[[], str]) -> Iterator[None]:
    """Log `text`, or what it returns then, as a warning if the block still runs after `seconds`."""

    def warn() -> None:
        if message := text if isinstance(text, str) else text():
            logger.warning(message)

    timer = threading.Timer(seconds, warn)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def tune_malloc() -> None:
    """Make glibc keep freed memory for later allocations in this process; else do nothing.

    By default glibc returns large blocks to the kernel, which fills each new block with zeros page by page. On a small
    network that is a good part of an attack step. Memory that a thread frees is returned sooner, and Ray Train trains
    in a thread.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 32 * 2**20)  # maximum that glibc accepts
    libc.mallopt(m_trim_threshold, 2**30)


def describe_environment(model: str = "") -> dict[str, Any]:
    """Return versions (see `library_versions`), git state and machine, for a record."""
    return {"versions": library_versions(model), "git": git_state(), "machine": platform.machine()}
