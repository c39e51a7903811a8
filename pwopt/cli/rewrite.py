"""``pwopt rewrite``."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pwopt.cli.options import (
    check_company,
    check_distinct,
    check_unfinished,
    check_writable,
    checkpoint_option,
    data_option,
    device_option,
    finish,
    json_option,
    minutes_option,
    preprocess_option,
    progress_bar,
    resume_option,
    seed_option,
    shape_option,
    threads_option,
)

if TYPE_CHECKING:
    from pwopt.candidates import Choice
    from pwopt.judging import Gate
    from pwopt.learn.wishes import Device
    from pwopt.workflow import Activation, Init

SIDES: tuple["Choice", ...] = ("auto", "input", "output", "both")
GATES: tuple["Gate", ...] = ("measured", "macs", "always")
INITS: tuple["Init", ...] = ("auto", "svd", "calibrated", "learned")
ACTIVATIONS: tuple["Activation", ...] = ("linear", "relu")

_FOR_AUTO = ("speedup", "max_drop", "max_macs", "max_params", "confident", "cost", "pareto")
_FOR_MEASURING = ("gate", "threads", "batch")
_FOR_DATA = ("preprocess", "samples", "seed")
_FOR_LEARNING = ("minutes", "device", "checkpoint", "resume", "activation")


class RankParam(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A rank from 1, or ``auto``."""

    name = "R|auto"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["auto"]:
        """Parse the text, or fail as wrong usage."""
        if value == "auto":
            return "auto"
        try:
            rank = int(str(value))
        except ValueError:
            rank = 0
        if rank < 1:
            self.fail(f"'{value}' is neither a rank from 1 nor auto", param, ctx)
        return rank


@click.command(name="rewrite")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL.pwopt.onnx.")
@click.option(
    "--bottleneck",
    type=RankParam(),
    metavar="R|auto",
    help="Fold affine operators, then split wide k×k convolutions at rank R; or auto: split every "
    "layer as the bounds below ask for, and make the exact rewrites that pay.",
)
@click.option(
    "--sides",
    type=click.Choice(SIDES),
    help="Where the 1×1 goes at a given rank; auto takes, per layer, what loses least of the "
    "weight for the MACs it saves.  [default: auto]",
)
@click.option(
    "--init",
    type=click.Choice(INITS),
    default="auto",
    help="Where weights come from: svd of the layer's own, calibrated on --data, or learned from "
    "there on.  [default: calibrated if there is --data]",
)
@data_option
@preprocess_option
@click.option(
    "--speedup",
    type=click.FloatRange(min=1),
    metavar="X",
    help="Be X times as fast, measured; with --cost macs, have 1/X of the MACs.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    metavar="POINTS",
    help="Lose so many points of top-1 at most, counted and foretold; without labels, of "
    "agreement.  "
    "[default: 1, where no other bound is given]",
)
@click.option("--max-macs", type=click.IntRange(min=1), metavar="N", help="Have N MACs at most.")
@click.option(
    "--max-params", type=click.IntRange(min=1), metavar="N", help="Have N parameters at most."
)
@click.option(
    "--confident",
    is_flag=True,
    help="Let the upper end of the drop's 95 % interval meet --max-drop.",
)
@click.option(
    "--cost",
    type=click.Choice(("measured", "macs")),
    default="measured",
    show_default=True,
    help="What splits are chosen by: time on this machine, or MACs for another.",
)
@click.option(
    "--pareto",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="Write the whole curve of speed against accuracy too, and a picture of it beside.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=8),
    default=1024,
    show_default=True,
    metavar="N",
    help="Samples of --data to calibrate on at most; all are learned from.",
)
@seed_option
@minutes_option
@click.option(
    "--activation",
    type=click.Choice(ACTIVATIONS),
    default="linear",
    show_default=True,
    help="What stands inside a learned bottleneck: nothing, or a Relu.",
)
@device_option
@checkpoint_option
@resume_option
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
    bottleneck: int | Literal["auto"] | None,
    sides: "Choice | None",
    init: "Init",
    data: str | None,
    preprocess: str | None,
    speedup: float | None,
    max_drop: float | None,
    max_macs: int | None,
    max_params: int | None,
    confident: bool,
    cost: Literal["measured", "macs"],
    pareto: Path | None,
    samples: int,
    seed: int,
    minutes: float,
    activation: "Activation",
    device: "Device",
    checkpoint: Path | None,
    resume: bool,
    exact: bool,
    gate: "Gate | None",
    threads: int,
    batch: int,
    pipeline: str | None,
    shapes: dict[str, tuple[int, ...]],
    as_json: bool,
) -> None:
    """Put 1×1 bottlenecks into MODEL, or rewrite it exactly, and write the result.

    Examples: pwopt rewrite model.onnx --bottleneck 64; pwopt rewrite model.onnx --exact;
    pwopt rewrite model.onnx --bottleneck auto --data calib.npz --max-drop 1

    Exits with 3, and writes nothing, where no model within the bounds is found.
    """
    auto, learns = bottleneck == "auto", init == "learned"
    if (bottleneck is None and not exact) == (pipeline is None):
        raise click.UsageError("Give --bottleneck R or --exact or both, or else --pipeline SPEC.")
    if bottleneck is None and sides is not None:
        raise click.UsageError(
            "--sides goes with --bottleneck; in a pipeline write bottleneck{rank=R,sides=SIDES}."
        )
    if auto and sides not in (None, "auto"):
        raise click.UsageError("--sides goes with a rank; --bottleneck auto chooses them itself.")
    check_company(ctx, _FOR_MEASURING, exact or auto or learns, "--exact")
    check_company(ctx, _FOR_AUTO, auto, "--bottleneck auto")
    check_company(ctx, _FOR_DATA, data is not None, "--data")
    check_company(ctx, _FOR_LEARNING, learns, "--init learned")
    check_company(ctx, ["resume"], checkpoint is not None, "--checkpoint")

    if output is None and model.exists() and not (model.is_file() or model.is_dir()):
        raise click.UsageError("Say with -o where the result goes: the model is no plain file.")
    target = output or model.with_name(f"{model.name.removesuffix('.onnx')}.pwopt.onnx")
    if target.resolve() == model.resolve():
        raise click.UsageError("-o is the model itself, which check will want to compare with.")
    picture = pareto.with_suffix(".png") if pareto is not None else None
    check_distinct(
        "-o, --checkpoint and --pareto (with a .png beside it)",
        written=(target, checkpoint, pareto, picture),
        read=(model, data),
    )
    check_writable(target if model.exists() else output, pareto, checkpoint)
    check_unfinished(checkpoint, resume=resume)
    if confident and max_drop is None and speedup is not None:
        raise click.UsageError("--confident goes with --max-drop.")

    from pwopt.learn.wishes import Wishes
    from pwopt.report import front as curve
    from pwopt.report import rewriting as report
    from pwopt.search.search import Bounds
    from pwopt.workflow import DEFAULT, rewrite

    bounds = Bounds(
        speedup=speedup,
        max_drop=max_drop,
        max_macs=max_macs,
        max_params=max_params,
        confident=confident,
    )
    if bounds == Bounds(confident=confident) and not learns:
        bounds = replace(bounds, max_drop=DEFAULT.max_drop)
    learning = Wishes(
        minutes=minutes, device=device, seed=seed, checkpoint=checkpoint, resume=resume
    )
    with progress_bar() as bar:
        result = rewrite(
            model,
            bottleneck=bottleneck,
            sides=sides or "auto",
            init=init,
            data=data,
            preprocess=preprocess,
            bounds=bounds,
            cost=cost,
            curve=pareto is not None,
            samples=samples,
            learning=learning,
            activation=activation,
            exact=exact,
            gate=gate,
            pipeline=pipeline,
            shapes=shapes,
            threads=threads,
            batch=batch,
            seed=seed,
            progress=bar.progress,
            watch=bar.watch,
            say=bar.say,
        )
    result.model.save(target)
    if as_json:
        click.echo(report.to_json(result, target))
    else:
        report.print_table(result)
    if pareto is not None and result.front is not None:
        curve.write(result.front, pareto)
        if picture is not None and find_spec("matplotlib"):
            curve.draw(result.front, picture)
            click.echo(f"Wrote {pareto} and {picture}", err=True)
        else:
            click.echo(f"Wrote {pareto}; for a picture too: pip install 'pwopt[plots]'", err=True)
    finish(result.learned, checkpoint, report.next_step(model, target))
