"""A few nodes of a model as a model of their own, to time and to check them."""

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto

from pwopt.graph import is_output, producer
from pwopt.model import Model
from pwopt.shapes import Type


def extract(model: Model, nodes: Sequence[gs.Node], types: Mapping[str, Type]) -> Model:
    """Copy `nodes` into a model whose inputs are what they read and outputs what others read.

    Args:
        model: The model they belong to; stays as it is.
        nodes: Nodes of its graph, in any order.
        types: Types of its tensors, from `shapes.infer_types`.
    """
    ordered = [node for node in model.graph.nodes if any(node is other for other in nodes)]
    written = {id(t): t for node in ordered for t in node.outputs if t.name}
    read = {id(t): t for node in ordered for t in node.inputs if t.name}
    proto = ModelProto(ir_version=max(model.proto.ir_version, 4), graph=GraphProto(name="site"))
    proto.opset_import.extend(model.proto.opset_import)
    site = Model(proto, path=model.path)
    copies = {key: _copy(t, types) for key, t in (read | written).items()}

    def of(tensors: Sequence[gs.Tensor]) -> list[gs.Tensor]:
        return [copies[id(t)] if t.name else gs.Variable.empty() for t in tensors]

    site.graph.nodes.extend(
        gs.Node(n.op, n.name, dict(n.attrs), of(n.inputs), of(n.outputs), n.domain) for n in ordered
    )
    entering = [t for key, t in read.items() if key not in written]
    site.graph.inputs.extend(of([t for t in entering if isinstance(t, gs.Variable)]))
    site.graph.outputs.extend(of([t for t in written.values() if _leaves(model.graph, t, ordered)]))
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


def _leaves(graph: gs.Graph, tensor: gs.Tensor, nodes: Sequence[gs.Node]) -> bool:
    readers = tensor.outputs
    inside = all(any(reader is node for node in nodes) for reader in readers)
    return is_output(graph, tensor) or not readers or not inside


def _copy(tensor: gs.Tensor, types: Mapping[str, Type]) -> gs.Tensor:
    if isinstance(tensor, gs.Constant):
        return gs.Constant(tensor.name, tensor._values)  # not .values, which would decode
    known = types.get(tensor.name)
    if known is None:
        return gs.Variable(tensor.name, tensor.dtype, tensor.shape)
    return gs.Variable(tensor.name, known.dtype, list(known.shape))
