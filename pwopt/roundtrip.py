"""GraphProto → gs.Graph → GraphProto, keeping what GraphSurgeon's own import and export lose.

GraphSurgeon is the structure that passes edit. Its importer drops doc strings, metadata, sparse
and optional types, unused initialisers and more; its exporter recodes low-precision tensors. So
both directions are written here, by one rule: whatever nobody edited is given back as the very
message it came from, and only what was edited is written anew.
"""

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)
from onnx_graphsurgeon.ir.tensor import LazyValues

_Scope = MutableMapping[str, gs.Tensor]
_WRITTEN_ANEW = {"node", "initializer", "input", "output", "value_info", "quantization_annotation"}


class TensorValues(LazyValues):  # type: ignore[misc]
    """The values of a TensorProto, decoded when asked for: every ONNX type, external data too."""

    def __init__(self, tensor: TensorProto, folder: str) -> None:
        self.tensor = tensor
        self.folder = folder
        self.shape = list(tensor.dims)
        self.dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def load(self) -> npt.NDArray[Any]:
        """Decode the values. Types that numpy lacks come as ml_dtypes has them."""
        return np.array(numpy_helper.to_array(self.tensor, self.folder))


@dataclass
class _NodeOrigin:
    """The message a node came from. Holds the node, so that its id stays its own."""

    node: gs.Node
    proto: NodeProto
    attrs: dict[str, Any]


@dataclass
class _GraphOrigin:
    """The message a graph came from, with its tensors as they were when read."""

    graph: gs.Graph
    proto: GraphProto
    constants: dict[str, gs.Constant] = field(default_factory=dict)
    types: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)


class RoundTrip:
    """One model's GraphProto as a gs.Graph to edit (`graph`), and the way back (`write`)."""

    def __init__(self, proto: ModelProto, *, folder: str = "") -> None:
        self._folder = folder
        self._imports = list(proto.opset_import)
        # Before IR 4 every initialiser is listed as an input as well and is constant all the
        # same; from IR 4 on, a listed one may be overridden by the caller (ONNX IR.md).
        self._initializers_are_inputs = proto.ir_version < 4
        self._nodes: dict[int, _NodeOrigin] = {}
        self._graphs: dict[int, _GraphOrigin] = {}
        self.graph: gs.Graph = self._read_graph(proto.graph, {})
        for origin in self._graphs.values():
            outputs = {t.name for t in origin.graph.outputs}
            origin.unused = {n for n, c in origin.constants.items() if not c.outputs} - outputs

    def write(self) -> GraphProto:
        """Write the edited graph: equal, field by field, to the one read if nothing was edited."""
        return self._write_graph(self.graph)

    # -- reading ---------------------------------------------------------------------------

    def _read_graph(self, proto: GraphProto, outer: _Scope) -> gs.Graph:
        inputs = {info.name for info in proto.input}
        constants = {
            tensor.name: self._read_tensor(tensor)
            for tensor in proto.initializer
            if tensor.name not in inputs or self._initializers_are_inputs
        }
        local: dict[str, gs.Tensor] = dict(constants)
        for info in (*proto.input, *proto.output, *proto.value_info):
            local.setdefault(info.name, _read_variable(info))
        for name in (name for node in proto.node for name in node.output):
            local.setdefault(name, gs.Variable(name))

        scope = ChainMap(local, outer)
        graph = gs.Graph(
            nodes=[self._read_node(node, scope) for node in proto.node],
            inputs=[local[info.name] for info in proto.input if info.name not in constants],
            outputs=[local[info.name] for info in proto.output],
            name=proto.name,
            doc_string=proto.doc_string,
            opset=next((o.version for o in self._imports if o.domain in ("", "ai.onnx")), None),
            import_domains=self._imports,
        )
        types = {n: (t.dtype, t.shape) for n, t in local.items() if isinstance(t, gs.Variable)}
        self._graphs[id(graph)] = _GraphOrigin(graph, proto, constants, types)
        return graph

    def _read_node(self, proto: NodeProto, scope: _Scope) -> gs.Node:
        attrs = {attr.name: self._read_attribute(attr, scope) for attr in proto.attribute}
        node = gs.Node(
            op=proto.op_type,
            name=proto.name,
            attrs=attrs,
            inputs=[_lookup(name, scope) for name in proto.input],
            outputs=[_lookup(name, scope) for name in proto.output],
            domain=proto.domain,
        )
        before = {k: list(v) if isinstance(v, list) else v for k, v in attrs.items()}
        self._nodes[id(node)] = _NodeOrigin(node, proto, before)
        return node

    def _read_attribute(self, proto: AttributeProto, scope: _Scope) -> Any:
        """Read one attribute; what has no plain Python form stays the AttributeProto it is."""
        match proto.type:
            case AttributeProto.TENSOR:
                return self._read_tensor(proto.t)
            case AttributeProto.GRAPH:
                return self._read_graph(proto.g, scope)
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
                return proto

    def _read_tensor(self, proto: TensorProto) -> gs.Constant:
        return gs.Constant(proto.name, TensorValues(proto, self._folder))

    # -- writing ---------------------------------------------------------------------------

    def _write_graph(self, graph: gs.Graph) -> GraphProto:
        origin = self._graphs.get(id(graph)) or _GraphOrigin(graph, GraphProto(name=graph.name))
        before = origin.proto
        constants = self._living_constants(origin)
        inputs = {t.name: t for t in graph.inputs}
        outputs = {t.name: t for t in graph.outputs}
        inner = {t.name: t for node in graph.nodes for t in node.outputs}
        tensors = inner | inputs | constants

        proto = GraphProto()
        for descriptor, value in before.ListFields():
            if descriptor.name not in _WRITTEN_ANEW:
                proto.MergeFrom(GraphProto(**{descriptor.name: value}))
        proto.node.extend(self._write_node(node) for node in graph.nodes)

        originals = {tensor.name: tensor for tensor in before.initializer}
        for name, tensor in originals.items():
            if name in constants:
                proto.initializer.append(_write_tensor(constants[name], tensor))
            elif name in inputs:  # the default of an input that a caller may override
                proto.initializer.append(tensor)
        added = {name: c for name, c in constants.items() if name not in originals}
        proto.initializer.extend(_write_tensor(c, None) for c in added.values())

        listed = {info.name for info in before.input}
        inputs |= {name: c for name, c in constants.items() if name in listed}
        if self._initializers_are_inputs and graph is self.graph:
            inputs |= added
        proto.input.extend(_write_values(before.input, inputs, origin.types))
        proto.output.extend(_write_values(before.output, outputs, origin.types))
        described = {v.name: tensors[v.name] for v in before.value_info if v.name in tensors}
        proto.value_info.extend(_write_values(before.value_info, described, origin.types))
        proto.quantization_annotation.extend(
            a for a in before.quantization_annotation if a.tensor_name in tensors
        )
        return proto

    def _living_constants(self, origin: _GraphOrigin) -> dict[str, gs.Constant]:
        """Find the initialisers of a graph: the old ones but those orphaned, then the new ones."""
        used = {id(t) for node in _all_nodes(self.graph) for t in node.inputs}
        used |= {id(t) for t in origin.graph.outputs}
        constants = {
            constant.name: constant
            for name, constant in origin.constants.items()
            if id(constant) in used or name in origin.unused
        }
        old = {id(c) for o in self._graphs.values() for c in o.constants.values()}
        read_here = [t for node in origin.graph.nodes for t in node.inputs]
        for tensor in (*read_here, *origin.graph.outputs):
            if isinstance(tensor, gs.Constant) and id(tensor) not in old:
                constants[tensor.name] = tensor
        return constants

    def _write_node(self, node: gs.Node) -> NodeProto:
        origin = self._nodes.get(id(node)) or _NodeOrigin(node, NodeProto(), {})
        proto = NodeProto()
        proto.CopyFrom(origin.proto)
        for name, value in (("op_type", node.op), ("name", node.name), ("domain", node.domain)):
            if getattr(proto, name) != (value or ""):
                setattr(proto, name, value or "")
        for names, tensors in ((proto.input, node.inputs), (proto.output, node.outputs)):
            if list(names) != [tensor.name for tensor in tensors]:
                names[:] = [tensor.name for tensor in tensors]
        del proto.attribute[:]
        originals = {attr.name: attr for attr in origin.proto.attribute}
        for name, value in node.attrs.items():
            original = originals.get(name)
            untouched = original is not None and _same(value, origin.attrs[name])
            proto.attribute.append(self._write_attribute(name, value, original, untouched))
        return proto

    def _write_attribute(
        self, name: str, value: Any, original: AttributeProto | None, untouched: bool
    ) -> AttributeProto:
        if isinstance(value, gs.Graph):
            return _filled(name, original, g=self._write_graph(value))
        if isinstance(value, gs.Constant):
            tensor = original.t if original is not None and untouched else None
            return _filled(name, original, t=_write_tensor(value, tensor))
        if original is not None and untouched:
            return original
        if isinstance(value, AttributeProto):
            return value
        kind = original.type if original is not None else None
        return helper.make_attribute(name, value, attr_type=kind)


def _filled(name: str, original: AttributeProto | None, **value: Any) -> AttributeProto:
    """Give `original` a new tensor (`t`) or graph (`g`), or make an attribute that holds it."""
    kind = AttributeProto.GRAPH if "g" in value else AttributeProto.TENSOR
    proto = AttributeProto(name=name, type=kind, **value)
    if original is not None and original.doc_string:
        proto.doc_string = original.doc_string
    return proto


def _lookup(name: str, scope: _Scope) -> gs.Tensor:
    if not name:
        return gs.Variable.empty()
    return scope[name] if name in scope else scope.setdefault(name, gs.Variable(name))


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _read_variable(info: ValueInfoProto) -> gs.Variable:
    tensor = info.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return gs.Variable(info.name, dtype)
    shape = [
        d.dim_param or None if d.WhichOneof("value") != "dim_value" else d.dim_value
        for d in tensor.shape.dim
    ]
    return gs.Variable(info.name, dtype, shape)


def _write_values(
    originals: Iterable[ValueInfoProto],
    tensors: Mapping[str, gs.Tensor],
    types: Mapping[str, tuple[Any, Any]],
) -> Iterator[ValueInfoProto]:
    """Describe `tensors`: in the order they had, unchanged unless edited, the new ones last."""
    names = set()
    for info in originals:
        if info.name in tensors:
            names.add(info.name)
            yield _write_value(info, tensors[info.name], types.get(info.name))
    for name, tensor in tensors.items():
        if name not in names:
            yield _write_value(ValueInfoProto(name=name), tensor, None)


def _write_value(
    original: ValueInfoProto, tensor: gs.Tensor, before: tuple[Any, Any] | None
) -> ValueInfoProto:
    constant = isinstance(tensor, gs.Constant)
    if original.HasField("type") and (constant or before == (tensor.dtype, tensor.shape)):
        return original
    if tensor.dtype is None:
        return original
    info = ValueInfoProto()
    info.CopyFrom(original)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    info.type.CopyFrom(helper.make_tensor_type_proto(kind, tensor.shape))
    return info


def _write_tensor(constant: gs.Constant, original: TensorProto | None) -> TensorProto:
    values = constant._values  # not .values, which would decode what nobody asked for
    if isinstance(values, TensorValues):
        if values.tensor.name == constant.name:
            return values.tensor
        renamed = TensorProto()
        renamed.CopyFrom(values.tensor)
        renamed.name = constant.name
        return renamed
    written = numpy_helper.from_array(np.asarray(values, order="C"), constant.name)
    return original if original is not None and _equal(original, written) else written


def _equal(original: TensorProto, written: TensorProto) -> bool:
    """Whether values that were read, and perhaps edited in place, are still the original's."""
    if (original.data_type, list(original.dims)) != (written.data_type, list(written.dims)):
        return False
    if original.data_location == TensorProto.EXTERNAL or original.name != written.name:
        return False
    return numpy_helper.to_array(original).tobytes() == numpy_helper.to_array(written).tobytes()


def _same(value: Any, before: Any) -> bool:
    return value is before or (type(value) is type(before) and bool(value == before))


def _all_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    for node in graph.nodes:
        yield node
        for subgraph in node.subgraphs():
            yield from _all_nodes(subgraph)
