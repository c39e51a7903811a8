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
from typing import Any

import numpy as np
import numpy.typing as npt

from pwopt.cost import Sides

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Factors:
    """A split weight: `expand` ∘ `core` ∘ `reduce` ≈ the original.

    Shapes: reduce (r, Cin, 1, …), core (Cout or r, Cin or r, *kernel), expand (Cout, r, 1, …).
    `bias`, of shape (Cout,), is that of the last factor; None where the layer's own stays.
    """

    core: Array
    reduce: Array | None = None
    expand: Array | None = None
    bias: Array | None = None


class Splitter:
    """Splits one weight of shape (Cout, Cin, *kernel), and tells what each split would keep.

    Decompositions that serve several splits are made when first needed, and kept.

    Raises:
        ValueError: the weight holds NaN or infinite values.
    """

    def __init__(self, weight: Array) -> None:
        if not np.isfinite(weight).all():
            raise ValueError("the weight holds NaN or infinite values")
        self._dtype = weight.dtype
        # Scaled by a power of two, which is exact, so that squares neither overflow nor vanish.
        self._exponent = int(np.frexp(np.abs(weight).max(initial=0).astype(np.float64))[1])
        # Half precision is widened. float32 is kept: BLAS and LAPACK run twice as fast on it, and
        # an error of 1e-6 in a basis changes the approximation error by its square.
        wide = weight.astype(np.promote_types(weight.dtype, np.float32), copy=False)
        self._weight = np.ldexp(wide, -self._exponent)

    def kept_energy(self, sides: Sides, rank: int) -> float:
        """Return the share of ‖W‖² that the split keeps, 0 to 1; a weight of zeros keeps all.

        By Eckart-Young, for one side, the share of the `rank` largest eigenvalues.
        """
        if sides == "output":
            return _share(self._output_energies, rank)
        kept = _share(self._input.eigenvalues, rank)
        if sides == "input":
            return kept
        return kept * _share(np.linalg.eigvalsh(_gram(self._projected(rank))), rank)

    def split(self, sides: Sides, rank: int) -> Factors:
        """Split the weight, minimising ‖W − Ŵ‖²; the factors have the weight's own type.

        Values beyond that type become infinite.

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
        core = self._weight
        reduce = expand = None
        if sides != "output":
            core = self._projected(rank)
            basis = _leading(self._input.eigenvectors, rank)
            reduce = basis.T.reshape(rank, in_channels, *ones).astype(self._dtype)
        if sides != "input":
            basis = _leading(np.linalg.eigh(_gram(core)).eigenvectors, rank)
            core = np.tensordot(basis.T, core, axes=1)
            expand = basis.reshape(out_channels, rank, *ones).astype(self._dtype)
        with np.errstate(over="ignore"):
            core = np.ldexp(core, self._exponent).astype(self._dtype)
        return Factors(core, reduce, expand)

    @cached_property
    def _input(self) -> Any:
        """Eigenvalues and eigenvectors of the input side; both serve several splits."""
        return np.linalg.eigh(_gram(np.moveaxis(self._weight, 1, 0)))

    @cached_property
    def _output_energies(self) -> Array:
        return np.linalg.eigvalsh(_gram(self._weight))

    def _projected(self, rank: int) -> Array:
        """Return W_t·P for every tap, P the leading basis of the input side: (Cout, r, *kernel)."""
        basis = _leading(self._input.eigenvectors, rank)
        projected = np.tensordot(self._weight, basis, axes=(1, 0))
        return np.ascontiguousarray(np.moveaxis(projected, -1, 1))


def _gram(weight: Array) -> Array:
    """Return the inner products of the rows of the unfolding along the first axis."""
    unfolding = weight.reshape(len(weight), -1)
    gram: Array = unfolding @ unfolding.T
    return gram


def _share(energies: Array, rank: int) -> float:
    """Return the share of the `rank` largest of the rising `energies` in their sum."""
    energies = np.clip(energies.astype(np.float64), 0.0, None)  # rounding leaves tiny negatives
    total = float(energies.sum())
    return float(energies[-rank:].sum()) / total if total > 0 else 1.0


def _leading(vectors: Array, rank: int) -> Array:
    """Return the columns that belong to the `rank` largest eigenvalues, largest first."""
    return vectors[:, : -rank - 1 : -1]
