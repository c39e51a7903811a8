"""``pwopt check``."""

from pathlib import Path

import click

from pwopt.cli.options import (
    data_option,
    json_option,
    preprocess_option,
    progress_bar,
    shape_option,
    threads_option,
)


@click.command(name="check")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("rewritten", type=click.Path(path_type=Path))
@data_option
@preprocess_option
@threads_option
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Batch to measure the latency with.  [default: 1, or what the model demands]",
)
@shape_option
@click.option(
    "--max-drop",
    type=float,
    metavar="POINTS",
    help="Points of top-1 that may be lost; without labels, of equal predictions.",
)
@click.option(
    "--min-speedup",
    type=float,
    metavar="X",
    help="How many times faster it must be.",
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    original: Path,
    rewritten: Path,
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
    from pwopt.checking import check
    from pwopt.report import check as report

    with progress_bar() as bar:
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
            progress=bar.progress,
        )
    if as_json:
        click.echo(report.to_json(verdict))
    else:
        report.print_table(verdict)
    if not verdict.passed:
        context.exit(3)
