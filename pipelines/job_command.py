"""Command of a job: what it lacks, its id, its runtime environment, and its start."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advtrain.documents import read_yaml
from advtrain.errors import UserError
from advtrain.recipe import Recipe, load_recipe
from advtrain.recipe.data import TEXT_FILES, TORCHVISION_FILES
from advtrain.recipe.sections import STATE_DICTS
from advtrain.runs.object_store import WHICH_STORE, is_uri
from advtrain.tracking.store import has_password
from advtrain.user_paths import expand
from pipelines.upload import uploaded_files

#: Commands that run with `--once`, so that a resubmitted job resumes its run or campaign.
ONCE = ("train", "tune")
#: Commands that can run as jobs, and those that need a folder of runs.
SUBMITTABLE = (*ONCE, "evaluate", "promote", "compare", "predict", "doctor")
NEED_RUNS = (*ONCE, "evaluate", "compare", "doctor")
#: Seconds that a stopped job has to save a checkpoint before Ray kills it (Ray's own default is 3).
STOP_WAIT_S = 300
#: Environment variables passed to the job. None of them is a secret, since Ray shows them to everyone.
PASSED_ON = ("MLFLOW_TRACKING_URI", "ADVTRAIN_DATA_ROOT", *WHICH_STORE)
#: Names of variables that hold secrets.
_SECRET = re.compile(
    "(^|_)(PASSWORD|PASSWD|TOKEN|SECRET|API_KEY|ACCESS_KEY|STORAGE_KEY|CREDENTIALS)$", re.IGNORECASE
)
_ON_NODES = (
    "a job would show it to everyone; set variables such as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on "
    "the cluster's nodes instead"
)
#: Shell command of a job: it runs the first Python that has advtrain and its libraries. The last candidate is the one
#: that Ray's own workers run, which may not be on the PATH: the raylet has started them and this shell's parent.
START = """\
raylet=$(sed -n 's/^PPid:[^0-9]*//p' /proc/$PPID/status 2>/dev/null); \
ray=$(cat "/proc/$raylet/cmdline" 2>/dev/null | tr '\\0' '\\n' \
| sed -n 's/^--python_worker_command=\\([^ ]*\\).*/\\1/p'); \
for p in python python3 "$ray"; do "$p" -c 'import sys; from importlib.util import find_spec as f; \
sys.exit(not all(map(f, ("advtrain", "pipelines", "torch", "ray", "mlflow"))))' 2>/dev/null \
&& exec "$p" -m pipelines {words}; done; \
echo "error: no Python on $(hostname) has advtrain with torch, Ray and MLflow (tried: python python3 $ray); \
install advtrain on the cluster, or name an environment that has it with --runtime-env"; exit 2"""


def with_runs(words: Sequence[str]) -> list[str]:
    """Add to the command the `--runs` of $ADVTRAIN_RUNS, if it needs one and has none."""
    runs = os.environ.get("ADVTRAIN_RUNS")
    if not words or words[0] not in NEED_RUNS or not runs or _option(words, "--runs") is not None:
        return list(words)
    return [*words, "--runs", expand(runs, "$ADVTRAIN_RUNS")]


def find_problems(words: Sequence[str]) -> list[str]:
    """Return what keeps a command from running on another machine, each with its remedy.

    Those are results that would be deleted, a store that the cluster cannot reach, and passwords that all would see.
    """
    found = []
    runs = _option(words, "--runs")
    if words[0] in NEED_RUNS and not (is_uri(runs or "") or Path(runs or "").is_absolute()):
        given = f" (got '{runs}')" if runs else ""
        found.append(
            "Ray deletes a job's working folder: name a shared folder or an object store with --runs or "
            f"$ADVTRAIN_RUNS, as --runs /mnt/runs or --runs s3://BUCKET/runs{given}"
        )
    uri = _option(words, "--tracking-uri") or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None or re.match(r"sqlite:///[^/]", uri):
        found.append(
            "Ray deletes a job's working folder: name an MLflow server with --tracking-uri or $MLFLOW_TRACKING_URI"
        )
    for word in words:
        option, equals, value = word.partition("=")
        is_option = equals and option.startswith("--")
        found += _password(option, value) if is_option else _password("an argument", word)
    for name, value in _variables().items():
        found += _password(f"${name}", value)
    return found


def missing_data(words: Sequence[str], env: dict[str, Any]) -> str:
    """Return a warning if a training's data is not sent and no data root is named; else "".

    Args:
        words: command.
        env: runtime environment of the job.
    """
    if words[0] != "train" or _option(words, "--data-root") or "ADVTRAIN_DATA_ROOT" in env["env_vars"]:
        return ""
    folder = Path(env["working_dir"])
    recipe = _recipe(words, folder)
    data = None if recipe is None else recipe.data
    built_in = TORCHVISION_FILES | TEXT_FILES
    if data is None or (data.path is None and (data.source not in built_in or data.download)):
        return ""
    place = os.path.normpath(os.path.join("data", data.path or TEXT_FILES.get(data.source, "")))
    if place.startswith("/") or (data.path or "").startswith(("~", "$")):
        return ""
    if any(f"{name}/".startswith(f"{place}/") for name in uploaded_files(folder)):
        return ""
    return (
        f"'{place}' is not sent with the job: unless the nodes set $ADVTRAIN_DATA_ROOT, name the data's folder on the "
        "cluster with --data-root"
    )


def missing_weights(words: Sequence[str], env: dict[str, Any]) -> str:
    """Return a warning if a training starts from a file that is not sent; else "".

    Args:
        words: command.
        env: runtime environment of the job.
    """
    folder = Path(env["working_dir"])
    recipe = _recipe(words, folder) if words[0] == "train" else None
    place = os.path.normpath((recipe.model.from_ if recipe is not None else None) or "")
    is_file = place.endswith(STATE_DICTS) and not place.startswith(("/", "~", "$"))
    if not is_file or place in uploaded_files(folder):
        return ""
    return f"model.from '{place}' is not sent with the job: name a file that the cluster can read, a run or a version"


def _recipe(words: Sequence[str], folder: Path) -> Recipe | None:
    """Return the recipe of a command; None if it cannot be read, which the job reports."""
    places = [Path(__file__).parent / "recipes" / f"{word}.yaml" for word in words[1:]]
    files = [file for file in (*(folder / word for word in words[1:]), *places) if file.is_file()]
    changes = [value for option, value in zip(words, words[1:], strict=False) if option == "--set"]
    changes += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    try:
        return load_recipe(files[0], changes, allow_code=True) if files else None
    except UserError:
        return None


def _password(where: str, value: str) -> list[str]:
    if "://" not in value or not has_password(value):
        return []
    return [f"{where} holds a password; {_ON_NODES}"]


def raise_all(problems: Sequence[str]) -> None:
    """Raise a UserError that names all problems; do nothing if there is none."""
    distinct = list(dict.fromkeys(problems))
    if len(distinct) == 1:
        raise UserError(distinct[0])
    if distinct:
        raise UserError(
            f"the job lacks {len(distinct)} things:" + "".join(f"\n- {each}" for each in distinct)
        )


def _option(words: Sequence[str], name: str) -> str | None:
    """Return the value of an option, written as `--runs DIR` or `--runs=DIR`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def submission_id(words: Sequence[str], again: str = "") -> str:
    """Return the job id of a command: readable, and equal for equal `words` and `again`."""
    first = re.sub(r"[^A-Za-z0-9]+", "-", Path(words[1]).stem if len(words) > 1 else "").strip("-")
    digest = hashlib.sha256(json.dumps([list(words), again]).encode()).hexdigest()[:10]
    return "-".join(part for part in ("advtrain", words[0], first[:40], digest) if part)


def entrypoint(words: Sequence[str], job: str) -> str:
    """Return the shell command that the cluster runs."""
    once = ["--once", job] if words[0] in ONCE and "--resume" not in words else []
    return START.format(words=shlex.join([*words, *once]))


def _variables() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def runtime_env(folder: Path, file: Path | None = None) -> dict[str, Any]:
    """Return Ray's runtime environment of a job.

    It holds the working tree, the variables that are passed on, and the user's settings. Ray shows the variables to
    everyone, so secrets are set on the cluster's nodes.

    Args:
        folder: working tree.
        file: YAML file with further settings of Ray, such as `pip`; None: no further ones.

    Raises:
        UserError: Ray refuses the file, or the file sets the working tree or holds a secret.
    """
    given = {} if file is None else _read_runtime_env(file)
    own = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "PYTHONUNBUFFERED": "1"}
    return given | {
        "working_dir": str(folder),
        "env_vars": _variables() | (given.get("env_vars") or {}) | own,
    }


def _read_runtime_env(file: Path) -> dict[str, Any]:
    from ray.runtime_env import RuntimeEnv

    given = read_yaml(file, "runtime environment")
    if not isinstance(given, dict):
        raise UserError(f"{file}: a runtime environment is a map, as `pip: [advtrain]`")
    if "working_dir" in given:
        raise UserError(
            f"{file}: working_dir is set by submit; remove it, and name the folder with --working-dir"
        )
    variables = given.get("env_vars") or {}
    if isinstance(variables, dict):
        for name, value in variables.items():
            if isinstance(value, int | float) and not isinstance(value, bool):  # YAML reads 4 as a number
                variables[name] = str(value)
        secret = [name for name in variables if _SECRET.search(str(name))]
        problems = [f"{file}: env_vars.{name} looks like a secret; {_ON_NODES}" for name in secret]
        problems += [p for n, v in variables.items() for p in _password(f"{file}: env_vars.{n}", str(v))]
        raise_all(problems)
    try:
        RuntimeEnv(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error
    return given
