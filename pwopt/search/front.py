"""What one run found: models of more speed and less accuracy, each measured whole."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Interval = tuple[float, float]
Measure = Literal["top-1", "agreement", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model, judged on samples that did not serve to make it.

    Attributes:
        speedup: Measured latency of the original ÷ its own, both timed in turn.
        speedup_ci95: Its 95 % interval.
        predicted_ms: What the latency table foretold; None where costs were not milliseconds.
        measured_ms: Its median latency.
        macs: Multiply-accumulates; None where the shapes are not known.
        params: Parameters.
        drop_points: Top-1 of the original less its own, in percentage points; None without labels.
        drop_ci95: Its 95 % interval, paired by sample.
        agreement: 1 less the drop of top-1 if what the original makes of the samples as they are
            is taken for right (0 to 1); None where no output is class scores.
        agreement_ci95: Its 95 % interval.
        foretold_points: Points of top-1 that the original's own probabilities on mixed copies
            foretell to be lost, see `pwopt.comparing.foretold_loss`; None without copies or where
            no output is class scores.
        error: How far the outputs are off: KL divergence of the class probabilities, or the
            relative error of other outputs.
        other_error: The part of it that is of outputs other than class scores.
        ranks: What each layer became, layers left alone not named: {"conv3": "both 64"}.
    """

    speedup: float
    speedup_ci95: Interval
    predicted_ms: float | None
    measured_ms: float
    macs: int | None
    params: int
    drop_points: float | None
    drop_ci95: Interval | None
    agreement: float | None
    agreement_ci95: Interval | None
    foretold_points: float | None
    error: float
    other_error: float
    ranks: Mapping[str, str]

    @property
    def measure(self) -> Measure:
        """By what its accuracy is judged: the first of the three that is known."""
        if self.drop_points is not None:
            return "top-1"
        return "agreement" if self.agreement is not None else "error"

    @property
    def loss(self) -> float:
        """What binds: the loss as counted, or as foretold if that is more."""
        return max(self.counted_loss, self.foretold_points or 0.0)

    @property
    def counted_loss(self) -> float:
        """Points of top-1 or of agreement lost; per cent of error of other outputs, if more."""
        return max(self._points(0), 100 * self.other_error)

    @property
    def worst_loss(self) -> float:
        """The same, but counted at that end of the 95 % interval at which more is lost."""
        return max(self._points(1), self.loss)

    def _points(self, worst: int) -> float:
        if self.drop_points is not None and self.drop_ci95 is not None:
            return (self.drop_points, self.drop_ci95[1])[worst]
        if self.agreement is not None and self.agreement_ci95 is not None:
            return 100 * (1 - (self.agreement, self.agreement_ci95[0])[worst])
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The points of one run.

    Attributes:
        model: Name of the original model.
        original: The original model itself, at speed-up 1.
        points: What was built and judged, in any order.
        chosen: Number in `points` of the one that was written; None if none was.
        threads: Threads of the latencies.
        batch: Batch of the latencies.
        samples: How many samples the accuracy was judged on.
        caution: What makes them unfit for that, if anything.

    Raises:
        ValueError: the points are not all judged by one measure.
    """

    model: str
    original: Point
    points: tuple[Point, ...]
    chosen: int | None
    threads: int
    batch: int
    samples: int
    caution: str | None = None

    def __post_init__(self) -> None:
        if len({point.measure for point in (self.original, *self.points)}) > 1:
            raise ValueError("the points of a front must be judged by the same measure")


def pareto(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other beats in both speed and counted loss, the slowest first.

    One that is as good in one and worse in the other is beaten; of equal ones, the first stays.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.speedup, point.counted_loss)):
        if not best or point.counted_loss < best[-1].counted_loss:
            best.append(point)
    return best[::-1]
