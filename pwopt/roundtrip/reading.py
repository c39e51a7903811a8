"""ModelProto → gs.Graph, and the message that every part of it came from."""

import copy
from collections import ChainMap
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from pwopt.roundtrip.tensors import TensorValues
from pwopt.roundtrip.variables import Type, read_variable, type_of

_Scope = MutableMapping[str, gs.Tensor]


@dataclass(frozen=True, slots=True)
class NodeOrigin:
    """The message a node came from, and its attributes then."""

    node: gs.Node
    proto: NodeProto
    attrs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class GraphOrigin:
    """The message a graph came from, and the tensors that its names stood for when it was read."""

    graph: gs.Graph
    proto: GraphProto
    tensors: dict[str, gs.Tensor]
    types: dict[int, Type]
    defined: set[int]

    def constants(self) -> list[gs.Constant]:
        """List the initialisers, those that a caller may override left aside."""
        tensors = (self.tensors[initializer.name] for initializer in self.proto.initializer)
        return [tensor for tensor in tensors if isinstance(tensor, gs.Constant)]


@dataclass(slots=True)
class Origins:
    """A model's graph to edit (`graph`), and where each part of it came from.

    Parts are known by their ids, since GraphSurgeon's `==` compares names. Each origin holds its
    part, so that the id stays its own.
    """

    model: ModelProto
    folder: str
    name: str
    graph: gs.Graph = field(init=False)
    used: set[int] = field(init=False)
    nodes: dict[int, NodeOrigin] = field(default_factory=dict)
    named: dict[str, NodeOrigin | None] = field(default_factory=dict)
    """Nodes by name; None where several share it."""
    graphs: dict[int, GraphOrigin] = field(default_factory=dict)
    tensors: dict[int, tuple[gs.Tensor, TensorProto]] = field(default_factory=dict)

    @property
    def initializers_are_inputs(self) -> bool:
        """Whether every initialiser is listed as an input as well, and constant all the same.

        So it was before IR 4; from then on, a listed one may be overridden by the caller (ONNX
        IR.md).
        """
        return self.model.ir_version < 4

    def of(self, node: gs.Node) -> NodeOrigin:
        """Return where `node` came from.

        A new node with the name and the operator of an old one succeeds that: it keeps what the
        message says beside inputs, outputs and attributes, such as doc string and metadata.
        """
        origin = self.nodes.get(id(node)) or self.named.get(node.name)
        if origin is not None and (origin.node is node or origin.proto.op_type == node.op):
            return origin
        return NodeOrigin(node, NodeProto(), {})

    def values(self, tensor: TensorProto) -> TensorValues:
        """Return the values of one of the model's tensors, not yet decoded."""
        return TensorValues(tensor, self.folder, self.name)


def read(model: ModelProto, *, folder: str, name: str) -> Origins:
    """Read a model's graph to edit; `model` must stay as it is as long as that is written back.

    Args:
        model: The model; its tensors are not decoded.
        folder: Where its external data lies.
        name: What messages call it.

    Raises:
        ModelError: an element type that the installed onnx does not know.
    """
    origins = Origins(model, folder, name)
    origins.graph = _read_graph(model.graph, {}, origins)
    origins.used = used(origins.graph)
    return origins


def used(graph: gs.Graph) -> set[int]:
    """Find the tensors that some node reads or some graph gives out, inner graphs included."""
    found = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        found |= {id(tensor) for tensor in node.inputs}
        for subgraph in node.subgraphs():
            found |= used(subgraph)
    return found


def defined(graph: gs.Graph, constants: Iterable[gs.Tensor]) -> set[int]:
    """Find the tensors that get their value in `graph` itself."""
    written = (tensor for node in graph.nodes for tensor in node.outputs)
    return {id(tensor) for tensor in (*constants, *graph.inputs, *written)}


def _read_graph(proto: GraphProto, outer: _Scope, origins: Origins) -> gs.Graph:
    local = _read_tensors(proto, outer, origins)
    scope = ChainMap(local, outer)
    imports = list(origins.model.opset_import)
    listed = [local[info.name] for info in proto.input]
    graph = gs.Graph(
        nodes=[_read_node(node, scope, origins) for node in proto.node],
        inputs=[tensor for tensor in listed if not isinstance(tensor, gs.Constant)],
        outputs=[local[info.name] for info in proto.output],
        name=proto.name,
        doc_string=proto.doc_string,
        opset=next((o.version for o in imports if o.domain in ("", "ai.onnx")), None),
        import_domains=imports,
    )
    constants = (local[tensor.name] for tensor in proto.initializer)
    types = {id(tensor): type_of(tensor) for tensor in local.values()}
    origins.graphs[id(graph)] = GraphOrigin(graph, proto, local, types, defined(graph, constants))
    return graph


def _read_tensors(proto: GraphProto, outer: _Scope, origins: Origins) -> dict[str, gs.Tensor]:
    """Make the tensors that a graph defines or describes, by name."""
    inputs = {info.name for info in proto.input}
    local: dict[str, gs.Tensor] = {
        tensor.name: _read_tensor(tensor, origins)
        for tensor in proto.initializer
        if tensor.name not in inputs or origins.initializers_are_inputs
    }
    infos = {info.name: info for info in (*proto.value_info, *proto.output, *proto.input)}
    written = (name for node in proto.node for name in node.output)
    for name in (*inputs, *written):
        local.setdefault(name, read_variable(infos.get(name, ValueInfoProto(name=name))))
    for name in infos.keys() - local.keys():  # described here, but of a graph around this one
        local[name] = outer[name] if name in outer else read_variable(infos[name])
    for tensor in proto.initializer:
        origins.tensors.setdefault(id(local[tensor.name]), (local[tensor.name], tensor))
    return local


def _read_node(proto: NodeProto, scope: _Scope, origins: Origins) -> gs.Node:
    attrs = {attr.name: _read_attribute(attr, scope, origins) for attr in proto.attribute}
    node = gs.Node(
        op=proto.op_type,
        name=proto.name,
        attrs=attrs,
        inputs=[_lookup(name, scope) for name in proto.input],
        outputs=[_lookup(name, scope) for name in proto.output],
        domain=proto.domain,
    )
    before = {k: list(v) if isinstance(v, list) else v for k, v in attrs.items()}
    origin = origins.nodes[id(node)] = NodeOrigin(node, proto, before)
    if proto.name:
        origins.named[proto.name] = None if proto.name in origins.named else origin
    return node


def _read_attribute(proto: AttributeProto, scope: _Scope, origins: Origins) -> Any:
    """Read one attribute; what has no plain Python form stays the AttributeProto it is."""
    match proto.type:
        case AttributeProto.TENSOR:
            return _read_tensor(proto.t, origins)
        case AttributeProto.GRAPH:
            return _read_graph(proto.g, scope, origins)
        case AttributeProto.STRING:
            return _text(proto.s)
        case AttributeProto.STRINGS:
            return [_text(text) for text in proto.strings]
        case AttributeProto.FLOAT:
            return proto.f
        case AttributeProto.INT:
            return proto.i
        case AttributeProto.FLOATS:
            return list(proto.floats)
        case AttributeProto.INTS:
            return list(proto.ints)
        case _:
            return copy.deepcopy(proto)


def _read_tensor(proto: TensorProto, origins: Origins) -> gs.Constant:
    constant = gs.Constant(proto.name, origins.values(proto))
    origins.tensors[id(constant)] = (constant, proto)
    return constant


def _lookup(name: str, scope: _Scope) -> gs.Tensor:
    if not name:
        return gs.Variable.empty()
    return scope[name] if name in scope else scope.setdefault(name, gs.Variable(name))


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
