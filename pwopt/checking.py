"""Original against rewritten, on the same inputs: numbers, accuracy, latency, size."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log10, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper

from pwopt import runtime
from pwopt.cost import tensor_bytes
from pwopt.data import Batch, RandomData, Samples, Source, fixed_batch, open_data, random_data
from pwopt.errors import DataError, ModelError, SpecError
from pwopt.model import Model

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many samples of it are done, and how many there are."""

EVALUATION_BATCH = 32
RESAMPLES = 10_000
TOP5_CLASSES = 10
"""Top-5 says something from so many classes on."""


@dataclass(frozen=True, slots=True)
class Equivalence:
    """How far the outputs differ, each measure that of the worst output of the model.

    With a the original's values of one output over all samples, b the rewritten model's:

    Attributes:
        max_abs: max |a − b|.
        max_rel: max |a − b| / max |a|. Relative to the output's largest value, not to each value
            by itself, so that values near zero do not blow it up.
        cosine: a·b / (|a| |b|), each output taken as one long vector.
        snr_db: 10 log₁₀(Σ a² / Σ (a − b)²) in decibels; None if no value differs.
        nonfinite: Values that are NaN or infinite in one of the two only, or differently so.
            They are left out of the measures above.
    """

    max_abs: float
    max_rel: float
    cosine: float
    snr_db: float | None
    nonfinite: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often the right class is the first (or among the first five), before and after.

    Attributes:
        metric: ``top-1`` or ``top-5``.
        samples: How many have a label.
        original: Per cent right.
        rewritten: Per cent right.
        drop_points: original − rewritten, in percentage points; negative for a gain.
        drop_ci95: Its 95 % interval: bootstrap over samples, both models on the same ones.
        top5: The same for top-5, from ten classes on.
    """

    metric: str
    samples: int
    original: float
    rewritten: float
    drop_points: float
    drop_ci95: tuple[float, float]
    top5: "Accuracy | None" = None


@dataclass(frozen=True, slots=True)
class Latency:
    """Median latencies of one run, interleaved; the speed-up's 95 % interval by bootstrap."""

    threads: int
    batch: int
    original_ms: float
    rewritten_ms: float
    speedup: float
    speedup_ci95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the model files, external weights included."""

    original_bytes: int
    rewritten_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters and MACs of one model."""

    params: int
    macs: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Parameters and MACs of both models."""

    original: Cost
    rewritten: Cost


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
        accuracy: Before and after; None without labels.
        agreement: Fraction of samples for which both models rank the same class first; None
            for random inputs, and where no output is class scores [N, classes].
        latency: Before and after.
        size: Of the files.
        cost: Parameters and MACs, where they were counted.
        passed: Whether all bounds are met and no value became NaN or infinite.
        reasons: Why not.
    """

    original: str
    rewritten: str
    data: Inputs
    equivalence: Equivalence
    accuracy: Accuracy | None
    agreement: float | None
    latency: Latency
    size: Size
    cost: Costs | None
    passed: bool
    reasons: tuple[str, ...]


def check(
    original: Model | str | Path,
    rewritten: Model | str | Path,
    *,
    data: Source | None = None,
    preprocess: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
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
        SpecError: options that do not go together.
        DataError: samples that do not fit the model.
        ModelError: a model that cannot be loaded or run, or whose inputs or outputs differ from
            the other's.
    """
    before, after = _Side.open(original), _Side.open(rewritten)
    size = _latency_batch(before.model, batch)
    if max_drop is not None and data is None:
        raise SpecError("--max-drop: random inputs cannot tell; add --data")
    samples = _samples(before.model, data, preprocess, shapes, batch=size or 1, seed=seed)
    report = progress or (lambda *_: None)

    result = _evaluate(before, after, samples, report)
    equivalence = result.equivalence()
    accuracy = result.accuracy(seed)
    agreement = None if isinstance(samples, RandomData) else result.agreement()
    reasons = [*_broken(equivalence, before, after), *_dropped(max_drop, accuracy, agreement)]

    report("latency", 0, None)
    if size is None:
        size = samples.rows(result.first.feeds) if isinstance(samples, RandomData) else 1
    latency = _latency(before, after, samples.resize(result.first.feeds, size), size, threads, seed)
    reasons += _too_slow(min_speedup, latency.speedup)
    return Verdict(
        original=before.name,
        rewritten=after.name,
        data=Inputs(samples.name, result.samples, isinstance(samples, RandomData), samples.assumed),
        equivalence=equivalence,
        accuracy=accuracy,
        agreement=agreement,
        latency=latency,
        size=Size(before.bytes(), after.bytes()),
        cost=None,
        passed=not reasons,
        reasons=tuple(reasons),
    )


def _latency(
    before: "_Side",
    after: "_Side",
    feeds: Mapping[str, Array],
    batch: int,
    threads: int,
    seed: int,
) -> Latency:
    timing = runtime.interleave(_sessions(before, after, threads), feeds)
    original_ms, rewritten_ms = timing.median_ms
    speedup = timing.speedup(0, 1, seed=seed)
    return Latency(threads, batch, original_ms, rewritten_ms, speedup.ratio, speedup.ci95)


def _broken(equivalence: Equivalence, before: "_Side", after: "_Side") -> list[str]:
    if not equivalence.nonfinite:
        return []
    return [
        f"{equivalence.nonfinite:,} output values are NaN or infinite in only one of "
        f"{before.name} and {after.name}"
    ]


def _dropped(
    max_drop: float | None, accuracy: Accuracy | None, agreement: float | None
) -> list[str]:
    if max_drop is None:
        return []
    if accuracy is None and agreement is None:
        raise DataError("--max-drop: no labels, and no output is class scores [N, classes]")
    if accuracy is not None:
        name, drop = accuracy.metric, accuracy.drop_points
    else:
        assert agreement is not None
        name, drop = "agreement", 100 * (1 - agreement)
    if drop <= max_drop:
        return []
    return [f"{name} fell by {drop:.2f} points; at most {max_drop:g} were allowed"]


def _too_slow(min_speedup: float | None, speedup: float) -> list[str]:
    if min_speedup is None or speedup >= min_speedup:
        return []
    return [f"runs {speedup:.2f} times as fast; at least {min_speedup:g} was wanted"]


# -- the two models ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two models, and what onnxruntime loads it from."""

    model: Model
    source: Model | Path

    @classmethod
    def open(cls, model: Model | str | Path) -> "_Side":
        if isinstance(model, Model):
            return cls(model, model)
        return cls(Model.load(model), Path(model))

    @property
    def name(self) -> str:
        return self.model.name

    def bytes(self) -> int:
        proto = self.model.to_proto() if isinstance(self.source, Model) else self.model.proto
        own = proto.ByteSize() if isinstance(self.source, Model) else self.source.stat().st_size
        external = sum(
            tensor_bytes(prod(t.dims), helper.tensor_dtype_to_np_dtype(t.data_type))
            for t in proto.graph.initializer
            if t.data_location == TensorProto.EXTERNAL
        )
        return own + external


def _sessions(before: _Side, after: _Side, threads: int) -> list[ort.InferenceSession]:
    """Load both; they must have the same inputs, and outputs of the same names and types."""
    sessions = [runtime.session(side.source, threads=threads) for side in (before, after)]
    for what, arguments in (
        ("inputs", [_signature(s.get_inputs(), shapes=True) for s in sessions]),
        ("outputs", [_signature(s.get_outputs(), shapes=False) for s in sessions]),
    ):
        if arguments[0] != arguments[1]:
            raise ModelError(
                f"{after.name}: its {what} ({arguments[1]}) are not those of {before.name} "
                f"({arguments[0]}); compare a model with its own rewrite"
            )
    return sessions


def _signature(arguments: Sequence[Any], *, shapes: bool) -> str:
    texts = []
    for argument in arguments:
        sizes = ",".join(str(d) if isinstance(d, int) else "?" for d in argument.shape)
        texts.append(f"{argument.name}: {argument.type}" + (f"[{sizes}]" if shapes else ""))
    return "; ".join(sorted(texts))


def _latency_batch(model: Model, batch: int | None) -> int | None:
    """The batch to measure with; None leaves it to the shapes of the inputs."""
    fixed = fixed_batch(model)
    if batch is not None and fixed is not None and batch != fixed:
        raise SpecError(f"--batch {batch}: {model.name} takes batches of {fixed} only")
    return fixed or batch


def _samples(
    model: Model,
    data: Source | None,
    preprocess: str | None,
    shapes: Mapping[str, Sequence[int]] | None,
    *,
    batch: int,
    seed: int,
) -> Samples:
    if data is not None:
        return open_data(data, model, preprocess=preprocess, batch=EVALUATION_BATCH, shapes=shapes)
    if preprocess is not None:
        raise SpecError("--preprocess: there is nothing to preprocess; add --data")
    return random_data(model, shapes, batch=batch, seed=seed)


# -- evaluation -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Difference:
    """Sums over all values of one output."""

    error: float = 0.0
    before: float = 0.0
    after: float = 0.0
    product: float = 0.0
    max_error: float = 0.0
    max_before: float = 0.0
    nonfinite: int = 0

    def add(self, before: Array, after: Array) -> None:
        a, b = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            equal = (a == b) | (np.isnan(a) & np.isnan(b))
            self.nonfinite += int((~finite & ~equal).sum())
            a, b = a[finite], b[finite]
        if not a.size:
            return
        error = a - b
        self.error += float(error @ error)
        self.before += float(a @ a)
        self.after += float(b @ b)
        self.product += float(a @ b)
        self.max_error = max(self.max_error, float(np.abs(error).max()))
        self.max_before = max(self.max_before, float(np.abs(a).max()))

    @property
    def max_rel(self) -> float:
        return self.max_error / max(self.max_before, _TINY) if self.max_error else 0.0

    @property
    def cosine(self) -> float:
        if not self.error:
            return 1.0
        lengths = sqrt(self.before) * sqrt(self.after)
        return self.product / lengths if lengths else 0.0

    @property
    def snr_db(self) -> float | None:
        return 10 * log10(max(self.before, _TINY) / self.error) if self.error else None


_TINY = float(np.finfo(np.float64).tiny)


@dataclass(slots=True)
class _Evaluation:
    """What is kept of the samples: sums and hits, no outputs."""

    first: Batch
    differences: dict[str, _Difference]
    samples: int = 0
    equal: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    """[n] for each batch: both models rank the same class first."""
    hits: dict[int, list[npt.NDArray[np.bool_]]] = field(default_factory=dict)
    """k → [2, n] for each labelled batch: the label is among the model's first k classes."""

    def equivalence(self) -> Equivalence:
        outputs = self.differences.values()
        ratios = [output.snr_db for output in outputs if output.snr_db is not None]
        return Equivalence(
            max_abs=max(output.max_error for output in outputs),
            max_rel=max(output.max_rel for output in outputs),
            cosine=min(output.cosine for output in outputs),
            snr_db=min(ratios, default=None),
            nonfinite=sum(output.nonfinite for output in outputs),
        )

    def agreement(self) -> float | None:
        return float(np.concatenate(self.equal).mean()) if self.equal else None

    def accuracy(self, seed: int) -> Accuracy | None:
        hits = {k: np.concatenate(batches, axis=1) for k, batches in self.hits.items()}
        if not hits:
            return None
        top5 = compare_hits("top-5", *hits[5], seed=seed) if 5 in hits else None
        return compare_hits("top-1", *hits[1], seed=seed, top5=top5)


def compare_hits(
    metric: str,
    original: npt.NDArray[np.bool_],
    rewritten: npt.NDArray[np.bool_],
    *,
    seed: int = 0,
    top5: Accuracy | None = None,
) -> Accuracy:
    """Accuracy of two models on the same samples, from which of them [samples] each got right.

    A sample lost, kept or gained counts 1, 0 or −1. Drawing samples with replacement makes the
    numbers of the three multinomial, so the bootstrap (Efron & Tibshirani 1993) draws those.
    """
    samples = len(original)
    lost, gained = int((original & ~rewritten).sum()), int((rewritten & ~original).sum())
    shares = np.array([lost, gained, samples - lost - gained]) / samples
    drawn = np.random.default_rng(seed).multinomial(samples, shares, size=RESAMPLES)
    low, high = np.percentile(100 * (drawn[:, 0] - drawn[:, 1]) / samples, [2.5, 97.5])
    return Accuracy(
        metric=metric,
        samples=samples,
        original=100 * int(original.sum()) / samples,
        rewritten=100 * int(rewritten.sum()) / samples,
        drop_points=100 * (lost - gained) / samples,
        drop_ci95=(float(low), float(high)),
        top5=top5,
    )


def _evaluate(before: _Side, after: _Side, data: Samples, progress: Progress) -> _Evaluation:
    """Run both on all samples."""
    sessions = _sessions(before, after, _cores())
    result: _Evaluation | None = None
    scores = None
    for batch in data:
        a, b = (
            _outputs(session, batch, data, side.name)
            for session, side in zip(sessions, (before, after), strict=True)
        )
        if result is None:
            result = _Evaluation(batch, {name: _Difference() for name in a})
            scores = next((name for name in a if _is_scores(a[name], batch.samples)), None)
        for name, difference in result.differences.items():
            if a[name].shape != b[name].shape:
                raise ModelError(
                    f"{after.name}: its output '{name}' has shape {list(b[name].shape)}, that of "
                    f"{before.name} {list(a[name].shape)}; compare a model with its own rewrite"
                )
            difference.add(a[name], b[name])
        if scores is not None:
            _count(result, _ranked(a[scores]), _ranked(b[scores]), batch, data)
        elif batch.labels is not None:
            raise DataError(
                f"{data.name}: has labels, but no output of {before.name} is class scores "
                "[N, classes]; leave the labels out"
            )
        result.samples += batch.samples
        progress("samples", result.samples, data.count)
    assert result is not None  # sources without samples raise
    return result


def _cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _outputs(
    session: ort.InferenceSession, batch: Batch, data: Samples, name: str
) -> dict[str, Array]:
    """The outputs for the samples of a batch, without the rows that filled it up."""
    outputs = runtime.run(session, batch.feeds, name=name)
    rows = data.rows(batch.feeds)
    if rows == batch.samples:
        return outputs
    return {
        name: value[: batch.samples] if value.ndim and len(value) == rows else value
        for name, value in outputs.items()
    }


def _is_scores(output: Array, samples: int) -> bool:
    """Whether an output is [samples, classes], with trailing axes of size 1 or without."""
    return (
        output.dtype.kind == "f"
        and output.ndim >= 2
        and len(output) == samples
        and output.shape[1] > 1
        and prod(output.shape[2:]) == 1
    )


def _ranked(scores: Array) -> npt.NDArray[np.intp]:
    """Classes of each sample, best first; of equal scores the lower class first."""
    flat = scores.reshape(scores.shape[:2])
    best: npt.NDArray[np.intp] = np.argsort(-flat, axis=1, kind="stable")
    return best


def _count(result: _Evaluation, before: Array, after: Array, batch: Batch, data: Samples) -> None:
    result.equal.append(before[:, 0] == after[:, 0])
    if batch.labels is None:
        return
    classes = before.shape[1]
    if batch.labels.min() < 0 or batch.labels.max() >= classes:
        raise DataError(
            f"{data.name}: labels {batch.labels.min()}..{batch.labels.max()}, but the model's "
            f"classes are 0..{classes - 1}"
        )
    right = np.stack([before, after]) == batch.labels[:, None]
    for k in (1, 5) if classes >= TOP5_CLASSES else (1,):
        result.hits.setdefault(k, []).append(right[:, :, :k].any(axis=2))
