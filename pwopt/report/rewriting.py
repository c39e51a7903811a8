"""What a rewrite did: as tables or JSON."""

import shlex
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from pwopt.analysis import Size
from pwopt.errors import printable
from pwopt.report import front as curve
from pwopt.report import learning
from pwopt.report.style import bare_table, json_text, milliseconds, scaled, show
from pwopt.rewriting import Event
from pwopt.workflow import Rewritten

_SPLIT = {"sides", "rank", "predicted_speedup"}
_PLACES = 3  # how many layers stand for all that share a reason


def to_json(result: Rewritten, output: Path) -> str:
    """Write the result as one JSON object."""
    front = result.front
    calibrated = None
    if front is not None and front.chosen is not None:
        calibrated = {
            "original": asdict(front.original),
            "chosen": asdict(front.points[front.chosen]),
            "threads": front.threads,
            "batch": front.batch,
            "samples": front.samples,
        }
    return json_text(
        {
            "output": str(output),
            "pipeline": result.pipeline,
            "events": [
                {"pass": report.name, **asdict(event)}
                for report in result.reports
                for event in report.events
            ],
            "before": asdict(result.before),
            "after": asdict(result.after),
            **({"calibrated": calibrated} if calibrated else {}),
            **({"learned": learning.content(result.learned)} if result.learned else {}),
        }
    )


def print_table(result: Rewritten) -> None:
    """Print what each pass did, site by site, and the cost before and after."""
    parts: list[RenderableType] = []
    for report in result.reports:
        if not report.events:
            continue
        parts.append(f"{report.name}: {report.rewrote} rewritten, {report.skipped} left alone")
        rewrote = [event for event in report.events if event.kind == "rewrote"]
        skipped = [event for event in report.events if event.kind == "skipped"]
        splits = [event for event in rewrote if event.data.keys() >= _SPLIT]
        if splits:
            parts.append(_splits(splits))
        parts.append(_reasons([event for event in rewrote if event not in splits], "×"))
        parts.append(_reasons(skipped, "left:"))
    parts.append(_sizes(result.before, result.after))
    if result.front is not None:
        parts.append(curve.table(result.front))
    if result.learned is not None:
        parts += learning.parts(result.learned)
    if not result.changed:
        parts.append("Nothing was rewritten; the model is written as it came.")
    show(Group(*parts))


def next_step(model: Path, output: Path) -> str:
    """Say where the result is, and what the user may do now: two lines."""
    check = shlex.join(["pwopt", "check", str(model), str(output)])
    return f"Wrote {output}\nNext: {check}"


def _splits(events: list[Event]) -> Table:
    table = bare_table()
    table.add_column("  layer", overflow="fold", min_width=12)
    timed = all("after" in event.data for event in events)
    for column in (
        ("split", "before", "after", "faster") if timed else ("split", "predicted", "keeps")
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for event in events:
        data = event.data
        split, faster = f"{data['sides']} {data['rank']}", f"{data['predicted_speedup']:.1f}×"
        rest = (
            (_time(data, "before"), _time(data, "after"), faster)
            if timed
            else (faster, f"{data['kept_energy']:.0%}")
        )
        table.add_row(f"  {printable(event.where)}", split, *rest)
    return table


def _time(data: Mapping[str, int | float | str], when: str) -> str:
    time = float(data[when])
    return milliseconds(time) if data["unit"] == "ms" else scaled(time)


def _reasons(events: list[Event], what: str) -> Table:
    """Write one line a reason, with the first places; further lines of it are indented."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for reason, alike in _grouped(events):
        places = ", ".join(printable(event.where) for event in alike[:_PLACES])
        more = ", …" if len(alike) > _PLACES else ""
        table.add_row(f"{len(alike):>5} {what}", f"{reason} ({places}{more})")
    return table


def _grouped(events: list[Event]) -> list[tuple[str, list[Event]]]:
    """Group by reason, the most frequent one first."""
    groups: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        groups[event.reason].append(event)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _amount(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _sizes(before: Size, after: Size) -> Table:
    table = bare_table()
    table.add_column("")
    for column in ("before", "after", "ratio"):
        table.add_column(column, justify="right")
    for name, old, new in (
        ("parameters", before.params, after.params),
        ("MACs", before.macs, after.macs),
        ("nodes", before.nodes, after.nodes),
    ):
        ratio = f"{old / new:.2f}×" if old and new else "–"
        table.add_row(name, _amount(old), _amount(new), ratio)
    return table
