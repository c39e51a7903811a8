"""Mean and covariance of channels, gathered batch by batch and merged.

Source: Chan, Golub, LeVeque 1982, "Updating formulae and a pairwise algorithm for computing
sample variances".
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from pwopt.lowrank.svd import Array

_BLOCK = 1 << 20
"""Elements that are widened to float64 at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """First and second moments of rows of C channels, in float64; `+` merges two of them.

    `mean` has shape (C,). `scatter`, of shape (C, C), is the sum of (x − mean)(x − mean)ᵀ over
    the rows; centred sums lose no digits where a mean is large.
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, rows: Array) -> Self:
        """Take the moments of rows (n, C) of any floating-point type; n may be 0."""
        channels = rows.shape[1]
        moments = cls(0, np.zeros(channels), np.zeros((channels, channels)))
        # Not fewer rows than channels, or merging would cost more than the products.
        step = max(channels, _BLOCK // max(channels, 1), 1)
        for start in range(0, len(rows), step):
            block = rows[start : start + step].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            moments += cls(len(block), mean, block.T @ block)
        return moments

    def __add__(self, other: Self) -> Self:
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"{self.mean.size} and {other.mean.size} channels do not merge")
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        step = other.mean - self.mean
        share = other.count / count
        scatter = np.outer(self.count * share * step, step)
        scatter += self.scatter
        scatter += other.scatter
        return type(self)(count, self.mean + share * step, scatter)

    @property
    def covariance(self) -> Array:
        """E[(x − E[x])(x − E[x])ᵀ], of shape (C, C); zeros where there are no rows."""
        return self.scatter / max(self.count, 1)
