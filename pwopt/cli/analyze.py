"""``pwopt analyze``: where the time and the weights go, and what a bottleneck would save."""

from pathlib import Path

import click

from pwopt.cli.options import shape_option, threads_option
from pwopt.errors import SpecError


@click.command("analyze")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--bottleneck",
    type=click.IntRange(min=1),
    metavar="R",
    help="Rank of the 1×1 bottlenecks to consider. Without it: per layer, the largest multiple of "
    "the kernel block (16) that makes it twice as fast.",
)
@shape_option
@click.option("--measure", is_flag=True, help="Also time every layer in onnxruntime.")
@threads_option
@click.option(
    "--format",
    "style",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="How to print the result.",
)
@click.option("--json", "style", flag_value="json", help="The same as --format json.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the result to a file instead of the terminal.",
)
def command(
    model: Path,
    bottleneck: int | None,
    shapes: dict[str, tuple[int, ...]],
    measure: bool,
    threads: int,
    style: str,
    output: Path | None,
) -> None:
    """List the layers of MODEL with their cost, and the splits that would make them cheaper.

    Candidates come first, the one that saves most at the top; every other layer says why it is
    none.
    """
    from pwopt.analysis import analyze
    from pwopt.files import atomic_write
    from pwopt.report import analysis as report

    if output is not None and output.resolve() == model.resolve():
        raise SpecError(f"{output}: is the model itself; name another file for the result")
    found = analyze(model, shapes=shapes, bottleneck=bottleneck, measure=measure, threads=threads)
    write = {"table": report.to_text, "json": report.to_json, "csv": report.to_csv}[style]
    if output is not None:
        with atomic_write(output) as file:
            file.write(write(found).encode())
        click.echo(f"wrote {output}", err=True)
    elif style == "table":
        report.print_table(found)
    else:
        click.echo(write(found), nl=False)
    click.echo(report.next_step(found, str(model)), err=True)
