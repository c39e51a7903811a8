"""Options that several commands share."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from pwopt.progress import Progress


class ShapeParam(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """``NAME=1,3,224,224`` → (name, sizes). Names may hold ``=``; sizes are positive."""

    name = "NAME=1,3,224,224"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        """Parse the text, or fail as wrong usage."""
        if isinstance(value, tuple):  # click converts defaults twice
            return value
        name, _, sizes = str(value).rpartition("=")
        try:
            shape = tuple(int(size) for size in sizes.split(","))
        except ValueError:
            shape = ()
        if not name or not shape or min(shape) < 1:
            self.fail(f"'{value}' is not of the form NAME=1,3,224,224", param, ctx)
        return name, shape


shape_option = click.option(
    "--shape",
    "shapes",
    type=ShapeParam(),
    multiple=True,
    callback=lambda _context, _option, pairs: dict(pairs),
    help="Shape of an input whose axes the model leaves open; may be repeated.",
)
"""``--shape``, which may be repeated, as ``shapes: dict[str, tuple[int, ...]]``."""

threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1, max=os.cpu_count()),
    default=1,
    show_default=True,
    help="Threads to measure with.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

data_option = click.option(
    "--data", metavar="SRC", help="Samples: an .npz, a folder of images or module:callable."
)

preprocess_option = click.option(
    "--preprocess",
    metavar="P",
    help="For images: raw, unit, imagenet, caffe or "
    "scale=1/255,mean=R:G:B,std=R:G:B,order=rgb|bgr.",
)


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """Show what is being done, with the time left, on stderr if that is a terminal.

    It is drawn when something is reported and at no other time: that would disturb what is timed.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    with progress.Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("loading", total=None)

        def report(what: str, done: int, total: int | None) -> None:
            if what != bar.tasks[0].description:
                bar.reset(task)
            bar.update(task, description=what, completed=done, total=total, refresh=True)

        yield report
