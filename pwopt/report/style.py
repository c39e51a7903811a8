"""What all reports look like: the console, tables, JSON and numbers."""

import json
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

PLAIN_WIDTH = 120
"""Columns where there is no terminal whose width would tell."""


def stdout() -> Console:
    """Return a console on stdout: as wide as the terminal, plain where it is piped.

    Names of layers are printed as they are, also where they look like markup.
    """
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def show(report: RenderableType) -> None:
    """Print a report on stdout: in colour on a terminal, as plain text where it is piped."""
    console = stdout()
    if console.is_terminal:
        console.print(report)
    else:
        console.file.write(plain(report))


def plain(report: RenderableType) -> str:
    """Write a report without colour and without blanks at the ends of lines."""
    console = Console(
        width=PLAIN_WIDTH, color_system=None, highlight=False, markup=False, emoji=False
    )
    with console.capture() as capture:
        console.print(report)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def bare_table() -> Table:
    """Return a table without lines, its columns two spaces apart."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def json_text(result: dict[str, Any]) -> str:
    """Write a result as one JSON object, its schema's version ahead."""
    return json.dumps({"schema": 1, **result}, indent=2, ensure_ascii=False)


def scaled(amount: float, unit: str = "") -> str:
    """Write three digits and a unit: 12.3 M, 12.3 MB."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= factor:
            value = amount / factor
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f} {prefix}{unit}"
    return f"{amount:.0f} {unit}".rstrip()


def milliseconds(value: float) -> str:
    """Write a latency to three digits or whole milliseconds: 0.123 ms, 12.3 ms, 1,234 ms."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def number(value: float, form: str) -> str:
    """Write a number in a format such as "+.2f", with a true minus and no sign for zero."""
    text = format(value, form)
    return minus(text) if float(text) else text.lstrip("+-")


def minus(text: str) -> str:
    """Write hyphens as true minus signs."""
    return text.replace("-", "−")
