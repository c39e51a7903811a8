"""A Verdict as a table to read, or as JSON."""

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pwopt.checking import Accuracy, Equivalence, Verdict


def to_json(verdict: Verdict) -> dict[str, Any]:
    """Return the object that ``pwopt check --json`` prints."""
    result = {"schema": 1, **asdict(verdict)}
    if verdict.accuracy and verdict.accuracy.top5:
        del result["accuracy"]["top5"]["top5"]
    return result


def table(verdict: Verdict) -> Group:
    """Lay out before, after and the difference, a line for each measure."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column("", no_wrap=True)
    grid.add_column("original", justify="right", no_wrap=True)
    grid.add_column("rewritten", justify="right", no_wrap=True)
    grid.add_column("")
    for row in _rows(verdict):
        grid.add_row(*row)
    return Group(
        Text(f"{verdict.original} → {verdict.rewritten}", style="bold"),
        _source(verdict),
        grid,
        _outputs(verdict.equivalence),
        *(Text(f"failed: {reason}", style="bold red") for reason in verdict.reasons),
    )


def _source(verdict: Verdict) -> Text:
    data = verdict.data
    assumed = f" ({data.assumed} assumed)" if data.assumed else ""
    if data.random:
        return Text(
            f"{data.samples:,} seeded random inputs{assumed}: this checks numbers, not accuracy; "
            "add --data for that"
        )
    labels = "" if verdict.accuracy else ", no labels"
    return Text(f"{data.samples:,} samples of {data.source}{assumed}{labels}")


def _rows(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    latency, size, cost = verdict.latency, verdict.size, verdict.cost
    rows = []
    if verdict.accuracy:
        rows.append(_accuracy(verdict.accuracy))
        if verdict.accuracy.top5:
            rows.append(_accuracy(verdict.accuracy.top5))
    if verdict.agreement is not None:
        rows.append(("agreement", "", "", f"same class for {100 * verdict.agreement:.2f} %"))
    low, high = latency.speedup_ci95
    threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
    rows.append(
        (
            "latency",
            _milliseconds(latency.original_ms),
            _milliseconds(latency.rewritten_ms),
            f"{latency.speedup:.2f}× [{low:.2f}, {high:.2f}], {threads}, batch {latency.batch}",
        )
    )
    if cost:
        for name, before, after in (
            ("parameters", cost.original.params, cost.rewritten.params),
            ("MACs", cost.original.macs, cost.rewritten.macs),
        ):
            rows.append((name, f"{before:,}", f"{after:,}", _change(before, after)))
    rows.append(
        (
            "file size",
            f"{size.original_bytes / 1e6:,.2f} MB",
            f"{size.rewritten_bytes / 1e6:,.2f} MB",
            _change(size.original_bytes, size.rewritten_bytes),
        )
    )
    return rows


def _accuracy(accuracy: Accuracy) -> tuple[str, str, str, str]:
    low, high = accuracy.drop_ci95
    return (
        accuracy.metric,
        f"{accuracy.original:.2f} %",
        f"{accuracy.rewritten:.2f} %",
        f"{_signed(-accuracy.drop_points)} points [{_signed(-high)}, {_signed(-low)}]",
    )


def _outputs(equivalence: Equivalence) -> Text:
    if equivalence.snr_db is None:
        return Text("outputs are equal")
    return Text(
        f"outputs differ by up to {equivalence.max_abs:.3g} "
        f"({100 * equivalence.max_rel:.3g} % of the largest), "
        f"SNR {equivalence.snr_db:.1f} dB, cosine {equivalence.cosine:.6f}"
    )


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _change(before: int, after: int) -> str:
    return f"{_signed(100 * (after - before) / before, 1)} %" if before else ""


def _signed(value: float, digits: int = 2) -> str:
    """Format with a sign; a true minus, and none for zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(f"{value:.{digits}f}") == 0 else text
