"""Where reports are printed."""

import sys

from rich.console import Console

PLAIN_WIDTH = 120
"""Columns where there is no terminal whose width would tell."""


def stdout() -> Console:
    """Return a console on stdout: as wide as the terminal, plain where it is piped.

    Names of layers are printed as they are, also where they look like markup.
    """
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)
