"""``pwopt demo``."""

from pathlib import Path

import click


@click.command(name="demo")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="pwopt-demo")
@click.pass_context
def command(ctx: click.Context, folder: Path) -> None:
    """Analyze, rewrite and check a small trained network; its files go to FOLDER."""
    import shutil

    from pwopt.cli import analyze, check, rewrite
    from pwopt.errors import PwoptError
    from pwopt.models import DEMO_EVALUATION, DEMO_MODEL

    try:
        folder.mkdir(parents=True, exist_ok=True)
        model = Path(shutil.copy(DEMO_MODEL, folder))
        samples = Path(shutil.copy(DEMO_EVALUATION, folder))
    except OSError as error:
        raise PwoptError(f"{folder}: cannot be written ({error.strerror})") from error
    output = folder / "naive_inception.pwopt.onnx"
    steps: list[tuple[click.Command, list[str]]] = [
        (analyze.command, [str(model), "--bottleneck", str(RANK)]),
        (rewrite.command, [str(model), "--bottleneck", str(RANK), "-o", str(output)]),
        (check.command, [str(model), str(output), "--data", str(samples), "--preprocess", "unit"]),
    ]
    for step, arguments in steps:
        click.secho(f"\n$ pwopt {step.name} {' '.join(arguments)}\n", bold=True)
        step.main(arguments, prog_name=f"pwopt {step.name}", standalone_mode=False)


RANK = 32
