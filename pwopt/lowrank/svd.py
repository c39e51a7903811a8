"""Splits of one convolution's weight that need no data: truncated SVDs by way of Gram matrices.

A weight W of shape (Cout, Cin, *kernel) is a row of T = prod(kernel) matrices W_t of shape
(Cout, Cin). Its unfoldings are [W_1 … W_T] (output side, rows are output channels) and
[W_1ᵀ … W_Tᵀ] (input side, rows are input channels). Both have one short side, so the leading
singular vectors come from the eigenvectors of a small Gram matrix instead of an SVD of a matrix
with T times as many columns.

Sources: Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks" (output side); Kim et
al. 2016, "Compression of Deep CNNs for Fast and Low Power Mobile Applications" (both sides,
Tucker-2); Vannieuwenhoven et al. 2012 (sequential truncation).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Sides = Literal["input", "output", "both"]


@dataclass(frozen=True, slots=True)
class Factors:
    """A split weight: `expand` ∘ `core` ∘ `reduce` ≈ the original.

    Shapes: reduce (r, Cin, 1, …), core (Cout or r, Cin or r, *kernel), expand (Cout, r, 1, …).
    """

    core: Array
    reduce: Array | None = None
    expand: Array | None = None


class Splitter:
    """Splits one weight of shape (Cout, Cin, *kernel), and tells what each split would keep.

    Decompositions are made when first needed and kept, so that asking for several ranks and sides
    and then splitting costs one eigendecomposition a side.

    Raises:
        ValueError: the weight holds NaN or infinite values.
    """

    def __init__(self, weight: Array) -> None:
        if not np.isfinite(weight).all():
            raise ValueError("the weight holds NaN or infinite values")
        self._dtype = weight.dtype
        # Half precision is widened. float32 is kept: BLAS and LAPACK run twice as fast on it, and
        # an error of 1e-6 in a basis changes the approximation error by its square.
        self._weight = weight.astype(np.promote_types(weight.dtype, np.float32), copy=False)

    def kept_energy(self, sides: Sides, rank: int) -> float:
        """Return the share of ‖W‖² that the split keeps, 0 to 1; a weight of zeros keeps all.

        By Eckart-Young, for one side, the share of the `rank` largest eigenvalues.
        """
        if sides == "input":
            return self._input.share(rank)
        if sides == "output":
            return self._output.share(rank)
        projected = _eigen(_unfold_output(self._projected(rank)))
        return self._input.share(rank) * projected.share(rank)

    def split(self, sides: Sides, rank: int) -> Factors:
        """Split the weight, minimising ‖W − Ŵ‖²; the factors have the weight's own type.

        One-sided splits are optimal (Eckart-Young). The two-sided one truncates the input side
        first, then the output side of what is left: at most √2 times the best error.

        Raises:
            ValueError: `rank` is not below the channels of a split side.
        """
        out_channels, in_channels, *kernel = self._weight.shape
        limits = {"input": in_channels, "output": out_channels}
        limit = limits.get(sides, min(limits.values()))
        if not 0 < rank < limit:
            raise ValueError(f"rank {rank} is not between 1 and {limit - 1}")
        ones = [1] * len(kernel)
        core, output = self._weight, None
        reduce = expand = None
        if sides != "output":
            core = self._projected(rank)
            basis = self._input.leading(rank)
            reduce = basis.T.reshape(rank, in_channels, *ones).astype(self._dtype)
        if sides != "input":
            output = self._output if sides == "output" else _eigen(_unfold_output(core))
            basis = output.leading(rank)
            core = np.tensordot(basis.T, core, axes=1)
            expand = basis.reshape(out_channels, rank, *ones).astype(self._dtype)
        return Factors(core.astype(self._dtype), reduce, expand)

    def _projected(self, rank: int) -> Array:
        """Return W_t·P for every tap, P the leading basis of the input side: (Cout, r, *kernel)."""
        projected = np.tensordot(self._weight, self._input.leading(rank), axes=(1, 0))
        return np.ascontiguousarray(np.moveaxis(projected, -1, 1))

    @cached_property
    def _input(self) -> "_Eigen":
        swapped = np.moveaxis(self._weight, 1, 0)
        return _eigen(swapped.reshape(len(swapped), -1))

    @cached_property
    def _output(self) -> "_Eigen":
        return _eigen(_unfold_output(self._weight))


class _Eigen(NamedTuple):
    """The eigendecomposition of an unfolding's Gram matrix, eigenvalues rising."""

    values: Array
    vectors: Array

    def share(self, rank: int) -> float:
        """Return the share of the `rank` largest eigenvalues in their sum."""
        total = float(self.values.sum())
        return float(self.values[-rank:].sum()) / total if total > 0 else 1.0

    def leading(self, rank: int) -> Array:
        """Return the eigenvectors of the `rank` largest eigenvalues as columns, largest first."""
        return self.vectors[:, : -rank - 1 : -1]


def _eigen(unfolding: Array) -> _Eigen:
    values, vectors = np.linalg.eigh(unfolding @ unfolding.T)
    return _Eigen(np.clip(values.astype(np.float64), 0.0, None), vectors)


def _unfold_output(weight: Array) -> Array:
    return weight.reshape(len(weight), -1)


def input_gram(weight: Array) -> Array:
    w = np.moveaxis(weight, 1, 0)
    w = w.reshape(len(w), -1)
    return w @ w.T
def output_gram(weight: Array) -> Array:
    w = weight.reshape(len(weight), -1)
    return w @ w.T
def kept_energy(gram: Array, rank: int) -> float:
    e = np.clip(np.linalg.eigvalsh(gram), 0, None)
    return float(e[-rank:].sum() / e.sum())
def both_kept_energy(weight: Array, rank_in: int, rank_out: int) -> float:
    return Splitter(weight).kept_energy("both", rank_in)
