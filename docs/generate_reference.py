"""Writes the reference pages that follow from the code: fields of YAML files, commands, files, metrics."""

from __future__ import annotations

import ast
import types
import typing
from pathlib import Path
from typing import Any, Union

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from advtrain.evaluation.regression import RegressionReport
from advtrain.evaluation.report import Report
from advtrain.promotion import Policy
from advtrain.recipe import Recipe
from advtrain.tracking.ray_metrics import CAMPAIGN_METRICS, RUN_METRICS
from pipelines.cli.main import app
from tuning.campaign import Campaign
from tuning.study.grid import Study

ROOT = Path(__file__).parents[1]
PACKAGES = ("advtrain", "tuning", "pipelines")
NUMBERS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def write_reference(folder: Path) -> None:
    """Write every generated page into `folder`; a page that has not changed is left alone."""
    pages = {
        "recipe": _fields_page("Recipe", Recipe, "One YAML file that defines a training run."),
        "campaign": _fields_page("Campaign", Campaign, "One YAML file that defines a search."),
        "study": _fields_page("Study", Study, "One YAML file that defines a comparison."),
        "policy": _fields_page("Policy", Policy, "One YAML file that defines what the gate asks for."),
        "report": _report_page(),
        "cli": _cli_page(),
        "metrics": _metrics_page(),
        "tree": _tree_page(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"
    )


def _fields_page(title: str, model: type[BaseModel], text: str) -> str:
    sections = "".join(f"\n## {name}\n\n{_fields_table(rows)}" for name, rows in _sections(model).items())
    return f"# {title}\n\n{text} A path such as `training.epochs` is what `--set` takes.\n{sections}"


def _fields_table(rows: list[list[str]]) -> str:
    return _table(["path", "value", "default", "meaning"], rows)


def _sections(model: type[BaseModel], prefix: str = "") -> dict[str, list[list[str]]]:
    """Return the fields of a model by section: its own, then those of each configuration within it."""
    own: list[list[str]] = []
    found: dict[str, list[list[str]]] = {prefix.rstrip(".") or "top level": own}
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        inner = _configurations(field.annotation)
        meaning = " ".join((field.description or "").split())
        if not inner:
            own.append([f"`{path}`", _value(field), _default(field), meaning])
        else:
            if not field.is_required() and field.default is None:
                own.append([f"`{path}`", "section", "null", meaning])
            for number, each in enumerate(inner):  # the first one has the plain name
                called = (
                    ""
                    if number == 0
                    else f" ({' '.join((each.__doc__ or '').split(':')[0].split()).lower()})"
                )
                rows = _sections(each, f"{path}.")
                found |= {f"{section}{called}": lines for section, lines in rows.items()}
    return {section: rows for section, rows in found.items() if rows}


def _configurations(annotation: Any) -> list[type[BaseModel]]:
    """Return the configurations that a field may hold; none for a list of configurations."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    plain = [typing.get_args(o)[0] if typing.get_origin(o) is typing.Annotated else o for o in options]
    return [o for o in plain if isinstance(o, type) and issubclass(o, BaseModel)]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        if names := [text for text in inner[1:] if isinstance(text, str)]:
            return names[0]
        return "number" if inner[0] is float else _type(inner[0])
    if _is_union(annotation):
        return " or ".join(dict.fromkeys(_type(option) for option in inner))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (list, tuple):
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "mapping"
    if annotation is type(None):
        return "null"
    names = {float: "number", int: "integer", str: "text", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = {k: v for k, v in value.model_dump().items() if k in value.model_fields_set}
    if value == "":
        return ""
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _value(field: FieldInfo) -> str:
    """Return type and range of a field."""
    limits = [
        f"{sign} {getattr(limit, key):g}"
        for limit in field.metadata
        for key, sign in NUMBERS.items()
        if getattr(limit, key, None) is not None
    ]
    return ", ".join([_type(field.annotation), *limits])


def _report_page() -> str:
    text = "`report.json` of an evaluation. [The JSON schema](../report.schema.json) is checked by the tests."
    for model, title in ((Report, "Classification"), (RegressionReport, "Regression")):
        text += f"\n\n## {title}\n"
        for name, rows in _sections(model).items():
            text += f"\n### {name}\n\n{_fields_table(rows)}"
    return f"# Report\n\n{text}"


def _cli_page() -> str:
    text = "# Commands\n\n`advtrain COMMAND --help` prints the same.\n"
    group: Any = typer.main.get_command(app)
    for name in group.list_commands(None):
        command = group.commands[name]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([f"advtrain {name}", *(_metavar(a) for a in arguments), "[OPTIONS]"])
        text += f"\n## {name}\n\n{' '.join((command.help or '').split())}\n\n```text\n{usage}\n```\n\n"
        rows = [
            [_parameter(p), _parameter_default(p), " ".join((p.help or "").split())] for p in command.params
        ]
        text += _table(["argument or option", "default", "meaning"], rows) if rows else ""
    return text


def _metavar(parameter: Any) -> str:
    return parameter.metavar or parameter.name.strip("_").upper()


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`"
    return f"`{', '.join(parameter.opts)}{'' if parameter.is_flag else f' {_metavar(parameter)}'}`"


def _parameter_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value in (None, False, "") or callable(value) else f"`{value}`"


def _metrics_page() -> str:
    def rows(metrics: dict[str, str]) -> list[list[str]]:
        return [[f"`ray_{name}`", text] for name, text in metrics.items()]

    return (
        "# Prometheus metrics\n\nRay's agents export these gauges. `infra/monitoring` has a Prometheus configuration, "
        "alerts and a Grafana dashboard for them.\n\n## A run\n\n"
        + _table(["metric", "meaning"], rows(RUN_METRICS))
        + "\n## A campaign\n\n"
        + _table(["metric", "meaning"], rows(CAMPAIGN_METRICS))
    )


def _tree_page() -> str:
    text = "# The tree\n\nThe first sentence of every module, read from the code.\n"
    for package in PACKAGES:
        text += f"\n## {package}\n\n"
        files = sorted((ROOT / package).rglob("*.py"), key=lambda path: (path.parent, path.name))
        rows = []
        for path in files:
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            first = " ".join(docstring.split("\n\n")[0].split())
            rows.append([f"`{path.relative_to(ROOT)}`", first])
        text += _table(["file", "content"], rows)
    return text
