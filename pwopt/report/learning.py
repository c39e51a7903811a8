"""What learning did: as tables or JSON."""

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from pwopt.learn.stage import Report
from pwopt.learn.wishes import Learned
from pwopt.report.style import bare_table, json_text, show


def to_json(learned: Learned, output: Path) -> str:
    """Write the result as one JSON object."""
    return json_text({"output": str(output), **content(learned)})


def content(learned: Learned) -> dict[str, Any]:
    """Return what is to be written as JSON; what is not finite as null."""
    found: dict[str, Any] = _finite(
        {
            "device": learned.device,
            "samples": learned.samples,
            "held_out": learned.held_out,
            "before": asdict(learned.before),
            "after": asdict(learned.after),
            "stages": [_stage(report) for report in learned.stages],
            "interrupted": learned.interrupted,
            "failure": None if learned.failure is None else str(learned.failure),
        }
    )
    return found


def _stage(report: Report) -> dict[str, Any]:
    history = [
        {"step": step, "loss": loss, "held_out": held_out}
        for step, loss, held_out in report.history
    ]
    return asdict(report) | {"history": history}


def print_table(learned: Learned) -> None:
    """Print what each stage did, and how the student does on held-out samples."""
    show(Group(*parts(learned)))


def parts(learned: Learned) -> list[RenderableType]:
    """Lay out what each stage did, and how the student does on held-out samples."""
    return [_stages(learned.stages), _held_out(learned)]


def _stages(stages: tuple[Report, ...]) -> Table:
    table = bare_table()
    table.add_column("learned", no_wrap=True)
    for column in ("steps", "rate", "held-out loss", "minutes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("ended", overflow="fold")
    for stage in stages:
        table.add_row(
            stage.stage,
            f"{stage.steps:,}",
            f"{stage.rate:.2g}" if isfinite(stage.rate) else "–",
            f"{stage.start:.3g} → {stage.best:.3g}",
            f"{stage.seconds / 60:.1f}",
            stage.why,
        )
    return table


def _held_out(learned: Learned) -> str:
    before, after = learned.before, learned.after
    what = f"loss {before.loss:.3g} → {after.loss:.3g}"
    if before.agreement is not None and after.agreement is not None:
        what = f"agreement {before.agreement:.2%} → {after.agreement:.2%}, {what}"
    source = "a stream" if learned.samples is None else f"{learned.samples:,} samples"
    return (
        f"{what}, on {learned.held_out:,} samples held out and mixtures of them\n"
        f"learned from {source} on {learned.device}"
    )


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value
