"""The harm that one split alone does to what the network computes, on samples held out.

A walk through the network stops at each layer; what follows is loaded once, and run on what each
split makes of the layer's input.

In memory are, beside those of the walk, the network behind one layer, the outputs of one batch, and
splits of one layer with what they read and write, about `SIDE_BY_SIDE` bytes.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite

import numpy as np
import numpy.typing as npt

from pwopt import analysis, runtime
from pwopt.calibration import Stop, Walk
from pwopt.calibration.alone import Run, runner
from pwopt.calibration.samples import real
from pwopt.comparing import Outputs, class_scores, log_probabilities
from pwopt.data import Batch
from pwopt.data.samples import fed_rows
from pwopt.linear import Linear
from pwopt.lowrank import Factors
from pwopt.model import Model
from pwopt.progress import Progress
from pwopt.runtime import Array
from pwopt.search.latency import Option
from pwopt.shapes import inputs

Wide = npt.NDArray[np.float64]

SAMPLES = 96
"""Samples that are used, about: whole batches, taken evenly from those given; …"""

FEWEST = 24
"""… but no more than this of networks so large that …"""

MACS = 30 * 10**9
"""… running all of them takes more than so many multiply-accumulates."""

FLOOR = 1e-9
"""Harm below which interpolation, on a logarithmic scale, does not look."""

SIDE_BY_SIDE = 512 << 20
"""Bytes that the splits tried side by side hold; for the others, what is behind is run anew."""

_ROUNDING = 1e-12  # of sums of squares


def measure(
    model: Model,
    layers: Sequence[Linear],
    options: Mapping[str, Sequence[Option]],
    split: Callable[[Linear, Option], Factors],
    batches: Sequence[Batch],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, dict[Option, float]]:
    """Measure what each option of each layer does to the outputs, all other layers as they are.

    The harm is E[KL(p ‖ p̂)], p the class probabilities of the network and p̂ those with the layer
    split; they are the softmax of the class scores (`pwopt.comparing.class_scores`), unless these
    are probabilities already. To that comes for each other output E‖y − ŷ‖² ÷ E‖y − ȳ‖², ȳ its
    mean for each channel (axis 1), or for integers the share of values that differ.

    For each form of split, the lowest, the middle and the highest rank are tried. The others are
    interpolated linearly between the logarithms of rank and harm.

    Args:
        model: The network; stays as it is.
        layers: Layers of its graph.
        options: Those of each layer, by `Linear.where`; layers without any are left out.
        split: Makes the factors of a layer at an option; asked layer by layer.
        batches: Samples held out; rows that only fill up a batch do not count.
        threads: Threads within one operator.
        progress: Told how many splits are tried.

    Returns:
        Layer (`where`) → option → harm: 0 for none, infinite where values become NaN or infinite.
        Layers that nobody reads, or that read constants alone, are missing.

    Raises:
        ModelError: onnxruntime cannot run the network.
    """
    split_layers = [layer for layer in layers if options.get(layer.where)]
    if not split_layers:
        return {}
    macs = analysis.size(model).macs or 1
    chosen = _chosen(batches, min(SAMPLES, max(FEWEST, MACS // macs)))
    probe = _Probe(model, chosen, split, threads)
    tried = {layer.where: _tried(options[layer.where]) for layer in split_layers}
    done, total = 0, sum(map(len, tried.values()))
    harms = {}
    for stop in Walk(model, split_layers, chosen, threads=threads):
        where = stop.layer.where
        if progress:
            progress("trying splits", done, total)
        harms[where] = interpolated(options[where], probe.harms(stop, tried[where]))
        done += len(tried[where])
    if progress:
        progress("trying splits", total, total)
    return harms


def interpolated(
    options: Sequence[Option], measured: Mapping[Option, float]
) -> dict[Option, float]:
    """Return the harm of all options, given that of some ranks of each form."""
    harms = {}
    for option in options:
        known = sorted((o.rank, harm) for o, harm in measured.items() if o.sides == option.sides)
        ranks, values = np.array(known, np.float64).T
        logarithm = np.interp(np.log(option.rank), np.log(ranks), np.log(np.maximum(values, FLOOR)))
        harms[option] = measured.get(option, float(np.exp(logarithm)))
    return harms


def _chosen(batches: Sequence[Batch], wanted: int) -> list[Batch]:
    """Pick batches evenly that have about so many samples together."""
    samples = sum(batch.samples for batch in batches)
    count = min(len(batches), max(1, len(batches) * wanted // samples))
    return [batches[round(index)] for index in np.linspace(0, len(batches) - 1, count)]


def _tried(options: Sequence[Option]) -> list[Option]:
    """Pick the lowest, the middle and the highest rank of each form of split."""
    forms: dict[str, list[Option]] = defaultdict(list)
    for option in sorted(options):
        forms[option.sides].append(option)
    picked = (found[i] for found in forms.values() for i in (0, len(found) // 2, -1))
    return [*dict.fromkeys(picked)]


class _Probe:
    """Runs the network behind a layer on what splits of it make of its input."""

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        split: Callable[[Linear, Option], Factors],
        threads: int,
    ) -> None:
        declared = inputs(model)
        self._model = model
        self._split = split
        self._threads = threads
        self._sizes = [(fed_rows(batch.feeds, declared), batch.samples) for batch in batches]
        whole = runtime.run(
            runtime.session(model, threads=threads), batches[0].feeds, name=model.name
        )
        self._scores = class_scores(whole, self._sizes[0][0])

    def harms(self, stop: Stop, options: Sequence[Option]) -> dict[Option, float]:
        """Return the harm of each option of the layer that the walk stops at."""
        layer, tail = stop.layer, runtime.session(stop.tail(), threads=self._threads)
        x, read = next(stop.feeds())
        held = layer.size.params * x.itemsize + x.nbytes + read[layer.where].nbytes
        side_by_side = max(1, SIDE_BY_SIDE // held)

        def run(read: Mapping[str, Array]) -> Outputs:
            return runtime.run(tail, read, name=self._model.name)

        found: dict[Option, float] = {}
        for start in range(0, len(options), side_by_side):
            splits = {
                option: self._runner(layer, option)
                for option in options[start : start + side_by_side]
            }
            harms = {option: Harm(self._scores) for option in splits}
            for (rows, samples), (x, read) in zip(self._sizes, stop.feeds(), strict=True):
                teacher = _real(run(read), rows, samples)
                for option, split in splits.items():
                    student = run({**read, layer.where: split(x)})
                    harms[option].add(teacher, _real(student, rows, samples))
            found |= {option: harm.value for option, harm in harms.items()}
        return found

    def _runner(self, layer: Linear, option: Option) -> Run:
        return runner(self._model, layer, self._split(layer, option), self._threads)


def _real(outputs: Outputs, rows: int, samples: int) -> dict[str, Array]:
    return {name: real(array, rows, samples) for name, array in outputs.items()}


class Harm:
    """How far a student's outputs are from the teacher's, batch by batch; see `measure`."""

    def __init__(self, scores: str | None) -> None:
        """Start with nothing; `scores` names the output that holds class scores, if any."""
        self._scores = scores
        self._divergence = 0.0
        self._samples = 0
        self._errors: dict[str, _RelativeError] = defaultdict(_RelativeError)

    def add(self, teacher: Outputs, student: Outputs) -> None:
        """Add a batch. A student's output of another shape than the teacher's counts as zeros."""
        for name, wanted in teacher.items():
            given = student[name]
            if given.shape != wanted.shape:
                given = np.zeros_like(wanted)
            with np.errstate(invalid="ignore", over="ignore"):
                if name == self._scores:
                    self._divergence += float(_divergence(wanted, given).sum())
                    self._samples += len(wanted)
                else:
                    self._errors[name].add(wanted, given)

    @property
    def value(self) -> float:
        """The sum over outputs; infinite where it is not a number."""
        harm = max(self._divergence, 0.0) / max(self._samples, 1) + self.error
        return harm if isfinite(harm) else inf

    @property
    def error(self) -> float:
        """The part of it that is of outputs other than the class scores."""
        error = sum(error.value for error in self._errors.values())
        return error if isfinite(error) else inf


def _divergence(teacher: Array, student: Array) -> Wide:
    """Return KL(p ‖ p̂) of each sample in nats, of scores (samples, classes, 1, …).

    Scores that are probabilities already are taken as such.
    """
    p, q = log_probabilities(teacher), log_probabilities(student)
    result: Wide = np.where(np.isneginf(p), 0, np.exp(p) * (p - q)).sum(axis=1)
    return result


class _RelativeError:
    """E‖y − ŷ‖² ÷ E‖y − ȳ‖² of one output."""

    def __init__(self) -> None:
        self._error = 0.0
        self._squares = 0.0
        self._sums: Wide | float = 0.0
        self._count = 0

    def add(self, teacher: Array, student: Array) -> None:
        """Add a batch of the same shape."""
        wanted, given = teacher.astype(np.float64), student.astype(np.float64)
        if teacher.dtype.kind != "f":  # numbers of classes, say: right or wrong
            self._error += float((wanted != given).sum())
            self._squares += wanted.size
            return
        self._error += float(((wanted - given) ** 2).sum())
        self._squares += float((wanted**2).sum())
        others = tuple(axis for axis in range(wanted.ndim) if axis != 1)
        self._sums += wanted.sum(axis=others)
        self._count += wanted.size // (wanted.shape[1] if wanted.ndim > 1 else 1)

    @property
    def value(self) -> float:
        """Relative to the variance; to the squares, where the output does not vary."""
        if not self._error:
            return 0.0
        variance = self._squares - float(np.sum(np.square(self._sums))) / max(self._count, 1)
        if variance <= _ROUNDING * self._squares:
            variance = self._squares
        return self._error / variance if variance else inf
