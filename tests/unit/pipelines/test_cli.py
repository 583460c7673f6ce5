"""Options that every command has: help, version, verbosity, JSON, and completion in the shell."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import typer
from typer.testing import CliRunner

from advtrain.events import EvaluationTick, Message, Output
from pipelines.cli.app import GROUPS, reporting, verbosity
from pipelines.cli.console import console, table
from pipelines.cli.main import app
from tests.kit import run_here, user_environment

COMMANDS = typer.main.get_command(app).commands

#: Commands without --json: submit passes its options on to the job.
WITHOUT_JSON = {"submit"}


@pytest.fixture(autouse=True)
def plain_verbosity(monkeypatch):
    """Restore what --quiet, --verbose and --json change in this process."""
    monkeypatch.setattr(console, "stderr", False)
    before = logging.root.level, list(logging.root.handlers)
    yield
    verbosity.quiet = verbosity.verbose = False
    logging.root.level, logging.root.handlers[:] = before


@pytest.fixture
def python():
    """Run Python code in a new process; return its output."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=user_environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_commands_give_a_home_to_a_user_without_one(python):
    code = """
import os, pwd
from pathlib import Path

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
os.environ.pop("HOME", None)
from pipelines.cli.main import main
try:
    main(["--version"])
except SystemExit:
    print(Path.home())
"""
    assert python(code).splitlines()[-1] == f"/tmp/advtrain-{os.getuid()}/home"


@pytest.mark.parametrize("is_waiting", [True, False])
def test_interrupted_command_ends_at_once_only_if_training_waits_in_ray(python, is_waiting):
    code = f"""
import threading
from advtrain import cluster
from pipelines.cli import main

def end(arguments):
    if {is_waiting}:
        threading.Thread(target=threading.Event().wait, name="training", daemon=True).start()
    raise SystemExit(0)

main.app = end
cluster.ray_is_up = lambda: True
cluster.stop_ray = lambda: print("left Ray")
main.main([])
"""
    assert python(code) == ("" if is_waiting else "left Ray\n")


def test_help_version_recipes_and_show_import_no_torch_ray_or_mlflow(python):
    some = ("train", "evaluate", "promote", "submit")
    calls = [["--help"], ["--version"], ["recipes"], ["show", "digits"], *([name, "--help"] for name in some)]
    code = f"""
import sys
from pipelines.cli.main import main
for words in {calls}:
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
    loaded = {{"torch", "ray", "mlflow"}} & set(sys.modules)
    assert not loaded, (words, loaded)
print("checked", {len(calls)})
"""
    assert f"checked {len(calls)}" in python(code)


@pytest.mark.parametrize("words", [["-h"], ["train", "-h"], ["models", "-h"], ["submit", "-h"]])
def test_short_help_option_equals_long_one(words):
    short, long = (CliRunner().invoke(app, [*words[:-1], option]) for option in ("-h", "--help"))
    assert short.exit_code == 0
    assert short.output == long.output


def test_help_lists_every_command_in_a_group():
    assert set(COMMANDS) <= {name for names in GROUPS.values() for name in names}
    lines = CliRunner().invoke(app, ["--help"]).output.splitlines()
    assert lines.index("Train:") < lines.index("Search and compare:") < lines.index("Cluster and machine:")
    shown = [words[0] for line in lines if line.startswith("  ") and (words := line.split())]
    assert shown.index("train") < shown.index("tune") < shown.index("doctor")


def test_version_names_the_libraries(capsys):
    assert run_here("--version") == 0
    first, rest = capsys.readouterr().out.splitlines()
    assert first.startswith("advtrain 0.")
    assert all(f"{name} " in rest for name in ("python", "torch", "ray", "mlflow"))


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - WITHOUT_JSON))
def test_command_takes_json_and_verbosity(name):
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {"--json", "--quiet", "-q", "--verbose", "-v"} <= options


def test_recipes_write_json_to_standard_output(capsys):
    assert run_here("recipes", "--json", "-") == 0
    out, err = capsys.readouterr()
    digits = next(each for each in json.loads(out) if each["recipe"] == "digits")
    assert digits["model"] == "cnn2"
    assert digits["threat"] == "linf:0.1"
    assert "digits" in err, "the text goes to standard error"


def test_show_writes_json_to_a_file(tmp_path):
    assert run_here("show", "digits", "--json", str(tmp_path / "r.json")) == 0
    rows = {each["path"]: each for each in json.loads((tmp_path / "r.json").read_text())}
    assert rows["training.epochs"]["value"] == 20
    assert rows["training.epochs"]["meaning"]


@pytest.mark.parametrize("words", [["-q", "recipes"], ["recipes", "-q"], ["recipes", "--quiet"]])
def test_quiet_is_accepted_before_and_after_the_command(words):
    assert run_here(*words) == 0
    assert (verbosity.quiet, verbosity.verbose) == (True, False)


def test_verbosity_of_one_call_ends_with_it():
    run_here("recipes", "-q")
    run_here("recipes")
    assert not verbosity.quiet


def test_quiet_prints_warnings_errors_and_job_output_only(capsys):
    verbosity.quiet = True
    with reporting() as progress:
        for event in (Message("plain"), Message("noted", "note"), EvaluationTick("apgd", 1, 2)):
            progress(event)
        for event in (Message("rounded", "warning"), Message("broken", "error"), Output("a job's line\n")):
            progress(event)
    assert capsys.readouterr().out.splitlines() == ["warning: rounded", "broken", "a job's line"]


def test_time_of_a_long_evaluation_is_printed_at_once(capsys):
    with reporting() as progress:
        for seconds in (2.0, 600.0, 590.0):
            progress(EvaluationTick("apgd-ce", 1, 9, seconds))
    assert capsys.readouterr().out.splitlines() == ["apgd-ce: 1 of 9 blocks, attacks: about 10:00 left"]


def test_quiet_and_verbose_exclude_each_other(capsys):
    assert run_here("-q", "recipes", "-v") == 2
    assert "exclude each other" in capsys.readouterr().err


def test_verbose_shows_logs_library_warnings_and_the_cause_of_an_error(capsys):
    with warnings.catch_warnings(record=True) as seen:
        assert run_here("show", "digit", "-v") == 2
        warnings.warn("from a library", UserWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["from a library"]
    assert logging.getLogger("advtrain").isEnabledFor(logging.INFO)
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("error: ")


def test_library_warnings_are_hidden_by_default(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as seen:
        run_here("recipes")
        warnings.warn("from a library", UserWarning, stacklevel=1)
    assert seen == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("advtrain tr", ["train"]),
        ("advtrain train di", ["diabetes", "digits"]),
        ("advtrain show mi", ["mine.yaml"]),
        ("advtrain tune digits_", ["digits_quick"]),
        ("advtrain compare lo", ["losses"]),
        ("advtrain promote name --policy no", ["not_worse"]),
        ("advtrain train --resume di", ["digits-1"]),
        ("advtrain evaluate --runs elsewhere oth", ["other-1"]),
        ("advtrain tune --resume se", ["search-1"]),
    ],
)
def test_completion_knows_commands_files_and_runs(line, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVTRAIN_RUNS", raising=False)
    (tmp_path / "mine.yaml").touch()
    for place in ("runs/digits-1/run.json", "elsewhere/other-1/run.json", "runs/search-1/campaign.json"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch()
    number = str(len(line.split()) - 1)
    variables = {"_ADVTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": number}
    assert CliRunner().invoke(app, [], prog_name="advtrain", env=variables).output.split() == found


@pytest.mark.parametrize(
    ("name", "suggested"),
    [("digts.yaml", "digits"), ("min.yaml", "mine.yaml"), ("mine.yml", "mine.yaml"), ("digts", "digits")],
)
def test_missing_recipe_file_suggests_the_nearest_name(name, suggested, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    assert run_here("show", name) == 2
    assert f"did you mean '{suggested}'?" in capsys.readouterr().err


def test_missing_keys_of_a_recipe_are_named_in_one_line(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("name: r\ndata: {source: digits}\nmodel: {}\nsede: 1\n")
    assert run_here("show", str(tmp_path / "r.yaml")) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert (
        "'model.name', 'adversary', 'objective', 'optimizer', 'training', 'evaluation' are missing" in first
    )
    assert "unknown key 'sede'; did you mean 'seed'?" in second


def test_console_prints_paths_and_names_as_they_are(capsys):
    name = "a [b]x[/b] :b: {y} \\[z] %20#"
    console.print(f"report: {name}")
    table(name, ["[b]column"], [[name]])
    shown = capsys.readouterr().out
    assert f"report: {name}\n" in shown
    assert shown.count(name) == 3
    assert "[b]column" in shown
