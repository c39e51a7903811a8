"""Original against rewritten, on the same inputs: numbers, accuracy, latency, size."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pwopt import analysis
from pwopt.comparing import Accuracy, Comparison, Equivalence, check_labels, class_scores
from pwopt.data import Batch, Samples, Source, fixed_batch, open_data, random_data
from pwopt.data.samples import fed_rows
from pwopt.errors import DataError, ModelError, SpecError
from pwopt.model import Model
from pwopt.pair import Latency, Pair, Side
from pwopt.progress import Progress
from pwopt.shapes import InputShapes, inputs


@dataclass(frozen=True, slots=True)
class FileSize:
    """Bytes of the model files, external weights included."""

    original_bytes: int
    rewritten_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters and MACs of both models, for one sample where the batch is open."""

    original: analysis.Size
    rewritten: analysis.Size


@dataclass(frozen=True, slots=True)
class Inputs:
    """What both models were run on.

    Attributes:
        source: The file, folder or callable; ``random inputs``.
        samples: How many.
        random: Whether they are random: they check numbers, not accuracy.
        assumed: What was assumed for the axes that the model leaves open, empty if nothing.
    """

    source: str
    samples: int
    random: bool
    assumed: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rewrite did. The fields are the keys of ``pwopt check --json``.

    Attributes:
        original: Name of the original model.
        rewritten: Name of the rewritten model.
        data: What both were run on.
        equivalence: How far the outputs differ.
        accuracy: Top-1 before and after; None without labels.
        top5: The same for the first five, from ten classes on.
        agreement: Fraction of samples for which both models rank the same class first; None
            for random inputs, and where no output is class scores [N, classes].
        latency: Before and after.
        size: Of the files.
        cost: Before and after; None where the shapes cannot be inferred.
        passed: Whether all bounds are met, finite values were compared, and none became NaN or
            infinite.
        reasons: Why not.
    """

    original: str
    rewritten: str
    data: Inputs
    equivalence: Equivalence
    accuracy: Accuracy | None
    top5: Accuracy | None
    agreement: float | None
    latency: Latency
    size: FileSize
    cost: Cost | None
    passed: bool
    reasons: tuple[str, ...]


def check(
    original: Model | str | Path,
    rewritten: Model | str | Path,
    *,
    data: Source | None = None,
    preprocess: str | None = None,
    shapes: InputShapes | None = None,
    threads: int = 1,
    batch: int | None = None,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verdict:
    """Run both models on the same inputs and compare.

    Args:
        original: A model or its file.
        rewritten: A model with the same inputs and outputs.
        data: Samples, see `open_data`; without, seeded random inputs.
        preprocess: How 8-bit images become inputs.
        shapes: Open axes of the inputs.
        threads: Threads to measure the latency with; numbers and accuracy use all cores.
        batch: Batch to measure the latency with; 1, or what the model demands.
        max_drop: Points of top-1 that may be lost; without labels, points of agreement.
        min_speedup: How many times faster the rewritten model must be.
        seed: Of random inputs and bootstraps.
        progress: Told how far it is.

    Raises:
        SpecError: options that are out of range or do not go together.
        DataError: samples that do not fit the model.
        ModelError: a model that cannot be loaded or run, or whose inputs or outputs differ from
            the other's.
    """
    _check_options(threads, batch, max_drop, min_speedup)
    if data is None and max_drop is not None:
        raise SpecError("--max-drop: random inputs cannot tell; add --data")
    if data is None and preprocess is not None:
        raise SpecError("--preprocess: there is nothing to preprocess; add --data")
    pair = Pair(Side.open(original), Side.open(rewritten))
    model = pair.original.model
    fixed = fixed_batch(inputs(model))
    if batch is not None and fixed not in (None, batch):
        raise SpecError(f"--batch {batch}: {pair.names[0]} takes batches of {fixed} only")
    if data is None:
        samples = random_data(model, shapes, batch=batch or 1, seed=seed)
    else:
        samples = open_data(data, model, preprocess=preprocess, shapes=shapes)
    report = progress or (lambda *_: None)

    comparison, first = _compare(pair, samples, report)
    equivalence = comparison.equivalence()
    accuracy = comparison.accuracy(1, seed=seed)
    agreement = None if data is None else comparison.agreement()
    reasons = [*_broken(equivalence, pair), *_dropped(max_drop, accuracy, agreement)]

    report("latency", 0, None)
    rows = batch or fixed or (fed_rows(first.feeds, samples.inputs) if data is None else 1)
    latency = pair.latency(
        samples.resize(first.feeds, rows), batch=rows, threads=threads, seed=seed
    )
    reasons += _too_slow(min_speedup, latency.speedup)
    one = samples.resize(first.feeds, fixed or 1)
    return Verdict(
        original=pair.names[0],
        rewritten=pair.names[1],
        data=Inputs(samples.name, comparison.samples, data is None, samples.assumed),
        equivalence=equivalence,
        accuracy=accuracy,
        top5=comparison.accuracy(5, seed=seed),
        agreement=agreement,
        latency=latency,
        size=FileSize(pair.original.file_bytes(), pair.rewritten.file_bytes()),
        cost=_cost(pair, {name: array.shape for name, array in one.items()}),
        passed=not reasons,
        reasons=tuple(reasons),
    )


def _check_options(
    threads: int, batch: int | None, max_drop: float | None, min_speedup: float | None
) -> None:
    if threads < 1:
        raise SpecError(f"--threads {threads}: must be at least 1")
    if batch is not None and batch < 1:
        raise SpecError(f"--batch {batch}: must be at least 1")
    if max_drop is not None and not max_drop >= 0:  # nor NaN
        raise SpecError(f"--max-drop {max_drop:g}: must be a number of points from 0")
    if min_speedup is not None and not 0 <= min_speedup < inf:
        raise SpecError(f"--min-speedup {min_speedup:g}: must be a finite number from 0")


def _compare(pair: Pair, samples: Samples, report: Progress) -> tuple[Comparison, Batch]:
    """Run both on all samples; return the first batch too."""
    comparison: Comparison | None = None
    for batch, before, after in pair.outputs(samples):
        if comparison is None:
            first, comparison = batch, Comparison(class_scores(before, batch.samples))
        if batch.labels is not None:
            scores = before[comparison.scores] if comparison.scores else None
            _check_labels(batch.labels, scores, samples.name, pair.names[0])
        comparison.add(before, after, batch.samples, batch.labels)
        report("samples", comparison.samples, samples.count)
    assert comparison is not None  # sources without samples raise
    return comparison, first


def _check_labels(
    labels: npt.NDArray[np.int64], scores: npt.NDArray[Any] | None, source: str, model: str
) -> None:
    if scores is None:
        raise DataError(
            f"{source}: has labels, but no output of {model} is class scores [N, classes]; "
            "leave the labels out"
        )
    check_labels(labels, scores.shape[1], source)


def _cost(pair: Pair, shapes: InputShapes) -> Cost | None:
    try:
        return Cost(*(analysis.size(s.model, shapes) for s in (pair.original, pair.rewritten)))
    except (ModelError, SpecError):
        return None


# -- bounds -----------------------------------------------------------------------------------


def _broken(equivalence: Equivalence, pair: Pair) -> list[str]:
    original, rewritten = pair.names
    reasons = []
    if equivalence.nonfinite:
        reasons.append(
            f"{equivalence.nonfinite:,} output values are NaN or infinite in only one of "
            f"{original} and {rewritten}"
        )
    if not equivalence.compared:
        reasons.append(
            f"no output value is finite in both {original} and {rewritten}: nothing was compared"
        )
    return reasons


def _dropped(
    max_drop: float | None, accuracy: Accuracy | None, agreement: float | None
) -> list[str]:
    if max_drop is None:
        return []
    if accuracy is not None:
        name, drop = accuracy.metric, accuracy.drop_points
    elif agreement is not None:
        name, drop = "agreement", 100 * (1 - agreement)
    else:
        raise DataError("--max-drop: no labels, and no output is class scores [N, classes]")
    if drop <= max_drop:
        return []
    return [f"{name} fell by {drop:.2f} points; at most {max_drop:g} were allowed"]


def _too_slow(min_speedup: float | None, speedup: float) -> list[str]:
    if min_speedup is None or speedup >= min_speedup:
        return []
    return [f"runs {speedup:.2f} times as fast; at least {min_speedup:g} was wanted"]
