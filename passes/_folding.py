"""Folding: what fold-affine and fold-affine-before have in common."""

import numpy as np
import onnx_graphsurgeon as gs

from pwopt import shapes
from pwopt.constants import Array, constant_value
from pwopt.errors import ModelError
from pwopt.graph import Names, is_only_reader, like, optional_input
from pwopt.model import Model


def layer_bias(layer: gs.Node, size: int) -> Array | str | None:
    """Return what a layer adds per channel, shape (size,), if anything, or why that is unknown."""
    tensor = None if layer.op == "MatMul" else optional_input(layer, 2)
    if tensor is None:
        return None
    bias = constant_value(tensor)
    if bias is None:
        return f"the {layer.op}'s bias is not a constant"
    if bias.shape and int(np.prod(bias.shape[:-1])) != 1:
        return f"the {layer.op}'s bias differs from row to row"
    scaled = layer.attrs.get("beta", 1.0) * bias.values.astype(np.float64)
    return np.broadcast_to(scaled.reshape(-1), size)


class Initializers:
    """Makes the initialisers that take the place of a layer's weight and bias."""

    def __init__(self, graph: gs.Graph, names: Names) -> None:
        self._graph = graph
        self._names = names
        self._shared: list[tuple[gs.Tensor, gs.Constant]] = []

    def make(self, node: gs.Node, index: int, values: Array, part: str) -> gs.Constant:
        """Make one for input number `index`, under its name if nobody else reads that.

        Nodes that shared theirs, and now need the same values, go on sharing.
        """
        old = node.inputs[index] if index < len(node.inputs) else gs.Variable.empty()
        if isinstance(old, gs.Constant) and is_only_reader(self._graph, node, old):
            self._shared = [pair for pair in self._shared if pair[1] is not old]
            return gs.Constant(old.name, values)
        for source, made in self._shared:
            if source is old and np.array_equal(made.values, values):
                return made
        new = gs.Constant(self._names.tensor(f"{node.outputs[0].name}.{part}"), values)
        self._shared.append((old, new))
        return new


def known_shapes(model: Model) -> dict[str, shapes.Shape]:
    """Infer shapes without assuming a size for open axes; empty where that fails."""
    try:
        return shapes.infer(model, shapes.Binding({}, {}))
    except ModelError:
        return {}


def folded(layer: gs.Node, inputs: list[gs.Tensor], output: gs.Tensor) -> gs.Node:
    """Make a layer like `layer` with other inputs; a new bias among them counts once."""
    attrs = dict(layer.attrs)
    if not any(bias is old for bias in inputs[2:] for old in layer.inputs[2:]):
        attrs.pop("beta", None)
    return like(layer, inputs, output, attrs)
