"""Pipelines as text: ``fold-affine,bottleneck{rank=64,sides=input}`` → Pipeline.

Passes are separated by commas; a pass's options stand in braces, as ``name=value`` separated by
commas. The names and types are those of the pass's dataclass fields. `str(pipeline)` is the way
back.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pwopt.errors import SpecError
from pwopt.rewriting import Pass, Pipeline

_STEP = re.compile(r"\s*([\w-]+)\s*(?:\{([^{}]*)\})?\s*(,|$)")

_NUMBERS = {int: "a whole number", float: "a number"}


def parse_pipeline(text: str, passes: Mapping[str, type[Pass]]) -> Pipeline:
    """Build the pipeline that `text` describes from the passes that are known by name.

    Raises:
        SpecError: bad syntax, an unknown pass or option, or a value the option cannot take.
    """
    steps: list[Pass] = []
    position, more = 0, True
    while more:
        match = _STEP.match(text, position)
        if match is None:
            raise SpecError(
                f"pipeline '{text}': cannot read '{text[position:]}'; "
                "write passes as in fold-affine,bottleneck{rank=64}"
            )
        name, options, comma = match.groups()
        if name not in passes:
            raise SpecError(f"unknown pass '{name}'; there are {', '.join(sorted(passes))}")
        steps.append(build_pass(passes[name], _split_options(name, options or "")))
        position, more = match.end(), bool(comma)
    return Pipeline(tuple(steps))


def build_pass(kind: type[Pass], options: Mapping[str, str]) -> Pass:
    """Make a pass from options given as text.

    Raises:
        SpecError: an unknown or missing option, or a value it cannot take.
    """
    types = option_types(kind)
    for name in options:
        if name not in types:
            known = ", ".join(types) or "none"
            raise SpecError(f"{kind.name}: unknown option '{name}'; it has {known}")
    for option in fields(kind):
        if is_required(option) and option.name not in options:
            raise SpecError(f"{kind.name}: option '{option.name}' is missing")
    values = {name: _value(kind, name, text, types[name]) for name, text in options.items()}
    return kind(**values)


def option_types(kind: type[Pass]) -> dict[str, Any]:
    """Return option name → type of a pass, in the order of its fields."""
    hints = get_type_hints(kind)
    return {option.name: hints[option.name] for option in fields(kind)}


def is_required(option: Field[Any]) -> bool:
    """Tell whether an option has no default."""
    return option.default is MISSING


def _split_options(name: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in text.split(",") if text.strip() else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise SpecError(f"{name}: '{item.strip()}' is no option; write {name}{{name=value}}")
        if key in options:
            raise SpecError(f"{name}: option '{key}' is given twice")
        options[key] = value
    return options


def _value(kind: type[Pass], name: str, text: str, wanted: Any) -> Any:
    if get_origin(wanted) is Literal:
        choices = [str(choice) for choice in get_args(wanted)]
        if text in choices:
            return get_args(wanted)[choices.index(text)]
        raise SpecError(f"{kind.name}: {name} must be one of {', '.join(choices)}, not '{text}'")
    if get_origin(wanted) in (Union, UnionType):  # X | None
        if text.lower() == "none":
            return None
        inner = next(choice for choice in get_args(wanted) if choice is not type(None))
        return _value(kind, name, text, inner)
    if wanted is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise SpecError(f"{kind.name}: {name} must be true or false, not '{text}'")
    if wanted not in _NUMBERS:
        return text
    try:
        return wanted(text)
    except ValueError:
        raise SpecError(f"{kind.name}: {name} must be {_NUMBERS[wanted]}, not '{text}'") from None
