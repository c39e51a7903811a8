"""A Front as a table to read, as JSON, or as a picture."""

import importlib.util
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from pwopt.errors import PwoptError, printable
from pwopt.files import atomic_write
from pwopt.report.style import bare_table, json_text, milliseconds, number, scaled
from pwopt.search.front import Front, Interval, Measure, Point, pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = (".png", ".svg")
"""Kinds of files that a picture can be written to."""

# Of the palette that all kinds of colour vision tell apart (Okabe and Ito 2008).
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#8C8C8C"

_AXES: dict[Measure, str] = {
    "top-1": "Change in top-1 accuracy (percentage points)",
    "agreement": "Agreement with the original (%)",
    "error": "Error of the outputs (better is up)",
}

# How a value of each measure is formatted, and its unit.
_FORMS: dict[Measure, tuple[str, str]] = {
    "top-1": ("+.2f", " points"),
    "agreement": (".2f", " %"),
    "error": (".3g", ""),
}


def to_json(front: Front) -> str:
    """Write the front as one JSON object.

    Its keys are the fields of `pwopt.search.front.Front`; ``original`` and each of ``points`` hold
    the fields of `pwopt.search.front.Point`, intervals as [low, high]. ``front`` lists the numbers
    in ``points`` of those that no other beats, the slowest first, as ``chosen`` is the number of
    the one that was written, or null.
    """
    best = [front.points.index(point) for point in pareto(front.points)]
    return json_text({**asdict(front), "front": best})


def write(front: Front, path: Path) -> None:
    """Write the front's JSON to a file.

    Raises:
        PwoptError: the file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(f"{to_json(front)}\n".encode())


def from_json(text: str, *, name: str = "<front>") -> Front:
    """Read what `to_json` wrote; messages call it `name`.

    Raises:
        PwoptError: it is not that.
    """
    try:
        fields = json.loads(text)
        if fields.pop("schema") != 1:
            raise ValueError
        del fields["front"]
        fields["original"] = _point(fields["original"])
        fields["points"] = tuple(map(_point, fields["points"]))
        return Front(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PwoptError(
            f"{name}: is not the JSON of a front that this version of pwopt writes; write it anew "
            "with --pareto"
        ) from error


def _point(fields: dict[str, Any]) -> Point:
    pairs = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return Point(**{**fields, **pairs})


def table(front: Front) -> Group:
    """Lay out the original and the points that no other beats, a line for each."""
    best = pareto(front.points)
    chosen = None if front.chosen is None else front.points[front.chosen]
    if chosen is not None and chosen not in best:
        best = sorted([*best, chosen], key=lambda point: point.speedup)
    grid = bare_table()
    grid.add_column("", no_wrap=True)
    grid.add_column("speed-up", no_wrap=True)
    grid.add_column("latency", justify="right", no_wrap=True)
    grid.add_column("predicted", justify="right", no_wrap=True)
    if front.original.measure != "error":
        unit = _FORMS[front.original.measure][1]
        grid.add_column(f"{front.original.measure},{unit}", no_wrap=True)
    if front.original.foretold_points is not None:
        grid.add_column("foretold", justify="right", no_wrap=True)
    for heading in ("error", "MACs", "params", "split"):
        grid.add_column(heading, justify="right")
    grid.add_row("original", *_row(front.original), style="dim")
    for point in best:
        is_chosen = point == chosen
        grid.add_row("chosen" if is_chosen else "", *_row(point), style="bold" if is_chosen else "")
    beaten = len(front.points) - len(best)
    note = f"; {beaten} more were tried and beaten in both speed and accuracy" if beaten else ""
    return Group(
        Text(f"{front.model}: speed against accuracy", style="bold"),
        grid,
        Text(f"{_conditions(front)}; [95 % intervals]{note}"),
        *([Text(f"Caution: {front.caution}", style="bold")] if front.caution else []),
    )


def _row(point: Point) -> list[str]:
    accuracy = []
    if point.measure != "error":
        accuracy = [_estimate(*_accuracy(point), _FORMS[point.measure][0], "")]
    if point.foretold_points is not None:
        accuracy += [number(0.0 - point.foretold_points, "+.2f")]
    return [
        _estimate(point.speedup, point.speedup_ci95, ".2f", "×"),
        milliseconds(point.measured_ms),
        "" if point.predicted_ms is None else milliseconds(point.predicted_ms),
        *accuracy,
        f"{point.error:.3g}",
        "?" if point.macs is None else scaled(point.macs),
        scaled(point.params),
        str(len(point.ranks)),
    ]


def _accuracy(point: Point) -> tuple[float, Interval | None]:
    """Return what is shown of its accuracy and the interval: a change, a percentage or an error."""
    if point.drop_points is not None:
        drop = point.drop_ci95
        return 0.0 - point.drop_points, drop and (0.0 - drop[1], 0.0 - drop[0])
    if point.agreement is not None:
        share = point.agreement_ci95
        return 100 * point.agreement, share and (100 * share[0], 100 * share[1])
    return point.error, None


def _estimate(value: float, interval: Interval | None, form: str, unit: str) -> str:
    text = number(value, form) + unit
    if interval is None or interval[0] == interval[1]:
        return text
    low, high = (number(end, form) for end in interval)
    return f"{text} [{low}, {high}]"


def _conditions(front: Front) -> str:
    threads = "1 thread" if front.threads == 1 else f"{front.threads} threads"
    return f"{front.samples:,} samples, {threads}, batch {front.batch}"


def require_picture(path: Path) -> None:
    """Make sure that `draw` can write to this file, before a long run.

    Raises:
        PwoptError: its ending is none of `PICTURES`, or matplotlib is not installed.
    """
    if path.suffix.lower() not in PICTURES:
        raise PwoptError(f"{path}: a picture must end in {' or '.join(PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise PwoptError(f"{path}: pictures need matplotlib; pip install pwopt[plots]")


def draw(front: Front, path: Path) -> None:
    """Draw measured speed-up against accuracy, better being up and to the right.

    The line joins the points that no other beats, the original among them.

    Raises:
        PwoptError: as `require_picture`, or the file cannot be written.
    """
    require_picture(path)
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    _draw_points(axes, front)
    _label(axes, front)
    with atomic_write(path) as file, warnings.catch_warnings():
        # A letter of the model's name that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(file, format=path.suffix.lower()[1:])


def _draw_points(axes: "Axes", front: Front) -> None:
    original, points = front.original, front.points
    chosen = None if front.chosen is None else points[front.chosen]
    line = pareto([original, *points])
    beaten = [point for point in points if point not in line and point is not chosen]
    best = [point for point in line if point is not original and point is not chosen]
    axes.plot(
        [point.speedup for point in line],
        [_accuracy(point)[0] for point in line],
        color=_BLUE,
        linewidth=2,
        zorder=2,
    )
    axes.axhline(_accuracy(original)[0], color=_GREY, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    _scatter(axes, [original], marker="s", markersize=8, color="black", label="original")
    _scatter(axes, best, marker="o", markersize=7, color=_BLUE, label="best trade-offs")
    if chosen:
        _scatter(axes, [chosen], marker="D", markersize=10, color=_VERMILION, label="chosen")
    _scatter(
        axes,
        beaten,
        marker="o",
        markersize=6,
        markerfacecolor="white",
        color=_GREY,
        label="beaten in speed and accuracy",
    )


def _scatter(axes: "Axes", points: Sequence[Point], *, color: str, **look: Any) -> None:
    """Draw points with their intervals, if there are any."""
    if not points:
        return
    values, intervals = zip(*map(_accuracy, points), strict=True)
    speedups = [point.speedup for point in points]
    axes.errorbar(
        speedups,
        values,
        xerr=_bars(speedups, [point.speedup_ci95 for point in points]),
        yerr=_bars(values, intervals),
        linestyle="none",
        color=color,
        ecolor=color,
        elinewidth=1.2,
        zorder=3,
        **look,
    )


def _bars(
    values: Sequence[float], intervals: Sequence[Interval | None]
) -> tuple[list[float], list[float]]:
    """Return how far the bars reach down and up."""
    ends = [interval or (value, value) for value, interval in zip(values, intervals, strict=True)]
    below = [max(value - low, 0) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(high - value, 0) for value, (_, high) in zip(values, ends, strict=True)]
    return below, above


def _label(axes: "Axes", front: Front) -> None:
    from matplotlib.ticker import MaxNLocator

    measure = front.original.measure
    axes.set_title(
        printable(front.model), parse_math=False, loc="left", fontsize=15, weight="bold", wrap=True
    )
    axes.set_xlabel("Measured speed-up (times as fast as the original)", fontsize=12)
    axes.set_ylabel(_AXES[measure], fontsize=12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    if measure == "error":
        axes.invert_yaxis()
    axes.tick_params(labelsize=11)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="lower left",
        fontsize=11,
        frameon=False,
        title=f"{_conditions(front)}\nbars: 95 % intervals",
        title_fontsize=10,
        alignment="left",
    )
    if front.chosen is not None:
        point = front.points[front.chosen]
        value, _ = _accuracy(point)
        form, unit = _FORMS[measure]
        axes.annotate(
            f"{point.speedup:.2f}×, {number(value, form)}{unit}",
            (point.speedup, value),
            xytext=(10, 10),
            textcoords="offset points",
            fontsize=12,
            weight="bold",
            color=_VERMILION,
        )
