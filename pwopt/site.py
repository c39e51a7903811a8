"""A few nodes of a model as a model of their own, to time and to check them."""

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto

from pwopt.graph import is_op, is_output, producer
from pwopt.model import Model
from pwopt.shapes import Type


def extract(model: Model, nodes: Sequence[gs.Node], types: Mapping[str, Type]) -> Model:
    """Copy `nodes` into a model whose inputs are what they read and outputs what others read.

    What they read of constants and of shapes alone is computed in the copy too: the target of a
    Reshape, say, for which random values would not do.

    Args:
        model: The model they belong to; stays as it is.
        nodes: Nodes of its graph, in any order.
        types: Types of its tensors, from `shapes.infer_types`.
    """
    inside = {id(node) for node in (*nodes, *_sources(model.graph, nodes))}
    ordered = [node for node in model.graph.nodes if id(node) in inside]
    written = {id(t): t for node in ordered for t in node.outputs if t.name}
    read = {id(t): t for node in ordered for t in node.inputs if t.name}
    proto = ModelProto(ir_version=max(model.proto.ir_version, 4), graph=GraphProto(name="site"))
    proto.opset_import.extend(model.proto.opset_import)
    site = model.beside(proto)
    copies = {key: _copy(t, types) for key, t in (read | written).items()}

    def of(tensors: Sequence[gs.Tensor]) -> list[gs.Tensor]:
        return [copies[id(t)] if t.name else gs.Variable.empty() for t in tensors]

    site.graph.nodes.extend(
        gs.Node(n.op, n.name, dict(n.attrs), of(n.inputs), of(n.outputs), n.domain) for n in ordered
    )
    entering = [t for key, t in read.items() if key not in written]
    leaving = [t for n in nodes for t in n.outputs if t.name and _leaves(model.graph, t, inside)]
    site.graph.inputs.extend(of([t for t in entering if isinstance(t, gs.Variable)]))
    site.graph.outputs.extend(of(leaving))
    return site.copy()  # whose message tells of the inputs, too


def neighbours(nodes: Sequence[gs.Node], hops: int) -> list[gs.Node]:
    """Return `nodes` with those around them that read or write the same tensors, `hops` far."""
    found = {id(node): node for node in nodes}
    for _ in range(hops):
        for node in list(found.values()):
            writers = [producer(tensor) for tensor in node.inputs]
            readers = [reader for tensor in node.outputs for reader in tensor.outputs]
            for other in (*writers, *readers):
                if other is not None and not any(other.subgraphs()):
                    found[id(other)] = other
    return list(found.values())


def _sources(graph: gs.Graph, nodes: Sequence[gs.Node]) -> list[gs.Node]:
    """Return the nodes that compute from constants and shapes alone what `nodes` read."""
    known: set[int] = set()
    for node in graph.nodes:
        computed = node.inputs and all(
            isinstance(t, gs.Constant) or t.is_empty() or id(t) in known for t in node.inputs
        )
        if (computed and not any(node.subgraphs())) or is_op(node, "Constant", "Shape", "Size"):
            known.update(id(tensor) for tensor in node.outputs)
    sources: dict[int, gs.Node] = {}
    unread = list(nodes)
    while unread:
        for tensor in unread.pop().inputs:
            source = producer(tensor)
            if source is not None and id(tensor) in known and id(source) not in sources:
                sources[id(source)] = source
                unread.append(source)
    return list(sources.values())


def _leaves(graph: gs.Graph, tensor: gs.Tensor, inside: set[int]) -> bool:
    return is_output(graph, tensor) or any(id(reader) not in inside for reader in tensor.outputs)


def _copy(tensor: gs.Tensor, types: Mapping[str, Type]) -> gs.Tensor:
    if isinstance(tensor, gs.Constant):
        return gs.Constant(tensor.name, tensor._values)  # not .values, which would decode
    known = types.get(tensor.name)
    if known is None:
        return gs.Variable(tensor.name, tensor.dtype, tensor.shape)
    return gs.Variable(tensor.name, known.dtype, list(known.shape))
