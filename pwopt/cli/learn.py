"""``pwopt learn``."""

from pathlib import Path
from typing import TYPE_CHECKING

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
    is_first,
    is_given,
    json_option,
    minutes_option,
    preprocess_option,
    progress_bar,
    resume_option,
    seed_option,
    shape_option,
)

if TYPE_CHECKING:
    from pwopt.learn.wishes import Device


class WeightParam(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """``NAME=W`` → (name, weight). Names may hold ``=``."""

    name = "NAME=W"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """Parse the text, or fail as wrong usage."""
        name, _, text = str(value).rpartition("=")
        try:
            return name, float(text)
        except ValueError:
            self.fail(f"'{value}' is not of the form NAME=W", param, ctx)


@click.command(name="learn")
@click.argument("student", type=click.Path(path_type=Path))
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    required=True,
    metavar="ORIGINAL",
    help="The model that STUDENT was made of, and is to do the same as.",
)
@data_option
@preprocess_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Default: STUDENT.learned.onnx."
)
@minutes_option
@click.option(
    "--steps", type=click.IntRange(min=1), metavar="N", help="Learn for N steps, however long."
)
@click.option(
    "--blocks",
    is_flag=True,
    help="Let every block learn by itself first: for bad starts, as by SVD.",
)
@click.option(
    "--label-weight",
    type=float,
    default=0,
    show_default=True,
    metavar="W",
    help="What the cross entropy with labels counts beside the teacher.",
)
@click.option(
    "--output-weight",
    "output_weights",
    type=WeightParam(),
    multiple=True,
    help="How much an output counts, 1 if not said; may be repeated.",
)
@click.option(
    "--temperature",
    type=float,
    metavar="T",
    help="What class scores are divided by before they are compared.  [default: 2]",
)
@click.option(
    "--rate",
    type=float,
    metavar="R",
    help="The highest learning rate.  [default: found by a short test]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Samples in a step, of all processes together.",
)
@device_option
@seed_option
@checkpoint_option
@resume_option
@shape_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    student: Path,
    teacher: Path,
    data: str | None,
    preprocess: str | None,
    output: Path | None,
    minutes: float,
    steps: int | None,
    blocks: bool,
    label_weight: float,
    output_weights: tuple[tuple[str, float], ...],
    temperature: float | None,
    rate: float | None,
    batch_size: int,
    device: "Device",
    seed: int,
    checkpoint: Path | None,
    resume: bool,
    shapes: dict[str, tuple[int, ...]],
    as_json: bool,
) -> None:
    """Train the weights of STUDENT to do what ORIGINAL does, and write the result.

    No labels are needed; the graph stays the same. On the samples held out, the loss is never
    larger than that of STUDENT. Ctrl-C keeps the best so far.

    Example: pwopt learn small.onnx --teacher model.onnx --data images/ --preprocess imagenet

    Several GPUs or machines: torchrun --nproc-per-node 2 -m pwopt learn …
    """
    if data is None:
        raise click.UsageError("Say with --data what to learn from; labels are not needed.")
    if steps is not None and is_given(ctx, "minutes"):
        raise click.UsageError("Give --minutes or --steps, not both.")
    check_company(ctx, ["resume"], checkpoint is not None, "--checkpoint")
    target = output or student.with_name(f"{student.name.removesuffix('.onnx')}.learned.onnx")
    check_distinct(
        "-o and --checkpoint", written=(target, checkpoint), read=(student, teacher, data)
    )
    check_writable(target, checkpoint)
    check_unfinished(checkpoint, resume=resume)

    from pwopt.learn.wishes import TEMPERATURE, Wishes, check_installed

    check_installed()

    from pwopt.data import open_data
    from pwopt.errors import LearnError
    from pwopt.learn.learning import learn
    from pwopt.model import Model
    from pwopt.report import learning as report
    from pwopt.report.rewriting import next_step
    from pwopt.rewriting import note

    wishes = Wishes(
        minutes=minutes,
        steps=steps,
        blocks=blocks,
        rate=rate,
        batch=batch_size,
        temperature=TEMPERATURE if temperature is None else temperature,
        output_weights=dict(output_weights),
        label_weight=label_weight,
        device=device,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
    )
    original = Model.load(teacher)
    samples = open_data(data, original, preprocess=preprocess, shapes=shapes)
    with progress_bar() as bar:
        learned = learn(
            Model.load(student), original, samples, wishes, watch=bar.watch, say=bar.say
        )
    if not is_first():
        return
    if learned.interrupted and not learned.after.loss < learned.before.loss:
        raise LearnError(f"{student}: interrupted before anything was gained; nothing is written")
    note(learned.model, str(wishes))
    learned.model.save(target)
    if as_json:
        click.echo(report.to_json(learned, target))
    else:
        report.print_table(learned)
    finish(learned, checkpoint, next_step(teacher, target))
