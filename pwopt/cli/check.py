"""pwopt check."""

import json
import sys

import click

from pwopt.cli.options import shape_option


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("original")
@click.argument("rewritten")
@click.option("--data", metavar="SRC", help="An .npz, a folder of images or module:callable.")
@click.option(
    "--preprocess",
    metavar="P",
    help="For images: raw, unit, imagenet, caffe or "
    "scale=1/255,mean=R:G:B,std=R:G:B,order=rgb|bgr.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads to measure the latency with.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Batch to measure the latency with.  [default: 1, or what the model demands]",
)
@shape_option
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    metavar="POINTS",
    help="Points of top-1 that may be lost; without labels, of equal predictions.",
)
@click.option(
    "--min-speedup",
    type=click.FloatRange(min=0),
    metavar="X",
    help="How many times faster it must be.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(
    context: click.Context,
    original: str,
    rewritten: str,
    data: str | None,
    preprocess: str | None,
    threads: int,
    batch: int | None,
    shapes: dict[str, tuple[int, ...]],
    max_drop: float | None,
    min_speedup: float | None,
    as_json: bool,
) -> None:
    """Compare REWRITTEN with ORIGINAL: accuracy, latency, size, outputs.

    Without --data both run on random inputs: that checks numbers, not accuracy.
    Exits with 3 if --max-drop or --min-speedup is not met.
    """
    from rich.console import Console
    from rich.progress import Progress

    from pwopt.checking import check
    from pwopt.report.check import table, to_json

    bar = Progress(console=Console(stderr=True), transient=True)
    bar.disable = not bar.console.is_terminal
    with bar:
        task = bar.add_task("loading", total=None)
        verdict = check(
            original,
            rewritten,
            data=data,
            preprocess=preprocess,
            threads=threads,
            batch=batch,
            shapes=shapes,
            max_drop=max_drop,
            min_speedup=min_speedup,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    if as_json:
        click.echo(json.dumps(to_json(verdict), indent=2, ensure_ascii=False))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
        console.print(table(verdict))
    if not verdict.passed:
        context.exit(3)
