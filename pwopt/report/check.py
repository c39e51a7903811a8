"""A Verdict as a table to read, or as JSON."""

from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Group
from rich.text import Text

from pwopt.checking import Verdict
from pwopt.comparing import Accuracy, Equivalence
from pwopt.report.style import bare_table, json_text, milliseconds, minus, number, scaled, show


def to_json(verdict: Verdict) -> str:
    """Write the verdict as one JSON object."""
    return json_text(asdict(verdict))


def print_table(verdict: Verdict) -> None:
    """Print before, after and the difference, a line for each measure."""
    show(table(verdict))


def table(verdict: Verdict) -> Group:
    """Lay out before, after and the difference, a line for each measure."""
    grid = bare_table()
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
            "add --data for that",
            style="yellow",
        )
    labels = "" if verdict.accuracy else ", no labels"
    return Text(f"{data.samples:,} samples of {data.source}{assumed}{labels}")


def _rows(verdict: Verdict) -> Iterator[tuple[str, str, str, str]]:
    latency, size, cost = verdict.latency, verdict.size, verdict.cost
    for accuracy in (verdict.accuracy, verdict.top5):
        if accuracy:
            yield _accuracy(accuracy)
    if verdict.agreement is not None:
        yield "agreement", "", "", f"same class for {100 * verdict.agreement:.2f} %"
    low, high = latency.speedup_ci95
    threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
    yield (
        "latency",
        milliseconds(latency.original_ms),
        milliseconds(latency.rewritten_ms),
        f"{latency.speedup:.2f}× [{low:.2f}, {high:.2f}], {threads}, batch {latency.batch}",
    )
    if cost:
        before, after = cost.original, cost.rewritten
        yield _amounts("parameters", before.params, after.params, "fewer", "more")
        yield _amounts("MACs", before.macs, after.macs, "fewer", "more")
    yield _amounts(
        "file size", size.original_bytes, size.rewritten_bytes, "smaller", "larger", unit="B"
    )


def _accuracy(accuracy: Accuracy) -> tuple[str, str, str, str]:
    low, high = accuracy.drop_ci95
    return (
        accuracy.metric,
        f"{accuracy.original:.2f} %",
        f"{accuracy.rewritten:.2f} %",
        f"{_points(-accuracy.drop_points)} points [{_points(-high)}, {_points(-low)}]",
    )


def _outputs(equivalence: Equivalence) -> Text:
    if not equivalence.compared:
        text = "outputs cannot be compared"
    elif equivalence.snr_db is None:
        finite = not (equivalence.nonfinite or equivalence.nonfinite_both)
        text = "outputs are equal" if finite else "outputs are equal where both are finite"
    else:
        numbers = f"SNR {equivalence.snr_db:.1f} dB, cosine {equivalence.cosine:.6f}"
        text = (
            f"outputs differ by up to {equivalence.max_abs:.3g} "
            f"({100 * equivalence.max_rel:.3g} % of the largest), {minus(numbers)}"
        )
    if equivalence.nonfinite_both:
        text += f"; {equivalence.nonfinite_both:,} values are NaN or infinite in both"
    return Text(text)


def _amounts(
    name: str, before: int | None, after: int | None, less: str, more: str, unit: str = ""
) -> tuple[str, str, str, str]:
    if before is None or after is None:
        known = ["?" if amount is None else scaled(amount, unit) for amount in (before, after)]
        return name, known[0], known[1], "?"
    ratio = max(before, after) / max(min(before, after), 1)
    change = f"{ratio:.2f}× {less if after < before else more}" if after != before else "the same"
    return name, scaled(before, unit), scaled(after, unit), change


def _points(change: float) -> str:
    return number(change, "+.2f")
