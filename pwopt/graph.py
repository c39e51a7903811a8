"""Small tools for reading and editing a gs.Graph, shared by analysis and passes.

Nodes and tensors are compared with `is`: GraphSurgeon's `==` compares names only.
"""

from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from pwopt.model import Model

STANDARD_DOMAINS = ("", "ai.onnx", None)


def is_op(node: gs.Node, *ops: str) -> bool:
    """Tell whether `node` is one of the standard operators `ops`."""
    return node.op in ops and node.domain in STANDARD_DOMAINS


def constant(tensor: gs.Tensor) -> gs.Constant | None:
    """Return the constant behind `tensor`: an initialiser or a Constant node's tensor."""
    if isinstance(tensor, gs.Constant):
        return tensor
    node = producer(tensor)
    if node is None or not is_op(node, "Constant"):
        return None
    value = node.attrs.get("value")
    return value if isinstance(value, gs.Constant) else None


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that writes `tensor`; None for inputs and initialisers."""
    return tensor.inputs[0] if tensor.inputs else None


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Tell whether `tensor` is one of the graph's outputs."""
    return any(output is tensor for output in graph.outputs)


def only_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """Return the one node that reads `tensor`; None if others, or the caller, see it too."""
    if len(tensor.outputs) != 1 or is_output(graph, tensor):
        return None
    reader: gs.Node = tensor.outputs[0]
    return reader


def replace(graph: gs.Graph, node: gs.Node, replacement: Sequence[gs.Node]) -> None:
    """Put `replacement` where `node` stands, and remove what only `node` needed.

    The nodes of `replacement` must already write the tensors that `node` wrote.
    """
    index = next(i for i, other in enumerate(graph.nodes) if other is node)
    graph.nodes[index : index + 1] = list(replacement)
    inputs = list(node.inputs)
    node.inputs.clear()
    node.outputs.clear()
    for tensor in inputs:
        _remove_if_unread(graph, tensor)


def set_input(graph: gs.Graph, node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Make `tensor` the input number `index` of `node`, and remove what nobody reads any more."""
    if index == len(node.inputs):
        node.inputs.append(tensor)
        return
    old = node.inputs[index]
    node.inputs[index] = tensor
    _remove_if_unread(graph, old)


def _remove_if_unread(graph: gs.Graph, tensor: gs.Tensor) -> None:
    node = producer(tensor)
    if node is None or any(t.outputs or is_output(graph, t) for t in node.outputs):
        return
    if any(other is node for other in graph.nodes):
        replace(graph, node, [])


class Names:
    """Hands out names that nothing in the model has yet."""

    def __init__(self, model: Model) -> None:
        self._taken = set(_names(model.graph))

    def new(self, wanted: str) -> str:
        """Return `wanted`, or `wanted` with the first free number behind it."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


def _names(graph: gs.Graph) -> Iterable[str]:
    for tensor in (*graph.inputs, *graph.outputs):
        yield tensor.name
    for node in graph.nodes:
        yield node.name
        for tensor in (*node.inputs, *node.outputs):
            yield tensor.name
        for subgraph in node.subgraphs():
            yield from _names(subgraph)
