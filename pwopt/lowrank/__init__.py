"""The linear algebra of splitting a convolution: numpy in, numpy out; knows no graph."""

from pwopt.lowrank.moments import Moments
from pwopt.lowrank.svd import Factors, Splitter

__all__ = ["Factors", "Moments", "Splitter"]
