"""Splits of one layer that minimise the error of its outputs on data, in closed form.

A layer of weight W (Cout, Cin, *kernel) and bias b computes y = Σ_t W_t x_t + b, where x_t are
the channels of its input under tap t, one of T = prod(kernel). Each split comes from the moments
of the channels alone: of the outputs y, with bias, or of the inputs x, over all positions.

What the input under two taps has in common is given by `taps`, R of shape (T, T): R_ts is the
correlation of the inputs under t and s, times the share of output positions at which both lie
within the input rather than in its padding. The covariance of a patch is taken to be R ⊗ S, S
that of the channels. None stands for the identity: no padding, and neighbours that are
independent. `padded_taps` gives R for a padded layer with independent neighbours.

Work is done in float64; factors have the weight's own type, values beyond which become infinite.
ValueErrors tell of a rank that is out of range, of moments that are missing or without samples, and
of values that are not finite.

Source: Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks" (output side).
"""

from collections.abc import Sequence
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from pwopt.cost import Sides
from pwopt.lowrank.moments import Moments
from pwopt.lowrank.svd import Array, Factors

_FLOOR = 1e-10
"""Least eigenvalue of a covariance, relative to its largest: channels may be dead or dependent."""


class Splitter:
    """Splits one layer, on either side or on both.

    Decompositions that serve several splits are made when first needed, and kept.
    """

    def __init__(
        self,
        weight: Array,
        bias: Array,
        *,
        inputs: Moments | None = None,
        outputs: Moments | None = None,
        taps: Array | None = None,
    ) -> None:
        """Take a layer; moments of a side that is not split may be left out."""
        self._layer = weight
        self._bias = bias
        self._inputs = inputs
        self._outputs = outputs
        self._taps = taps

    def split(self, sides: Sides, rank: int) -> Factors:
        """Split at one rank: of both sides, if both are split."""
        if sides == "output":
            return self.output_side(rank)
        return self.input_side(rank) if sides == "input" else self.both_sides(rank, rank)

    def output_side(self, rank: int) -> Factors:
        """Split into k×k (Cin→r) and 1×1 (r→Cout) by the principal components of the outputs.

        No split of this rank has a smaller E‖y − ŷ‖² on the data: it is the sum of the smallest
        Cout − r eigenvalues of the outputs' covariance. Padding and stride need no thought. For a
        1×1 convolution or a linear layer, of weight (Cout, Cin), there is no better split at all.
        """
        basis = self._principal(rank)
        # In single precision, if that is the weight's: a wide one is not copied, and a rounding
        # error of the core is no worse than that of the cast which it must stand anyway.
        kind = np.promote_types(self._layer.dtype, np.float32)
        core = np.tensordot(basis.T.astype(kind), _as(kind, self._layer), axes=1)
        return _factors(self._layer, core=core, expand=basis, bias=self._expanded_bias(basis))

    def input_side(self, rank: int) -> Factors:
        """Split into 1×1 (Cin→r) and k×k (r→Cout); the bias makes up for the mean of what is lost.

        With V_t = W_t S^½, any 1×1 P = Q S^-½ of orthonormal rows Q is best followed by
        K_t = V_t Qᵀ, whatever R is. That leaves Σ_ts R_ts tr(V_t (I − QᵀQ) V_sᵀ), least for the
        leading eigenvectors of Σ_ts R_ts V_tᵀ V_s. So under a patch covariance R ⊗ S this is the
        global optimum, and alternating least squares under the same covariance has nothing to add.
        """
        reduce, core = self._reduced(self._weight, self._directions, rank)
        lost = self._weight - _composed(core, reduce)
        bias = _wide(self._bias) + _mean_output(lost, _given(self._inputs), self._taps)
        return _factors(self._layer, core=core, reduce=reduce, bias=bias)

    def both_sides(self, in_rank: int, out_rank: int) -> Factors:
        """Split into 1×1 (Cin→in_rank), k×k and 1×1 (out_rank→Cout).

        The error is that of `output_side` plus that of `input_side` for what the output side keeps;
        given the former the latter is optimal.
        """
        basis = self._principal(out_rank)
        projected = np.tensordot(basis.T, self._weight, axes=1)
        reduce, core = self._reduced(projected, self._directions_of(projected), in_rank)
        lost = _mean_output(projected - _composed(core, reduce), _given(self._inputs), self._taps)
        bias = self._expanded_bias(basis) + basis @ lost
        return _factors(self._layer, core=core, reduce=reduce, expand=basis, bias=bias)

    @cached_property
    def _weight(self) -> Array:
        return _wide(self._layer)

    @cached_property
    def _components(self) -> Array:
        """Principal components of the outputs as columns, the least one first."""
        outputs = _given(self._outputs)
        return _eigh(outputs, outputs.covariance)[1]

    @cached_property
    def _whitening(self) -> tuple[Array, Array]:
        return _whitening(_given(self._inputs), self._taps)

    @cached_property
    def _directions(self) -> Array:
        """Whitened inputs by how much they matter to the whole layer, the least one first."""
        return self._directions_of(self._weight)

    def _directions_of(self, weight: Array) -> Array:
        coloured = _coloured(weight, self._whitening[0], self._taps)
        vectors: Array = np.linalg.eigh(coloured.T @ coloured).eigenvectors
        return vectors

    def _principal(self, rank: int) -> Array:
        """Return the leading principal components of the outputs as columns: (Cout, r)."""
        _check_rank(rank, _given(self._outputs).mean.size)
        return self._components[:, : -rank - 1 : -1]

    def _expanded_bias(self, basis: Array) -> Array:
        mean = _given(self._outputs).mean
        bias: Array = mean + basis @ (basis.T @ (_wide(self._bias) - mean))
        return bias

    def _reduced(self, weight: Array, directions: Array, rank: int) -> tuple[Array, Array]:
        """Return the matrix P (r, Cin), its rows of length 1, and the core (Cout, r, *kernel)."""
        _check_rank(rank, _given(self._inputs).mean.size)
        root, inverse = self._whitening
        basis = directions[:, : -rank - 1 : -1]
        reduce = basis.T @ inverse
        # Where directions hardly occur in the data, rows are long: too long for half precision.
        lengths = np.linalg.norm(reduce, axis=1)
        core = np.tensordot(weight, root @ (basis * lengths), axes=(1, 0))
        return reduce / lengths[:, None], np.moveaxis(core, -1, 1)


def padded_taps(
    size: Sequence[int],
    kernel: Sequence[int],
    pads: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Array:
    """Return R for independent neighbours: the diagonal matrix of how often each tap sees input.

    Args:
        size: Height, width, … of the input.
        kernel: Taps along each of these axes.
        pads: All begins, then all ends, as ONNX has them.
        strides: Along each axis.
        dilations: Along each axis.
    """
    shares = np.ones(1)
    axes = len(size)
    for axis in range(axes):
        before, after = pads[axis], pads[axis + axes]
        span = (kernel[axis] - 1) * dilations[axis]
        starts = np.arange(-before, size[axis] + after - span, strides[axis])
        places = starts[:, None] + np.arange(kernel[axis]) * dilations[axis]
        seen = ((places >= 0) & (places < size[axis])).mean(axis=0)
        shares = np.outer(shares, seen).ravel()
    return np.diag(shares)


def _whitening(inputs: Moments, taps: Array | None) -> tuple[Array, Array]:
    """Return S^½ and S^-½. Without any variance there is nothing to whiten by: the identity.

    A tap that sees the input at a share c_t = R_tt of the positions, and 0 at the others, has the
    covariance c_t·Cov(x) + c_t(1 − c_t)·E[x]E[x]ᵀ. S is their sum, divided by the sum of the c_t.
    """
    seen = _seen(taps, 1)
    covariance = inputs.covariance + (seen @ (1 - seen) / seen.sum()) * np.outer(
        inputs.mean, inputs.mean
    )
    values, vectors = _eigh(inputs, covariance)
    if values[-1] <= 0:
        return np.eye(len(values)), np.eye(len(values))
    deviations = np.sqrt(np.maximum(values, _FLOOR * values[-1]))
    return (vectors * deviations) @ vectors.T, (vectors / deviations) @ vectors.T


def _coloured(weight: Array, root: Array, taps: Array | None) -> Array:
    """Return rows whose Gram matrix is Σ_ts R_ts (W_t S^½)ᵀ(W_s S^½): (Cout·T, Cin)."""
    out_channels, in_channels, *kernel = weight.shape
    matrices = weight.reshape(out_channels, in_channels, prod(kernel))
    if taps is not None:
        values, vectors = np.linalg.eigh(taps)
        matrices = matrices @ (vectors * np.sqrt(np.maximum(values, 0)))
    return np.moveaxis(matrices, 1, -1).reshape(-1, in_channels) @ root


def _mean_output(weight: Array, inputs: Moments, taps: Array | None) -> Array:
    """Return Σ_t W_t E[x_t]: (Cout,)."""
    matrices = weight.reshape(*weight.shape[:2], prod(weight.shape[2:]))
    mean: Array = matrices @ _seen(taps, matrices.shape[2]) @ inputs.mean
    return mean


def _seen(taps: Array | None, count: int) -> Array:
    """Return the share of positions at which each tap sees the input: (T,)."""
    return np.ones(count) if taps is None else np.diag(taps)


def _composed(core: Array, reduce: Array) -> Array:
    """Return core_t · reduce for every tap."""
    return np.moveaxis(np.tensordot(core, reduce, axes=(1, 0)), -1, 1)


def _eigh(moments: Moments, covariance: Array) -> tuple[Array, Array]:
    if not moments.count:
        raise ValueError("the moments hold no samples")
    if not np.isfinite(covariance).all():
        raise ValueError("the moments hold NaN or infinite values")
    values, vectors = np.linalg.eigh(covariance)
    return values, vectors


def _check_rank(rank: int, channels: int) -> None:
    if not 0 < rank < channels:
        raise ValueError(f"rank {rank} is not between 1 and {channels - 1}")


def _given(moments: Moments | None) -> Moments:
    if moments is None:
        raise ValueError("the moments of a side that is split are missing")
    return moments


def _wide(array: Array) -> Array:
    return _as(np.float64, array)


def _as(kind: npt.DTypeLike, array: Array) -> Array:
    if not np.isfinite(array).all():
        raise ValueError("the layer holds NaN or infinite values")
    return array.astype(kind, copy=False)


def _factors(
    weight: Array,
    *,
    core: Array,
    bias: Array,
    reduce: Array | None = None,
    expand: Array | None = None,
) -> Factors:
    """Give matrices the shape of 1×1 kernels, and everything the weight's type."""
    ones = (1,) * (weight.ndim - 2)

    def pointwise(matrix: Array | None) -> Array | None:
        return None if matrix is None else cast(matrix.reshape(*matrix.shape, *ones))

    def cast(array: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=weight.dtype)

    return Factors(cast(core), pointwise(reduce), pointwise(expand), cast(bias))
