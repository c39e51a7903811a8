"""Options that several commands share."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from pwopt.errors import PwoptError
from pwopt.files import check_plain
from pwopt.progress import Progress

if TYPE_CHECKING:
    from pwopt.learn.stage import Status
    from pwopt.learn.wishes import Learned, Say, Watch


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

seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of whatever is random.",
)

minutes_option = click.option(
    "--minutes",
    type=float,
    default=10,
    show_default=True,
    metavar="M",
    help="How long to learn, roughly.",
)

device_option = click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda")),
    default="auto",
    show_default=True,
    help="Where to learn: auto takes a GPU if there is one.",
)

checkpoint_option = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Save the state of learning here every few minutes; deleted when all is done.",
)

resume_option = click.option(
    "--resume", is_flag=True, help="Go on from --checkpoint, if it is there, as if never killed."
)


def is_given(ctx: click.Context, option: str) -> bool:
    """Tell whether an option stands on the command line."""
    return ctx.get_parameter_source(option) is ParameterSource.COMMANDLINE


def is_first() -> bool:
    """Tell whether this is the process that writes and prints, of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def check_company(ctx: click.Context, options: Iterable[str], is_there: bool, company: str) -> None:
    """Refuse options that say nothing without another one."""
    for option in options:
        if not is_there and is_given(ctx, option):
            raise click.UsageError(f"--{option.replace('_', '-')} goes with {company}.")


def check_distinct(
    options: str, *, written: Iterable[Path | None], read: Iterable[str | Path | None]
) -> None:
    """Refuse files to be written that are read too, or named twice, by these options."""
    files = [path.resolve() for path in written if path is not None]
    sources = {Path(path).resolve() for path in read if path is not None}
    if len(set(files) - sources) < len(files):
        raise click.UsageError(f"Give {options} files of their own.")


def check_writable(*paths: Path | None) -> None:
    """Refuse to write what is no plain file, or lies in a folder not there or not to be changed."""
    for path in filter(None, paths):
        if not path.parent.is_dir():
            raise click.UsageError(f"There is no folder {path.parent}; make it, or name another.")
        check_plain(path, path)
        if not os.access(path.parent, os.W_OK):
            raise PwoptError(f"{path}: its folder cannot be written to; name another one")


def check_unfinished(checkpoint: Path | None, *, resume: bool) -> None:
    """Refuse to begin anew where a run that was not finished has left its checkpoint."""
    if checkpoint is not None and not resume and checkpoint.exists():
        raise click.UsageError(
            f"{checkpoint} is there already: add --resume to go on, or delete it to begin anew."
        )


def finish(learned: "Learned | None", checkpoint: Path | None, next_step: str) -> None:
    """Say what to do next; delete the checkpoint of a run that is done, or raise what ended it."""
    failure = None if learned is None else learned.failure
    if learned is not None and learned.interrupted:
        is_there = checkpoint is not None and checkpoint.exists()
        later = "; the same command with --resume goes on" if is_there else ""
        click.echo(f"Interrupted: the best weights so far are kept{later}", err=True)
    elif learned is not None and failure is None and checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    click.echo(next_step, err=True)
    if failure is not None:
        raise failure


@dataclass(frozen=True)
class Bar:
    """Where work and learning report to.

    Attributes:
        progress: Told how far work is; None where nobody would see it.
        watch: Told how far learning is.
        say: Prints a line on stderr.
    """

    progress: Progress | None
    watch: "Watch"
    say: "Say"


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """Show what is being done or learned, with the time left, on stderr if that is a terminal.

    It is drawn when something is reported and at no other time: that would disturb what is timed.
    """
    if not (sys.stderr.isatty() and is_first()):
        yield Bar(None, lambda stage, status: None, lambda line: click.echo(line, err=True))
        return
    from time import monotonic

    from rich import progress
    from rich.console import Console

    columns = (*progress.Progress.get_default_columns(), progress.TextColumn("{task.fields[more]}"))
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with progress.Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("loading", total=None, more="")
        drawn = 0.0

        def report(what: str, done: int, total: int | None, more: str = "") -> None:
            if what != bar.tasks[0].description:
                bar.reset(task)
            bar.update(task, description=what, completed=done, total=total, more=more, refresh=True)

        def watch(stage: str, status: "Status") -> None:
            nonlocal drawn
            if monotonic() - drawn < 0.2 and status.step < status.steps:
                return
            drawn = monotonic()
            same = "" if status.agreement is None else f", {status.agreement:.1%} agree"
            more = f"loss {status.loss:.3g}, held out {status.held_out:.3g}{same}"
            report(f"learning {stage}", status.step, status.steps, more)

        yield Bar(report, watch, console.print)
