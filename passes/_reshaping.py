"""Reshaping: constants cut and reshaped, for conv-to-gemm and gemm-to-conv."""

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.constants import Array
from pwopt.graph import Names, known_constant, leaves


class Reshaping:
    """Makes initialisers of old ones; layers that share the old one share the new one."""

    def __init__(self, graph: gs.Graph, names: Names) -> None:
        self._graph = graph
        self._names = names
        self._made: list[tuple[gs.Constant, gs.Constant]] = []  # old, new

    def make(
        self,
        tensor: gs.Tensor,
        values: Array,
        name: str,
        readers: Sequence[gs.Node],
        *,
        same: bool = True,
    ) -> gs.Constant:
        """Make one with `values` for `readers` of `tensor`.

        If `same`, the values are old ones. Where they are all of them, it takes over the old name
        if nobody else reads that, or returns the old one if the shape is the same, too.
        """
        old = known_constant(tensor)
        same = same and tensor is old and values.size == prod(old.shape)
        if same and values.shape == tuple(old.shape):
            return old
        made = [new for other, new in self._made if other is old]
        for new in made:
            if np.array_equal(new.values, values, equal_nan=True):
                return new
        taken = leaves(self._graph, old, readers) or any(new.name == old.name for new in made)
        name = old.name if same and not taken else self._names.tensor(name)
        new = gs.Constant(name, values)
        self._made.append((old, new))
        return new
