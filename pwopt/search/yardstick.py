"""How fast a model is against the original, and what it lost, on samples that did not make it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

import numpy as np
import numpy.typing as npt

from pwopt import analysis, runtime
from pwopt.calibration.samples import real
from pwopt.comparing import FEWEST, check_labels, class_scores, foretold_loss, one_class
from pwopt.data import Batch
from pwopt.data.samples import fed_rows
from pwopt.linear import Linear
from pwopt.model import Model
from pwopt.runtime import Array, Feeds, Speedup
from pwopt.search import latency
from pwopt.search.front import Interval, Point
from pwopt.search.latency import Plan
from pwopt.search.sensitivity import Harm
from pwopt.shapes import InputShapes, inputs

SECONDS = 3.0
"""How long a model and the original are timed in turn."""

ENOUGH = 100
"""Of fewer samples, one alone is more than a point."""


class Yardstick:
    """Holds the original against which models are measured.

    The samples come as they are, then perhaps as groups of copies, mixed with other samples, in the
    same order. They count one half and their copies the other: on its own training images a network
    may lose less than on unseen ones, on mixed ones it loses more. Intervals know that copies of
    one sample are no new evidence.

    Without labels, what the original makes of a sample as it is stands for its label, of the copies
    too: agreement on the samples, and on the copies how much better the original keeps to it.

    What is counted on so few samples is noisy, and of several models the luckiest is picked. So the
    original's probabilities on the copies foretell a loss as well, which changes smoothly.
    """

    def __init__(
        self,
        original: Model,
        groups: Sequence[Sequence[Batch]],
        feeds: Feeds,
        *,
        shapes: InputShapes | None = None,
        threads: int = 1,
        cores: int = 1,
        seed: int = 0,
        source: str = "the samples",
    ) -> None:
        """Run the original on all samples.

        Args:
            original: The model as it came.
            groups: Batches of the samples, once or in several copies.
            feeds: What latencies are measured on.
            shapes: Open axes of the inputs, to count MACs.
            threads: Threads that latencies are measured with.
            cores: Threads for all else.
            seed: Of the bootstrap.
            source: What messages call the samples.

        Raises:
            DataError: labels that are none of the model's classes.
            ModelError: onnxruntime cannot run the model.
        """
        self._original = original
        self._session = runtime.session(original, threads=threads)
        self._groups = groups
        self._feeds = feeds
        self._shapes = shapes
        self._threads = threads
        self._cores = cores
        self._seed = seed
        self._expected = [self._outputs(original, group) for group in groups]
        self._latency_ms = self._timed([]).median_ms[0]
        first = self._expected[0]
        self._scores = class_scores(first, self.samples)
        self._own_labels = None if self._scores is None else self._classes(first)
        given = [batch.labels for batch in groups[0] if batch.labels is not None]
        self._labels = np.concatenate(given) if len(given) == len(groups[0]) else None
        if self._labels is not None and self._scores is not None:
            check_labels(self._labels, first[self._scores].shape[1], source)

    @property
    def caution(self) -> str | None:
        """What makes the samples unfit to judge by, if anything."""
        own = self._own_labels
        if own is None or self._scores is None:
            return None
        if len(own) >= FEWEST and (found := self._misled(own)):
            return found
        if len(own) < ENOUGH:
            return f"one of {len(own)} samples is {100 / len(own):.1f} points: give more of them"
        return None

    def _misled(self, own: npt.NDArray[np.int64]) -> str | None:
        """Say what makes the original's own classes look wrong, if anything."""
        if found := one_class(own):
            return found
        assert self._scores is not None
        classes = self._expected[0][self._scores].shape[1]
        right = 1.0 if self._labels is None else float((own == self._labels).mean())
        if right < 0.1 + 0.9 / classes:  # hardly better than chance
            return f"the original gets only {right:.0%} right: look at labels and --preprocess"
        return None

    @property
    def samples(self) -> int:
        """How many samples there are, copies not counted."""
        return sum(batch.samples for batch in self._groups[0])

    @property
    def structure(self) -> str:
        """What the original's latency depends on, beside the machine; weights' values are not."""
        return latency.structure(self._original, {name: a.shape for name, a in self._feeds.items()})

    def speed(self, model: Model) -> Speedup:
        """Time a model against the original."""
        return self._timed([model]).speedup(0, 1, seed=self._seed)

    def _timed(self, models: Sequence[Model]) -> runtime.Timing:
        others = [runtime.session(model, threads=self._threads) for model in models]
        return runtime.interleave([self._session, *others], self._feeds, seconds=SECONDS)

    def fewer_macs(self, model: Model) -> float:
        """Return the original's MACs ÷ the model's; 1 where they are not known."""
        before, after = (analysis.size(m, self._shapes).macs for m in (self._original, model))
        return before / after if before and after else 1.0

    def in_place(
        self, model: Model, layers: Sequence[Linear], plan: Plan
    ) -> dict[str, tuple[float, float]]:
        """Time the layers of a plan, see `latency.in_place`."""
        return latency.in_place(model, layers, plan, self._feeds, threads=self._threads)

    def original(self) -> Point:
        """Return the original itself as a point: all others are measured against it."""
        point = self.point(self._original, None, {})
        once: Interval = (1.0, 1.0)
        return replace(point, speedup=1.0, speedup_ci95=once, measured_ms=self._latency_ms)

    def point(self, model: Model, predicted: float | None, ranks: Mapping[str, str]) -> Point:
        """Time and judge a model. `predicted` is its share of the original's latency, if known.

        Milliseconds are those of the original, measured once, times such a share: so they can be
        compared although the machine is not always equally fast.

        Raises:
            ModelError: onnxruntime cannot run the model.
        """
        speed = self.speed(model)
        size = analysis.size(model, self._shapes)
        results = [self._outputs(model, group) for group in self._groups]
        harm = Harm(self._scores)
        for expected, result in zip(self._expected, results, strict=True):
            harm.add(expected, result)
        drop = self._lost(results, self._labels)
        changed = self._lost(results, self._own_labels)
        return Point(
            speedup=speed.ratio,
            speedup_ci95=speed.ci95,
            predicted_ms=None if predicted is None else predicted * self._latency_ms,
            measured_ms=self._latency_ms / speed.ratio,
            macs=size.macs,
            params=size.params,
            drop_points=None if drop is None else 100 * float(drop.mean()),
            drop_ci95=None if drop is None else _percent(_interval(drop)),
            agreement=None if changed is None else min(1 - float(changed.mean()), 1.0),
            agreement_ci95=None if changed is None else _kept(_interval(changed)),
            foretold_points=self._foretold(results),
            error=harm.value,
            other_error=harm.error,
            ranks=ranks,
        )

    def _foretold(self, results: Sequence[Mapping[str, Array]]) -> float | None:
        """Return the points that the original's probabilities on mixed copies foretell."""
        if self._scores is None or len(results) == 1:
            return None
        lost = [
            foretold_loss(expected[self._scores], result[self._scores])
            for expected, result in zip(self._expected[1:], results[1:], strict=True)
        ]
        return float(np.nan_to_num(100 * np.mean(lost), nan=inf))

    def _outputs(self, model: Model, batches: Sequence[Batch]) -> dict[str, Array]:
        """Run a model on all samples of a group."""
        session = runtime.session(model, threads=self._cores)
        declared = inputs(model)
        parts = []
        for batch in batches:
            outputs = runtime.run(session, batch.feeds, name=model.name)
            rows = fed_rows(batch.feeds, declared)
            parts.append({n: real(array, rows, batch.samples) for n, array in outputs.items()})
        return {n: np.concatenate([np.atleast_1d(p[n]) for p in parts]) for n in parts[0]}

    def _classes(self, outputs: Mapping[str, Array]) -> npt.NDArray[np.int64]:
        assert self._scores is not None
        scores = outputs[self._scores]
        classes: npt.NDArray[np.int64] = scores.reshape(len(scores), -1).argmax(axis=1)
        return classes

    def _lost(
        self, results: Sequence[Mapping[str, Array]], labels: npt.NDArray[np.int64] | None
    ) -> Array | None:
        """Return for each sample 1 if it is lost and −1 if it is gained, averaged over copies."""
        if self._scores is None or labels is None:
            return None
        lost = []
        for expected, result in zip(self._expected, results, strict=True):
            before, after = (self._classes(outputs) == labels for outputs in (expected, result))
            lost.append(before.astype(float) - after)
        as_is, *copies = lost
        together: Array = (as_is + np.mean(copies, axis=0)) / 2 if copies else as_is
        return together


def _interval(values: Array) -> Interval:
    """Return the 95 % interval of the mean of paired differences, each from −1 to 1.

    As if there were two samples more, of which half a one is lost and half a one is gained, so that
    no loss among few samples is not taken for no loss at all (Agresti and Min 2005, "Simple
    improved confidence intervals for comparing matched proportions").
    """
    count = len(values) + 2
    mean = values.sum() / count
    variance = ((values**2).sum() + 1) / count - mean**2
    width = 1.96 * np.sqrt(variance / count)
    return float(max(mean - width, -1)), float(min(mean + width, 1))


def _percent(interval: Interval) -> Interval:
    return 100 * interval[0], 100 * interval[1]


def _kept(lost: Interval) -> Interval:
    return 1 - lost[1], min(1 - lost[0], 1.0)
