"""The linear algebra of splitting a convolution: numpy in, numpy out; knows no graph."""

from pwopt.lowrank.svd import (
    Factors,
    Sides,
    Splitter,
    both_kept_energy,
    input_gram,
    kept_energy,
    output_gram,
)

__all__ = [
    "Factors",
    "Sides",
    "both_kept_energy",
    "input_gram",
    "kept_energy",
    "output_gram",
    "Splitter",
]
