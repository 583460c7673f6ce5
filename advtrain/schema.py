"""Base of all configurations: typed fields with bounds, numbers such as 8/255, custom code."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from advtrain.errors import UserError, nearest


def load_attribute(reference: str, what: str) -> Any:
    """Import `module:attribute`; raise a UserError if either is missing.

    Call it only where user code may run. The working folder is searched last, so its modules replace no installed one.
    """
    search_working_folder()
    module_name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{what} '{reference}': cannot import '{module_name}' ({error}); "
            "it must be importable from the working folder or installed"
        ) from error
    except Exception as error:  # the user's module may raise any exception
        raise UserError(
            f"{what} '{reference}': importing '{module_name}' fails with {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"{what} '{reference}': no '{attribute}' in it{nearest(attribute, vars(module))}")
    return getattr(module, attribute)


def search_working_folder() -> None:
    """Add the working folder to the end of the import path.

    Call it only where user code may run.
    """
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)


#: Largest number in a configuration: a larger count does not finish, and a larger radius or rate is a typing error.
MOST = 1_000_000_000
#: Largest seed: torch takes 64-bit seeds, and clocks in nanoseconds fit.
MOST_SEED = 2**63 - 1
_DECIMAL = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?")


class Config(BaseModel):
    """Base of all configurations: immutable, no unknown keys, no conversion ("3" is not 3)."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """keys of earlier versions, which are rejected, and their current names"""

    @model_validator(mode="before")
    @classmethod
    def _refuse_renamed_keys(cls, given: Any) -> Any:
        for old, new in cls.renamed.items():
            if isinstance(given, dict) and old in given:
                raise ValueError(f"{old} is now called {new}")
        return given

    @model_validator(mode="after")
    def _refuse_absurd_numbers(self) -> Self:
        for name in type(self).model_fields:
            value, most = getattr(self, name), MOST_SEED if name.endswith(("seed", "seeds")) else MOST
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and abs(number) > most:
                    why = "a larger count does not end, and a larger radius, rate or weight is a typing error"
                    raise ValueError(f"{name} = {str(number)[:30]} is above {most:,}: {why}")
        return self


def with_present_names(values: Any, config: type[BaseModel]) -> Any:
    """Return the values of a stored configuration, with keys of earlier versions renamed."""
    if not isinstance(values, dict):
        return values
    renamed: Mapping[str, str] = getattr(config, "renamed", {})
    found = {renamed.get(key, key): value for key, value in values.items()}
    for name, field in config.model_fields.items():
        key = field.alias or name
        for kind in configurations(field.annotation) if key in found else ():
            found[key] = with_present_names(found[key], kind)
    return found


def configurations(annotation: Any) -> list[type[BaseModel]]:
    """Return the configurations in the type of a field, such as `list[Change]` or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in configurations(inner)]


def parse_number(value: object) -> object:
    """Convert text such as `8/255` or `1e-4` to the nearest float.

    YAML 1.1 reads both as text. Other values are returned unchanged, and so is text that is no finite number.
    """
    if not isinstance(value, str):
        return value
    over, slash, under = value.replace(" ", "").partition("/")
    if not all(_DECIMAL.fullmatch(part) for part in (over, under or "1")) or (slash and not under):
        return value
    try:  # without a slash, float() takes absurd exponents such as 1e-99999999 at once, but a Fraction does not
        number = float(Fraction(over) / Fraction(under)) if slash else float(over)
    except (ZeroDivisionError, OverflowError):
        return value
    return number if math.isfinite(number) else value


class Relative(float):
    """Length in units of the mean embedding norm of a network, written with an x, such as 0.5x."""

    def __str__(self) -> str:
        return f"{float(self):g}x"

    def __format__(self, form: str) -> str:
        return str(self)


def parse_relative(value: object) -> Relative | None:
    """Return text such as `0.5x` as a relative length; None for anything else."""
    if isinstance(value, Relative) or not isinstance(value, str) or not value.endswith("x"):
        return value if isinstance(value, Relative) else None
    factor = parse_number(value[:-1])
    return Relative(factor) if isinstance(factor, float) else None


def with_numbers(args: Any) -> Any:
    """Return the arguments of a factory with text such as `1e-3` converted to floats.

    YAML 1.1 reads it as text. The configuration keeps it as written.
    """
    if isinstance(args, dict):
        return {key: with_numbers(value) for key, value in args.items()}
    if isinstance(args, list):
        return [with_numbers(value) for value in args]
    is_exponent = isinstance(args, str) and re.fullmatch("[+-]?[0-9.]+[eE][+-]?[0-9]+", args)
    return parse_number(args) if is_exponent else args


def show_number(value: float) -> float | str:
    """Return k/255 as text, so that a radius in 8-bit gray levels keeps its exact form.

    Other numbers and multiples of 1/5 stay decimal. A relative length is text such as 0.5x.
    """
    if isinstance(value, Relative):
        return str(value)
    levels = round(value * 255)
    return f"{levels}/255" if 0 < levels < 255 and levels / 255 == value and levels % 51 else value


def parse_duration(value: object, unit: str = "s", *, bare: bool = False) -> object:
    """Convert text such as `2h30m`, `90s` or `1d` to a number of `unit`: d, h, m or s.

    Args:
        value: what the user wrote. Values that are neither text nor numbers are returned unchanged.
        unit: unit of the result.
        bare: whether numbers are returned unchanged, because the name of the setting gives their unit.

    Raises:
        ValueError: it is no duration, may mean two durations, or is a number whose unit is unknown.
    """
    number = parse_number(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, str | int | float)
        or (bare and not isinstance(number, str))
    ):
        return number
    text = str(value).strip()
    found = _DURATION.fullmatch(text)
    if not text or found is None:
        raise ValueError(f"takes a time such as 2h, 90m, 45s or 1h30m{_instead(text)}")
    seconds = sum(float(found[name] or 0) * length for name, length in _LENGTHS.items())
    return seconds / _LENGTHS[unit]


def _instead(text: str) -> str:
    """Return how a time is written that has a colon or no unit; "" for other text."""
    if re.fullmatch("[0-9]+(:[0-9]+)?", text):
        one, colon, two = text.partition(":")
        choices = [f"{one}m{two}s", f"{one}h{two}m"] if colon else [f"{one}s", f"{one}m", f"{one}h"]
        return f"; '{text}' may mean {', '.join(choices[:-1])} or {choices[-1]}"
    if re.fullmatch("[0-9]+:[0-9]+:[0-9]+", text):
        return f"; write {'{}h{}m{}s'.format(*text.split(':'))}"
    return ""


_LENGTHS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(
    r"\s*".join(rf"(?:(?P<{unit}>[0-9]{{1,9}}(?:\.[0-9]{{1,9}})?){unit})?" for unit in _LENGTHS)
)


def _seconds(value: object, info: ValidationInfo) -> object:
    """Convert a duration to seconds; stored configurations hold them as a number."""
    stored = bool(info.context and info.context.get("stored"))
    return parse_duration(value, bare=stored and not isinstance(value, str))


def _whole_seconds(value: object) -> object:
    seconds = parse_duration(value, bare=True)
    return (
        int(seconds)
        if isinstance(value, str) and isinstance(seconds, float) and seconds.is_integer()
        else seconds
    )


#: Time in seconds, written with units such as 1h30m. The text is the name of the type in the reference.
Duration = Annotated[float, BeforeValidator(_seconds), "time"]
#: Whole seconds or hours, in a field whose name gives the unit of a bare number. Units may be written.
Seconds = Annotated[int, BeforeValidator(_whole_seconds)]
Hours = Annotated[float, BeforeValidator(lambda value: parse_duration(value, "h", bare=True))]

#: Norm of a perturbation.
Norm = Literal["linf", "l2", "l1"]


def _number(value: object) -> object:
    if parse_relative(value) is not None:
        raise ValueError(
            "only adversary.eps, eps_low, init_mag and step_size may be multiples of the embedding norm, such as 0.5x; "
            "write a number (a search space may have them under choice)"
        )
    return parse_number(value)


def _length(value: object, parse: ValidatorFunctionWrapHandler) -> float:
    relative = parse_relative(value)
    found: float = parse(parse_number(value) if relative is None else float(relative))  # checks the bounds
    return found if relative is None else relative


#: Float in a recipe, which may be written as a fraction of integers.
Number = Annotated[float, BeforeValidator(_number), PlainSerializer(show_number, return_type=float | str)]
#: Length of a perturbation: a Number, or a Relative such as 0.5x. The text is the name of the type in the reference.
Length = Annotated[
    float,
    WrapValidator(_length),
    PlainSerializer(show_number, return_type=float | str),
    "number, or a multiple such as 0.5x",
]
