"""What a rewrite did: as tables or JSON."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pwopt.analysis import Size
from pwopt.rewriting import Event, PassReport
from pwopt.workflow import Rewritten


def to_json(result: Rewritten, output: Path) -> str:
    """Write the result as one JSON object."""
    events = [
        {
            "pass": report.name,
            "kind": event.kind,
            "where": event.where,
            "reason": event.reason,
            "data": dict(event.data),
        }
        for report in result.reports
        for event in report.events
    ]
    return json.dumps(
        {
            "schema": 1,
            "output": str(output),
            "pipeline": str(result.pipeline),
            "events": events,
            "before": asdict(result.before),
            "after": asdict(result.after),
        },
        indent=2,
        ensure_ascii=False,
    )


def print_table(result: Rewritten, model: Path, output: Path) -> None:
    """Print what each pass did, site by site, and the cost before and after."""
    console = Console(highlight=False, markup=False)
    for report in result.reports:
        console.print(f"{report.name}: {report.rewrote} rewritten, {report.skipped} left alone")
        _print_rewritten(console, report)
        _print_skipped(console, report)
    console.print(_sizes(result.before, result.after))
    if not result.changed:
        console.print("\nNothing was rewritten; the model is written as it came.")
    console.print(f"\nWrote {output}\nNext: pwopt check {model} {output}")


def _print_rewritten(console: Console, report: PassReport) -> None:
    rewrote = [event for event in report.events if event.kind == "rewrote"]
    if not any("macs" in event.data for event in rewrote):
        for reason, events in _grouped(rewrote):
            console.print(f"  {len(events):>3} × {reason}")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("  layer", overflow="fold")
    table.add_column("what")
    for column in ("predicted", "keeps"):
        table.add_column(column, justify="right")
    for event in rewrote:
        speedup, kept = event.data["predicted_speedup"], event.data["kept_energy"]
        table.add_row(
            f"  {event.where}", event.reason, f"{speedup:.1f}×", f"{100 * float(kept):.0f} %"
        )
    console.print(table)


def _print_skipped(console: Console, report: PassReport) -> None:
    skipped = [event for event in report.events if event.kind == "skipped"]
    for reason, events in _grouped(skipped):
        places = ", ".join(event.where for event in events[:3])
        more = ", …" if len(events) > 3 else ""
        console.print(f"  {len(events):>3} left: {reason} ({places}{more})")


def _grouped(events: list[Event]) -> list[tuple[str, list[Event]]]:
    counts = Counter(event.reason for event in events)
    return [(reason, [e for e in events if e.reason == reason]) for reason, _ in counts.most_common()]


def _sizes(before: Size, after: Size) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("before", "after", "ratio"):
        table.add_column(column, justify="right")
    for name, old, new in (
        ("parameters", before.params, after.params),
        ("MACs", before.macs, after.macs),
        ("nodes", before.nodes, after.nodes),
    ):
        ratio = f"{old / new:.2f}×" if new else "–"
        table.add_row(name, f"{old:,}", f"{new:,}", ratio)
    return table
