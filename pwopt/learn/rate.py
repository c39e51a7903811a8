"""The learning rate: how it runs over the steps, and how a good one is found."""

from collections.abc import Sequence
from math import cos, pi

import numpy as np
import numpy.typing as npt

from pwopt.errors import LearnError

LOWEST = 1e-6
HIGHEST = 1e-2

TOLERANCE = 0.3
"""How much the logarithm of the loss may be above its least. A good start gets worse before it gets
better: rates that do no harm at once are so low that little is learned (docs/measured.md)."""

MARGIN = 3
"""How many times lower than the largest tolerable rate the one to learn with is."""


def schedule(step: int, steps: int, warm_up: float) -> float:
    """Return the share of the full rate at a step: linear warm-up, then cosine to almost zero.

    `warm_up` is the share of steps that it takes. Never quite 0: each step is to learn something.
    After Loshchilov & Hutter 2017 (SGDR, one period).
    """
    rising = max(round(warm_up * steps), 1)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (1 + cos(pi * (step - rising + 1) / (steps - rising + 1))) / 2


def ladder(points: int) -> list[float]:
    """Return rates from the lowest to the highest that a range test tries, equal steps in log."""
    return [float(rate) for rate in np.geomspace(LOWEST, HIGHEST, points)]


def pick(rates: Sequence[float], losses: Sequence[float], before: Sequence[float]) -> float:
    """Return the rate to learn with, after a range test (Smith 2017).

    It is a third of the largest one that does tolerable harm in a few dozen steps.

    Args:
        rates: Rising.
        losses: The loss met at each rate, as many as were tried; may be non-finite.
        before: The loss of the same batches with the weights as they were at the start.

    Raises:
        LearnError: no loss at the start is finite.
    """
    tried = min(len(rates), len(losses))
    start, met = np.array(before[:tried]), np.array(losses[:tried])
    usable = np.isfinite(start)
    if not usable.any():
        raise LearnError(
            "the loss is not finite on any batch, before any learning: look for NaN or infinity "
            "in the data and in the two models' outputs"
        )
    with np.errstate(all="ignore"):
        tiny = np.finfo(np.float64).tiny
        change = np.log(np.maximum(met, tiny) / np.maximum(start, tiny))[usable]
    change = np.where(np.isfinite(change), change, np.inf)
    smooth = _smooth(change, width=max(len(change) // 8, 3))
    good = np.flatnonzero(smooth <= smooth.min() + TOLERANCE)
    return float(np.array(rates[:tried])[usable][good[-1]]) / MARGIN


def _smooth(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Return the mean of each value and its neighbours, fewer at the ends."""
    half = width // 2
    return np.array([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])
