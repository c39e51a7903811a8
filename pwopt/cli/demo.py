"""``pwopt demo``."""

from pathlib import Path

import click

RANK = 48


@click.command(name="demo")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="pwopt-demo")
def command(folder: Path) -> None:
    """Analyze, rewrite and check a small trained network; its files go to FOLDER."""
    import shlex
    import shutil

    from pwopt.cli import analyze, check, rewrite
    from pwopt.errors import PwoptError
    from pwopt.models import DEMO_EVALUATION, DEMO_MODEL

    try:
        folder.mkdir(parents=True, exist_ok=True)
        model = shutil.copyfile(DEMO_MODEL, folder / "naive_inception.onnx")
        samples = shutil.copyfile(DEMO_EVALUATION, folder / "eval.npz")
    except OSError as error:
        raise PwoptError(
            f"{folder}: cannot be written ({error.strerror or error}); name another folder"
        ) from error
    output = folder / "naive_inception.pwopt.onnx"
    steps: list[tuple[click.Command, list[str]]] = [
        (analyze.command, [str(model), "--bottleneck", str(RANK)]),
        (rewrite.command, [str(model), "--bottleneck", str(RANK), "-o", str(output)]),
        (check.command, [str(model), str(output), "--data", str(samples), "--preprocess", "unit"]),
    ]
    for step, arguments in steps:
        shown = shlex.join(["pwopt", str(step.name), *arguments])
        click.secho(f"\n$ {shown}\n", bold=True)
        step.main(arguments, prog_name=f"pwopt {step.name}", standalone_mode=False)
