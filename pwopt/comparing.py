"""Two models' outputs on the same samples: how far apart, how often right. Arrays in, numbers out.

No output is kept: all measures are sums over batches.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import log10, prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from pwopt.errors import DataError

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
Flags = npt.NDArray[np.bool_]

RESAMPLES = 10_000
FEWEST = 8
"""Of fewer samples, all may be of one class, or all be taken for another."""

TOP5_CLASSES = 10
"""Top-5 says something from so many classes on."""

LEAST_PROBABILITY = 1e-12
"""What a probability of 0 is taken for where its logarithm is needed."""

_TINY = float(np.finfo(np.float64).tiny)


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
        nonfinite_both: Values that are NaN or infinite in both alike; left out too.
        compared: Values that are finite in both: all that the measures are of.
    """

    max_abs: float
    max_rel: float
    cosine: float
    snr_db: float | None
    nonfinite: int
    nonfinite_both: int
    compared: int


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
    """

    metric: str
    samples: int
    original: float
    rewritten: float
    drop_points: float
    drop_ci95: tuple[float, float]


class Comparison:
    """What is known after some batches.

    Attributes:
        scores: The output that holds class scores, if any; see `class_scores`.
        samples: How many were compared.
    """

    def __init__(self, scores: str | None) -> None:
        self.scores = scores
        self.samples = 0
        self._differences: dict[str, _Difference] = defaultdict(_Difference)
        # [n] for each batch: both models rank the same class first
        self._same_class: list[Flags] = []
        # k → [2, n] for each batch: the label is among the model's first k classes
        self._hits: dict[int, list[Flags]] = defaultdict(list)

    def add(
        self,
        before: Outputs,
        after: Outputs,
        samples: int,
        labels: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Add a batch: outputs of the same names and shapes, and class numbers [samples]."""
        self.samples += samples
        for name in before:
            self._differences[name].add(before[name], after[name])
        if self.scores is None:
            return
        ranked = np.stack([_ranked(outputs[self.scores]) for outputs in (before, after)])
        self._same_class.append(ranked[0, :, 0] == ranked[1, :, 0])
        if labels is None:
            return
        right = ranked == labels[:, None]
        classes = ranked.shape[2]
        for k in (1, 5) if classes >= TOP5_CLASSES else (1,):
            self._hits[k].append(right[:, :, :k].any(axis=2))

    def equivalence(self) -> Equivalence:
        """Tell how far the outputs differ."""
        outputs = self._differences.values()
        ratios = [output.snr_db for output in outputs if output.snr_db is not None]
        return Equivalence(
            max_abs=max(output.max_error for output in outputs),
            max_rel=max(output.max_rel for output in outputs),
            cosine=min(output.cosine for output in outputs),
            snr_db=min(ratios, default=None),
            nonfinite=sum(output.nonfinite for output in outputs),
            nonfinite_both=sum(output.nonfinite_both for output in outputs),
            compared=sum(output.compared for output in outputs),
        )

    def agreement(self) -> float | None:
        """Return the share of samples with the same class first in both; None without scores."""
        return float(np.concatenate(self._same_class).mean()) if self._same_class else None

    def accuracy(self, k: int, *, seed: int = 0) -> Accuracy | None:
        """Return top-k accuracy for k = 1 or 5; None without labels, and top-5 of few classes."""
        if k not in self._hits:
            return None
        return compare_hits(f"top-{k}", *np.concatenate(self._hits[k], axis=1), seed=seed)


def one_class(classes: Array) -> str | None:
    """Say that a model takes all samples for one class, where it does so; nothing of a few.

    Args:
        classes: What it takes each sample for, [samples].
    """
    if len(classes) < FEWEST or (classes != classes[0]).any():
        return None
    return f"the original takes all samples for class {classes[0]}: look at --preprocess"


def class_scores(outputs: Outputs, samples: int) -> str | None:
    """Find the first output that is [samples, classes], trailing axes of size 1 left aside."""
    for name, output in outputs.items():
        if (
            output.dtype.kind == "f"
            and output.ndim >= 2
            and len(output) == samples
            and output.shape[1] > 1
            and prod(output.shape[2:]) == 1
        ):
            return name
    return None


def check_labels(labels: npt.NDArray[np.int64], classes: int, source: str) -> None:
    """Check that labels are among a model's classes.

    Raises:
        DataError: they are not.
    """
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"{source}: labels {labels.min()}..{labels.max()}, but the model's classes are "
            f"0..{classes - 1}"
        )


def are_probabilities(scores: Array) -> bool:
    """Tell whether scores (samples, classes, 1, …) are: not negative, and their sum 1."""
    flat = scores.reshape(len(scores), -1).astype(np.float64)
    return bool((flat >= 0).all() and np.allclose(flat.sum(axis=1), 1, atol=1e-3))


def log_probabilities(scores: Array) -> npt.NDArray[np.float64]:
    """Return the logarithms of the class probabilities of scores (samples, classes, 1, …).

    Scores that are probabilities already are taken as such; of others the softmax is taken.
    """
    flat = scores.reshape(len(scores), -1).astype(np.float64)
    if are_probabilities(flat):
        logarithms: npt.NDArray[np.float64] = np.log(np.maximum(flat, LEAST_PROBABILITY))
        return logarithms
    flat = flat - flat.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = flat - np.log(np.exp(flat).sum(axis=1, keepdims=True))
    return result


def foretold_loss(before: Array, after: Array) -> npt.NDArray[np.float64]:
    """Return how much of a right answer each sample is expected to lose, of two models' scores.

    Where the second model says ĉ instead of c, that is p_c − p_ĉ, p being the class probabilities
    of the first: c is right with the one probability, ĉ with the other. No labels are needed, and a
    sample that is undecided counts little. Too much is foretold where the first model is surer
    than it is right (Guo et al. 2017, "On Calibration of Modern Neural Networks").

    Args:
        before: Scores (samples, classes, 1, …) of the first model.
        after: Those of the second.

    Returns:
        (samples,), from 0 to 1.
    """
    probabilities = np.exp(log_probabilities(before))
    second = after.reshape(len(after), -1).argmax(axis=1)
    lost: npt.NDArray[np.float64] = (
        probabilities.max(axis=1) - probabilities[np.arange(len(second)), second]
    )
    return lost


def compare_hits(
    metric: str,
    original: Flags,
    rewritten: Flags,
    *,
    seed: int = 0,
) -> Accuracy:
    """Compare two models' accuracy, from which samples [samples] each got right.

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
    )


def _ranked(scores: Array) -> npt.NDArray[np.intp]:
    """Rank the classes of each sample, best first; of equal scores the lower class first."""
    flat = scores.reshape(scores.shape[:2])
    best: npt.NDArray[np.intp] = np.argsort(-flat, axis=1, kind="stable")
    return best


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
    nonfinite_both: int = 0
    compared: int = 0

    def add(self, before: Array, after: Array) -> None:
        a, b = before.astype(np.float64).ravel(), after.astype(np.float64).ravel()
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            equal = (a == b) | (np.isnan(a) & np.isnan(b))
            self.nonfinite += int((~finite & ~equal).sum())
            self.nonfinite_both += int((~finite & equal).sum())
            a, b = a[finite], b[finite]
        self.compared += a.size
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
