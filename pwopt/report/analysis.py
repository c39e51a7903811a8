"""An Analysis as a console table, JSON or CSV."""

import csv
import io
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from statistics import median_high
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pwopt.analysis import Analysis, Layer
from pwopt.candidates import Candidate
from pwopt.errors import printable
from pwopt.report.style import PLAIN_WIDTH, bare_table, json_text, plain, scaled, stdout

_COLUMNS = (
    "layer", "kernel", "channels", "output", "params", "MACs", "share", "ms", "split, or why not",
)  # fmt: skip
_TEXTS = {"layer", "kernel", "split, or why not"}
_NAME_WIDTH = 32
_FULL_WIDTH = 118  # below it, a terminal gets a table without the output sizes and parameters
_ALIKE = 3  # layers left alone for one reason are listed one by one up to this many


def to_text(analysis: Analysis) -> str:
    """Write the table without colour."""
    return plain(_layout(analysis, PLAIN_WIDTH))


def to_json(analysis: Analysis) -> str:
    """Write the analysis as one JSON object."""
    return json_text(asdict(analysis)) + "\n"


def to_csv(analysis: Analysis) -> str:
    """Write a row per layer, its candidate's fields in columns of their own, sizes as 1x3x32x32."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _columns(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_flat, analysis.layers))
    return buffer.getvalue()


def print_table(analysis: Analysis) -> None:
    """Print the table on stdout: in colour on a terminal, plain where it is piped."""
    console = stdout()
    if console.is_terminal:
        console.print(_layout(analysis, console.width))
    else:
        console.file.write(to_text(analysis))


def next_step(analysis: Analysis, path: str) -> str:
    """Say what the user may do now: one line."""
    ranks = [layer.candidate.rank for layer in analysis.layers if layer.candidate]
    if not ranks:
        return "Nothing here gets cheaper with a 1×1 bottleneck."
    rank = analysis.bottleneck or median_high(ranks)
    return f"Next: pwopt rewrite {shlex.quote(path)} --bottleneck {rank}"


# -- table ------------------------------------------------------------------------------------


def _layout(analysis: Analysis, width: int) -> Group:
    table = _table(analysis, full=width >= _FULL_WIDTH)
    return Group(Text(_headline(analysis)), table, Text(_summary(analysis)))


def _headline(analysis: Analysis) -> str:
    totals = analysis.totals
    inputs = ", ".join(f"{name} {_times(shape)}" for name, shape in analysis.inputs.items())
    lines = [
        f"{analysis.model}: {totals.params:,} parameters ({totals.weight_bytes / 1e6:.1f} MB), "
        f"{'?' if totals.macs is None else f'{totals.macs:,}'} MACs",
        f"for {inputs or 'no input'}",
    ]
    if analysis.assumed:
        assumed = ", ".join(f"{symbol}={size}" for symbol, size in analysis.assumed.items())
        lines[-1] += f" (assumed: {assumed}; --shape sets another)"
    if analysis.run_ms is not None:
        lines.append(f"one run takes {analysis.run_ms:.2f} ms")
    return "\n".join(lines)


def _table(analysis: Analysis, *, full: bool) -> Table:
    left_out = set() if full else {"output", "params"}
    if analysis.run_ms is None:
        left_out.add("ms")
    table = bare_table()
    for column in _COLUMNS:
        if column not in left_out:
            side: Literal["left", "right"] = "left" if column in _TEXTS else "right"
            last = column == _COLUMNS[-1]
            table.add_column(column, justify=side, no_wrap=not last, min_width=14 if last else None)
    for layers in _rows(analysis.layers):
        cells = zip(_COLUMNS, (*_geometry(layers), *_amounts(layers)), strict=True)
        shown = [Text(cell) for column, cell in cells if column not in left_out]
        table.add_row(*shown, style=None if layers[0].candidate else "dim")
    return table


def _rows(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Yield the layers of each row: one, or all that are left alone for the same reason."""
    reasons: dict[str | None, list[Layer]] = {layer.why_not: [] for layer in layers}
    for layer in layers:
        reasons[layer.why_not].append(layer)
    for reason, alike in reasons.items():
        if reason is None or len(alike) <= _ALIKE:
            yield from ([layer] for layer in alike)
        else:
            yield alike


def _geometry(layers: Sequence[Layer]) -> tuple[str, ...]:
    first = layers[0]
    if len(layers) > 1:
        more = f" + {len(layers) - 1} more"
        return _short(first.name, _NAME_WIDTH - len(more)) + more, "", "", ""
    kernel = first.op if first.kernel is None else _times(first.kernel)
    if first.stride is not None and any(step > 1 for step in first.stride):
        steps = sorted(set(first.stride))
        kernel += f" /{steps[0] if len(steps) == 1 else _times(first.stride)}"
    size = first.output_shape[2:] if first.kernel is not None and first.output_shape else ()
    channels = f"{_known(first.in_channels)} → {_known(first.out_channels)}"
    return _short(first.name, _NAME_WIDTH), kernel, channels, _times(size)


def _amounts(layers: Sequence[Layer]) -> tuple[str, ...]:
    macs = _total([layer.macs for layer in layers])
    share = _total([layer.mac_share for layer in layers])
    time = _total([layer.time_ms for layer in layers])
    return (
        scaled(sum(layer.params for layer in layers)),
        "?" if macs is None else scaled(macs),
        "?" if share is None else f"{share:.1%}",
        "" if time is None else f"{time:.3f}",
        _verdict(layers[0]),
    )


def _verdict(layer: Layer) -> str:
    found = layer.candidate
    if found is None:
        return layer.why_not or ""
    speedup = f"{found.predicted_speedup:.1f}×"
    return f"{found.sides} {found.rank}: {speedup}, keeps {found.kept_energy:.0%}"


def _summary(analysis: Analysis) -> str:
    lines = []
    found = [layer for layer in analysis.layers if layer.candidate]
    if found:
        which = "the one candidate" if len(found) == 1 else f"all {len(found)} candidates"
        saved_macs = scaled(sum(layer.saved_macs for layer in found))
        before = analysis.totals.macs
        of = "" if before is None else f" of {scaled(before)}"
        lines.append(f"Splitting {which} would save {saved_macs}{of} MACs.")
        if analysis.run_ms is not None:
            saved = sum(layer.saved_ms for layer in found)
            lines[-1] += f" It should save {saved:.2f} of {analysis.run_ms:.2f} ms."
    if any(layer.macs is None for layer in analysis.layers):
        lines.append("Where a shape is not known, MACs are not counted ('?').")
    if analysis.uncounted:
        lines.append(
            f"{analysis.uncounted} layers inside subgraphs and local functions are not counted."
        )
    return "\n".join(lines)


def _total(amounts: Sequence[float | None]) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known else None


def _short(name: str, width: int) -> str:
    """Keep the end of a long name, where names differ."""
    name = printable(name)
    return name if len(name) <= width else "…" + name[1 - width :]


def _known(size: int | None) -> str:
    return "?" if size is None else str(size)


def _times(sizes: Sequence[int | None]) -> str:
    return "×".join(map(_known, sizes))


# -- CSV --------------------------------------------------------------------------------------


def _columns() -> list[str]:
    own = [field.name for field in fields(Layer) if field.name not in ("candidate", "why_not")]
    return [*own, *(f"candidate_{field.name}" for field in fields(Candidate)), "why_not"]


def _flat(layer: Layer) -> dict[str, Any]:
    row = asdict(layer)
    split = row.pop("candidate") or {}
    row |= {f"candidate_{key}": value for key, value in split.items()}
    return {
        key: "x".join(map(_known, value)) if isinstance(value, tuple) else value
        for key, value in row.items()
    }
