"""The list of passes, and the help of one: as tables or JSON."""

import inspect
import sys
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import click

from pwopt.report.style import bare_table, json_text, show
from pwopt.rewriting import Pass, value_text
from pwopt.spec import is_required, option_types


def to_json(passes: list[type[Pass]]) -> str:
    """Write the passes with their options as one JSON object."""
    described = [
        {
            "name": kind.name,
            "exact": kind.exact,
            "help": inspect.getdoc(kind),
            "options": [
                {
                    "name": option.name,
                    "type": _type(option_types(kind)[option.name]),
                    "required": is_required(option),
                    "default": None if is_required(option) else option.default,
                }
                for option in fields(kind)
            ],
        }
        for kind in passes
    ]
    return json_text({"passes": described})


def print_table(passes: list[type[Pass]]) -> None:
    """Print one line per pass."""
    table = bare_table()
    for column in ("pass", "exact", "what it does", "options"):
        table.add_column(column, no_wrap=column in ("pass", "exact"))
    for kind in passes:
        summary = (inspect.getdoc(kind) or "").splitlines()[0]
        table.add_row(kind.name, "yes" if kind.exact else "no", summary, ", ".join(_options(kind)))
    show(table)


def print_help(kind: type[Pass]) -> None:
    """Print a pass's help and options, and the full story that its module tells."""
    options = ",".join(_options(kind))
    parts = (
        f"{kind.name} ({'exact' if kind.exact else 'changes the numbers'})",
        inspect.getdoc(kind),
        f"In a pipeline: {kind.name}" + (f"{{{options}}}" if options else ""),
        inspect.getdoc(sys.modules[kind.__module__]),
    )
    click.echo("\n\n".join(part for part in parts if part))


def _options(kind: type[Pass]) -> list[str]:
    """Write each option as a pipeline does, with its default or its type."""
    types = option_types(kind)
    written = []
    for option in fields(kind):
        free = is_required(option) or option.default is None
        value = _type(types[option.name]).upper() if free else value_text(option.default)
        written.append(f"{option.name}={value}")
    return written


def _type(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return "|".join(str(choice) for choice in get_args(wanted))
    return getattr(wanted, "__name__", str(wanted))
