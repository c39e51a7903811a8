"""``pwopt rewrite``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from pwopt.cli.options import json_option, shape_option, threads_option

if TYPE_CHECKING:
    from pwopt.candidates import Choice
    from pwopt.judging import Gate

SIDES: tuple["Choice", ...] = ("auto", "input", "output", "both")
GATES: tuple["Gate", ...] = ("measured", "macs", "always")


@click.command(name="rewrite")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL.pwopt.onnx.")
@click.option(
    "--bottleneck",
    type=click.IntRange(min=1),
    metavar="R",
    help="Fold affine operators, then split wide k×k convolutions at rank R.",
)
@click.option(
    "--sides",
    type=click.Choice(SIDES),
    help="Where the 1×1 goes; auto takes, per layer, what loses least of the weight for the MACs "
    "it saves.  [default: auto]",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Make the rewrites that pay and change nothing, before the bottlenecks if any.",
)
@click.option(
    "--gate",
    type=click.Choice(GATES),
    help="When an exact rewrite pays: measured faster in onnxruntime, fewer MACs, or always.  "
    "[default: measured]",
)
@threads_option
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Batch to measure with.",
)
@click.option("--pipeline", metavar="SPEC", help="Passes to run instead; see pwopt passes.")
@shape_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    output: Path | None,
    bottleneck: int | None,
    sides: "Choice | None",
    exact: bool,
    gate: "Gate | None",
    threads: int,
    batch: int,
    pipeline: str | None,
    shapes: dict[str, tuple[int, ...]],
    as_json: bool,
) -> None:
    """Put 1×1 bottlenecks into MODEL, or rewrite it exactly, and write the result.

    Examples: pwopt rewrite model.onnx --bottleneck 64; pwopt rewrite model.onnx --exact
    """
    if (bottleneck is None and not exact) == (pipeline is None):
        raise click.UsageError("Give --bottleneck R or --exact or both, or else --pipeline SPEC.")
    if bottleneck is None and sides is not None:
        raise click.UsageError(
            "--sides goes with --bottleneck; in a pipeline write bottleneck{rank=R,sides=SIDES}."
        )
    for option in ("gate", "threads", "batch"):
        if not exact and ctx.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{option} goes with --exact.")

    if output is None and model.exists() and not (model.is_file() or model.is_dir()):
        raise click.UsageError("Say with -o where the result goes: the model is no plain file.")
    target = output or model.with_name(f"{model.name.removesuffix('.onnx')}.pwopt.onnx")
    if target.resolve() == model.resolve():
        raise click.UsageError("-o is the model itself, which check will want to compare with.")

    from pwopt.report import rewriting as report
    from pwopt.workflow import rewrite

    result = rewrite(
        model,
        bottleneck=bottleneck,
        sides=sides or "auto",
        exact=exact,
        gate=gate or "measured",
        pipeline=pipeline,
        shapes=shapes,
        threads=threads,
        batch=batch,
    )
    result.model.save(target)
    if as_json:
        click.echo(report.to_json(result, target))
    else:
        report.print_table(result)
    click.echo(report.next_step(model, target), err=True)
