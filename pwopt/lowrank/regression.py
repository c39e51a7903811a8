"""Layers fitted to data by least squares: what they should put out, given what really comes in.

Behind layers that were split already, a layer of unknown weight B (Cout, d) and bias b (Cout,)
sees the features f (d,) of a position, e.g. a patch of its input, and should put out the target
t (Cout,), e.g. the original network's output there. `regress` solves

    minimise over B, b:  E‖t − B f − b‖² + δ ‖B − B₀‖²,   δ = damping · mean_i Var(f_i),

with B₀ a weight known from a closed form: directions of which the rows tell little stay at it.
Rows are taken in blocks, in their own type; what is summed over them is float64.

Sources: Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks" (asymmetric targets,
errors behind the Relu); Izenman 1975, "Reduced-rank regression for the multivariate linear model".
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from pwopt.lowrank.moments import Moments
from pwopt.lowrank.svd import Array

_BLOCK = 1 << 20
"""Elements of rows that are in work at a time."""

_PENALTIES = (0.01, 0.1, 1.0)
"""What z − y′ costs, step by step, next to the error behind the Relu (Zhang et al. 2015)."""


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """A fitted layer, y = expand · core · f + bias, in float64.

    Shapes: core (Cout, d) and no expand, or core (r, d) and expand (Cout, r); bias (Cout,).
    """

    core: Array
    bias: Array
    expand: Array | None = None

    def predict(self, features: Array) -> Array:
        """Return its outputs (n, Cout) for features (n, d), in their type, float32 at least."""
        dtype = np.promote_types(features.dtype, np.float32)
        outputs: Array = features @ self.core.T.astype(dtype)
        if self.expand is not None:
            outputs = outputs @ self.expand.T.astype(dtype)
        outputs += self.bias.astype(dtype)
        return outputs


def patches(
    maps: Array,
    positions: Array,
    kernel: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
) -> Array:
    """Return what a kernel sees at some positions of its output: (n, C·T), T = prod(kernel).

    Rows are ordered as weight.reshape(Cout, C·T) is: channels, then taps, the last axis fastest.
    The padding is zero. No more is made than is returned, and one tap's share of it.

    Args:
        maps: (N, C, *spatial), or (…, C) for a layer without a kernel.
        positions: Flat indices over N and the axes of the output, or over all rows, (n,).
        kernel: Taps along each spatial axis; () for a layer of rows.
        pads: All begins, then all ends, as ONNX has them.
        strides: Along each axis.
        dilations: Along each axis.
    """
    if not kernel:
        return maps.reshape(-1, maps.shape[-1])[positions]
    size, axes = maps.shape[2:], len(kernel)
    spans = [(length - 1) * step + 1 for length, step in zip(kernel, dilations, strict=True)]
    counts = [
        (size[axis] + pads[axis] + pads[axis + axes] - spans[axis]) // strides[axis] + 1
        for axis in range(axes)
    ]
    sample, *places = np.unravel_index(positions, (len(maps), *counts))
    taps, channels = prod(kernel), maps.shape[1]
    rows = np.empty((len(sample), channels, taps), maps.dtype)
    for index, tap in enumerate(np.ndindex(*kernel)):
        at = [
            place * strides[axis] - pads[axis] + tap[axis] * dilations[axis]
            for axis, place in enumerate(places)
        ]
        seen = np.all([(a >= 0) & (a < length) for a, length in zip(at, size, strict=True)], axis=0)
        inside = [a.clip(0, length - 1) for a, length in zip(at, size, strict=True)]
        rows[:, :, index] = maps[(sample, slice(None), *inside)]
        rows[~seen, :, index] = 0
    return rows.reshape(len(rows), channels * taps)


def regress(
    features: Array,
    targets: Array,
    prior: Array,
    *,
    rank: int | None = None,
    relu: bool = False,
    shift: Array | None = None,
    damping: float = 1e-3,
) -> Regression:
    """Fit weight and bias of a layer to rows, by the problem that heads this module.

    With `rank`, B has that rank: expand · core. With A = Cov(f) + δI and B̂ the solution of full
    rank, what B adds to the least loss is tr((B − B̂) A (B − B̂)ᵀ); so B = U Uᵀ B̂ is optimal, U the
    leading eigenvectors of B̂ A B̂ᵀ.

    With `relu`, the error counts behind a Relu: E‖relu(t + s) − relu(B f + b + s)‖², s the shift.
    From the solution without on, it alternates between B, b, fitted to z − s, and z, which
    elementwise is the minimiser of (relu(t + s) − relu(z))² + λ (z − y′)², y′ = B f + b + s, for
    rising λ. What is returned is on these rows never worse than the solution without.

    Args:
        features: (n, d).
        targets: (n, Cout), of the layer alone.
        prior: B₀, (Cout, d).
        rank: Below Cout.
        relu: Whether the layer's output, plus `shift`, goes to a Relu and nowhere else.
        shift: (n, Cout), what is added before the Relu, as by the shortcut of a residual block.
        damping: More than 0; keeps the condition of A below 1 + d / damping.

    Raises:
        ValueError: no rows, a rank out of range, or values that are not finite.
    """
    if rank is not None and not 0 < rank < len(prior):
        raise ValueError(f"rank {rank} is not between 1 and {len(prior) - 1}")
    if shift is None:
        shift = np.broadcast_to(np.zeros((), targets.dtype), targets.shape)
    _check(features, targets, prior, shift)
    ridge = _Ridge(features, prior, rank, damping)
    plain = ridge.fit(lambda rows: targets[rows])
    if not relu:
        return plain

    def auxiliary(solution: Regression, penalty: float) -> Callable[[slice], Array]:
        def wanted(rows: slice) -> Array:
            output = solution.predict(features[rows]) + shift[rows]
            return _auxiliary(output, targets[rows] + shift[rows], penalty) - shift[rows]

        return wanted

    def error(solution: Regression) -> float:
        return sum(
            _error(solution.predict(features[rows]) + shift[rows], targets[rows] + shift[rows])
            for rows in _blocks(features)
        )

    solution = plain
    for penalty in _PENALTIES:
        solution = ridge.fit(auxiliary(solution, penalty))
    return min(plain, solution, key=error)


class _Ridge:
    """The problem for given features; targets may change."""

    def __init__(self, features: Array, prior: Array, rank: int | None, damping: float) -> None:
        moments = Moments.of(features)
        covariance = moments.covariance
        self._ridge = damping * np.trace(covariance) / len(covariance) or 1.0  # no feature varies
        covariance.flat[:: len(covariance) + 1] += self._ridge
        # Its condition is bounded by the ridge, so the inverse is as good as a factorisation.
        self._inverse = np.linalg.inv(covariance)
        self._features = features
        self._mean = moments.mean
        self._prior = prior
        self._rank = rank

    def fit(self, targets: Callable[[slice], Array]) -> Regression:
        """Solve for the targets (rows, Cout) that are returned for rows of the features."""
        features, count = self._features, len(self._features)
        kind = np.promote_types(features.dtype, np.float32)
        middle = self._mean.astype(kind)
        total, moment = np.zeros(len(self._prior)), np.zeros(self._prior.shape)
        for rows in _blocks(features):
            wanted = targets(rows)
            total += wanted.sum(axis=0, dtype=np.float64)
            moment += wanted.T @ (features[rows] - middle)
        moment /= count
        moment += self._ridge * self._prior
        weight = moment @ self._inverse
        mean = total / count
        if self._rank is None:
            return Regression(weight, mean - weight @ self._mean)
        gained = weight @ moment.T
        gained /= np.abs(gained).max() or 1.0
        # In the rows' precision: what a basis lacks by 1e-6 costs the square of that.
        vectors = np.linalg.eigh(gained.astype(kind)).eigenvectors
        expand = vectors[:, : -self._rank - 1 : -1].astype(np.float64)
        core = expand.T @ weight
        return Regression(core, mean - expand @ (core @ self._mean), expand)


def _auxiliary(output: Array, wanted: Array, penalty: float) -> Array:
    """Return z, elementwise the minimiser of (relu(wanted) − relu(z))² + penalty·(z − output)².

    It is the better of the minimisers among z ≤ 0 and among z ≥ 0.
    """
    wanted = np.maximum(wanted, 0)
    off = np.minimum(output, 0)
    on = np.maximum((penalty * output + wanted) / (penalty + 1), 0)
    off_loss = wanted**2 + penalty * (off - output) ** 2
    on_loss = (wanted - on) ** 2 + penalty * (on - output) ** 2
    return np.where(off_loss < on_loss, off, on)


def _error(output: Array, wanted: Array) -> float:
    """Return the squared error behind a Relu."""
    difference = np.maximum(output, 0) - np.maximum(wanted, 0)
    return float((difference**2).sum(dtype=np.float64))


def _blocks(rows: Array) -> Iterator[slice]:
    step = max(_BLOCK // max(rows.shape[1], 1), 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _check(rows: Array, targets: Array, *others: Array) -> None:
    if not len(rows) == len(targets) > 0:
        raise ValueError(f"{len(rows)} rows cannot be fitted to {len(targets)} targets")
    if not all(np.isfinite(array).all() for array in (rows, targets, *others)):
        raise ValueError("what is to be fitted holds NaN or infinite values")
