"""``pwopt demo``."""

from pathlib import Path

import click

RANK = 48
SPEEDUP = 4
MINUTES = 3


@click.command(name="demo")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="pwopt-demo")
@click.option(
    "--learn", is_flag=True, help=f"Learn a faster one, too, for {MINUTES} minutes; needs torch."
)
def command(folder: Path, learn: bool) -> None:
    """Analyze, rewrite and check a small trained network; its files go to FOLDER."""
    import shlex
    import shutil

    from pwopt.cli import analyze, check, rewrite
    from pwopt.errors import PwoptError
    from pwopt.models import DEMO_CALIBRATION, DEMO_EVALUATION, DEMO_MODEL

    if learn:
        from pwopt.learn.wishes import check_installed

        check_installed()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model = str(shutil.copyfile(DEMO_MODEL, folder / "naive_inception.onnx"))
        samples = str(shutil.copyfile(DEMO_EVALUATION, folder / "eval.npz"))
        if learn:
            to_learn = str(shutil.copyfile(DEMO_CALIBRATION, folder / "calib.npz"))
    except OSError as error:
        raise PwoptError(
            f"{folder}: cannot be written ({error.strerror or error}); name another folder"
        ) from error
    output = str(folder / "naive_inception.pwopt.onnx")
    judged = ["--data", samples, "--preprocess", "unit"]
    steps: list[tuple[click.Command, list[str]]] = [
        (analyze.command, [model, "--bottleneck", str(RANK)]),
        (rewrite.command, [model, "--bottleneck", str(RANK), "-o", output]),
        (check.command, [model, output, *judged]),
    ]
    if learn:
        learned = str(folder / "naive_inception.learned.onnx")
        wishes = ["--speedup", str(SPEEDUP), "--init", "learned", "--minutes", str(MINUTES)]
        source = ["--data", to_learn, "--preprocess", "unit", "-o", learned]
        steps += [
            (rewrite.command, [model, "--bottleneck", "auto", *wishes, *source]),
            (check.command, [model, learned, *judged]),
        ]
    for step, arguments in steps:
        shown = shlex.join(["pwopt", str(step.name), *arguments])
        click.secho(f"\n$ {shown}\n", bold=True)
        step.main(arguments, prog_name=f"pwopt {step.name}", standalone_mode=False)
