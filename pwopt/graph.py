"""Small tools for reading and editing a gs.Graph, shared by analysis and passes.

Nodes and tensors are compared with `is`: GraphSurgeon's `==` compares names only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from pwopt.model import Model
from pwopt.shapes import Shape


def is_op(node: gs.Node, *ops: str) -> bool:
    """Tell whether `node` is one of the standard operators `ops`."""
    return node.op in ops and node.domain in ("", "ai.onnx", None)


def constant(tensor: gs.Tensor) -> gs.Constant | None:
    """Return the constant behind `tensor`: an initialiser or a Constant node's tensor."""
    if isinstance(tensor, gs.Constant):
        return tensor
    node = producer(tensor)
    if node is None or not is_op(node, "Constant"):
        return None
    value = node.attrs.get("value")
    return value if isinstance(value, gs.Constant) else None


def optional_input(node: gs.Node, index: int) -> gs.Tensor | None:
    """Return the input number `index` of `node`; None where it is left out."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def shape_of(tensor: gs.Tensor, shapes: Mapping[str, Shape]) -> Shape | None:
    """Return a constant's own shape, any other tensor's from `shapes` if it is known there."""
    weight = constant(tensor)
    return shapes.get(tensor.name) if weight is None else tuple(weight.shape)


def known_constant(tensor: gs.Tensor) -> gs.Constant:
    """Return the constant behind `tensor`, of which it is known that there is one."""
    value = constant(tensor)
    assert value is not None, tensor.name
    return value


def decoded(tensor: gs.Constant) -> npt.NDArray[Any]:
    """Decode the values of a constant, and keep no copy of them, as its `values` would."""
    values = tensor._values
    decoded: npt.NDArray[Any] = values.load() if isinstance(values, LazyValues) else values
    return decoded


def label(node: gs.Node) -> str:
    """Return what messages call `node`: its name, or its first output's where it has none."""
    return str(node.name or node.outputs[0].name)


def all_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """Yield the nodes of `graph` and of the graphs inside them."""
    for node in graph.nodes:
        yield node
        for subgraph in node.subgraphs():
            yield from all_nodes(subgraph)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that writes `tensor`; None for inputs and initialisers."""
    return tensor.inputs[0] if tensor.inputs else None


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Tell whether `tensor` is one of the graph's outputs."""
    return any(output is tensor for output in graph.outputs)


def is_only_reader(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor) -> bool:
    """Tell whether `node` reads `tensor`, once, and neither another node nor the caller does."""
    readers = tensor.outputs
    return len(readers) == 1 and readers[0] is node and not is_output(graph, tensor)


def leaves(graph: gs.Graph, tensor: gs.Tensor, readers: Sequence[gs.Node]) -> bool:
    """Tell whether the caller, or another node than `readers`, reads `tensor`."""
    ours = {id(reader) for reader in readers}
    return is_output(graph, tensor) or any(id(reader) not in ours for reader in tensor.outputs)


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
        remove_if_unread(graph, tensor)


def remove_if_unread(graph: gs.Graph, tensor: gs.Tensor) -> None:
    """Remove the node that writes `tensor` if nobody reads it, and what only that one needed."""
    node = producer(tensor)
    if node is None or any(t.outputs or is_output(graph, t) for t in node.outputs):
        return
    if any(other is node for other in graph.nodes):
        replace(graph, node, [])


def like(
    node: gs.Node,
    inputs: Sequence[gs.Tensor],
    output: gs.Tensor,
    attrs: Mapping[str, Any] | None = None,
) -> gs.Node:
    """Make a node like `node`, with its attributes if none are given, that writes `output`.

    It has the name of `node`, under which `node`'s doc string and metadata become its own.
    """
    attrs = dict(node.attrs if attrs is None else attrs)
    return gs.Node(node.op, node.name, attrs, list(inputs), [output], node.domain)


class Names:
    """Hands out names that nothing in the model has yet; tensors and nodes may share one."""

    def __init__(self, model: Model) -> None:
        self._tensors = {t.name for node in all_nodes(model.graph) for t in _tensors(node)}
        self._tensors |= {t.name for t in (*model.graph.inputs, *model.graph.outputs)}
        self._tensors |= {t.name for t in model.proto.graph.initializer}  # unused ones too
        self._nodes = {node.name for node in all_nodes(model.graph)}

    def tensor(self, wanted: str) -> str:
        """Return a tensor name: `wanted`, or `wanted` with the first free number behind it."""
        return _take(wanted, self._tensors)

    def node(self, wanted: str) -> str:
        """Return a node name, likewise."""
        return _take(wanted, self._nodes)


def _take(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def _tensors(node: gs.Node) -> Iterator[gs.Tensor]:
    yield from (*node.inputs, *node.outputs)
    for subgraph in node.subgraphs():
        yield from (*subgraph.inputs, *subgraph.outputs)
