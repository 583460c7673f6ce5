"""Entry point of `advtrain` and `python -m pipelines`."""

from __future__ import annotations

import errno
import os
import sys
import threading
import traceback
from types import ModuleType

from advtrain.environment import prepare_home
from advtrain.errors import UserError
from advtrain.text import printable
from pipelines.cli.app import app, verbosity

# Each import adds its commands.
# isort: off
from pipelines.cli import training  # noqa: F401
from pipelines.cli import data  # noqa: F401
from pipelines.cli import search  # noqa: F401
from pipelines.cli import evaluation  # noqa: F401
from pipelines.cli import registry  # noqa: F401
from pipelines.cli import cluster  # noqa: F401
# isort: on


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code; print a UserError without a traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as in `advtrain recipes >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
    try:
        prepare_home()
        app(arguments)
    except UserError as error:
        if verbosity.verbose:
            traceback.print_exception(error)
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"'{error.filename}'" if error.filename else "a file"
        print(
            f"error: cannot write {where}: {error.strerror}; make room, then repeat the command, or "
            "resume the run with --resume",
            file=sys.stderr,
        )
        sys.exit(1)
    finally:
        if "advtrain.cluster" in sys.modules:
            _leave_ray(sys.modules["advtrain.cluster"])


def _leave_ray(module: ModuleType) -> None:
    """Leave Ray, or end the process at once if an interrupted training still waits in it.

    Ray can crash if it is shut down while a thread waits for a result. A local Ray ends with this process.
    """
    ended = sys.exc_info()[1]
    is_waiting = any(thread.name == "training" for thread in threading.enumerate())
    if is_waiting and isinstance(ended, SystemExit) and module.ray_is_up():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    module.stop_ray()
