"""GraphProto → gs.Graph → GraphProto, keeping what GraphSurgeon's own import and export lose.

GraphSurgeon is the structure that passes edit. Its importer drops doc strings, metadata, sparse
and optional types, unused initialisers and more; its exporter recodes low-precision tensors. So
both directions are written here, by one rule: whatever nobody edited is given back as the very
message it came from, and only what was edited is written anew.
"""

import copy
import math
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorAnnotation,
    TensorProto,
    ValueInfoProto,
    external_data_helper,
    helper,
    numpy_helper,
)
from onnx.checker import ValidationError
from onnx_graphsurgeon.ir.tensor import LazyValues

from pwopt.errors import ModelError

SMALL = 256
"""Elements up to which a tensor is worth keeping where only shapes matter (axes, target shapes)."""

_Scope = MutableMapping[str, gs.Tensor]
_WRITTEN_ANEW = {"node", "initializer", "input", "output", "value_info", "quantization_annotation"}


class TensorValues(LazyValues):  # type: ignore[misc]
    """The values of a TensorProto, decoded when asked for: every ONNX type, external data too."""

    def __init__(self, tensor: TensorProto, folder: str, model: str) -> None:
        self.tensor = tensor
        self.folder = folder
        self.model = model
        self.shape = list(tensor.dims)
        self.dtype = _dtype(tensor.data_type)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize  # asked for by GraphSurgeon

    def load(self) -> npt.NDArray[Any]:
        """Decode the values. Types that numpy lacks come as ml_dtypes has them.

        Raises:
            ModelError: the tensor's data is damaged, or its file is gone.
        """
        tensor = with_data(self.tensor, self.folder)
        try:
            return np.array(numpy_helper.to_array(tensor))
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"{self.model}: weight '{tensor.name}' is damaged, export it again ({error})"
            ) from error


def with_data(tensor: TensorProto, folder: str) -> TensorProto:
    """Return the tensor itself, or a copy that holds the data which lies in another file.

    Raises:
        ModelError: that file is gone, too short or outside `folder`.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    loaded = TensorProto()
    loaded.CopyFrom(tensor)
    try:
        external_data_helper.load_external_data_for_tensor(loaded, folder)
    except (OSError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"weight '{tensor.name}' cannot be read: {reason}") from error
    loaded.ClearField("data_location")
    loaded.ClearField("external_data")
    return loaded


_Type = tuple[Any, tuple[Any, ...] | None]


@dataclass
class _NodeOrigin:
    """The message a node came from. Holds the node, so that its id stays its own."""

    node: gs.Node
    proto: NodeProto
    attrs: dict[str, Any]


@dataclass
class _GraphOrigin:
    """The message a graph came from, and the tensors that its names stood for when it was read."""

    graph: gs.Graph
    proto: GraphProto
    tensors: dict[str, gs.Tensor]
    types: dict[int, _Type]
    defined: set[int] = field(default_factory=set)
    unused: set[int] = field(default_factory=set)

    def constants(self) -> list[gs.Constant]:
        """List the initialisers, those that a caller may override left aside."""
        tensors = (self.tensors[initializer.name] for initializer in self.proto.initializer)
        return [tensor for tensor in tensors if isinstance(tensor, gs.Constant)]


class RoundTrip:
    """One model's GraphProto as a gs.Graph to edit (`graph`), and the way back (`write`)."""

    def __init__(self, proto: ModelProto, *, folder: str, name: str) -> None:
        self.folder = folder
        self._name = name
        self._imports = list(proto.opset_import)
        # Before IR 4 every initialiser is listed as an input as well and is constant all the
        # same; from IR 4 on, a listed one may be overridden by the caller (ONNX IR.md).
        self.initializers_are_inputs = proto.ir_version < 4
        self.nodes: dict[int, _NodeOrigin] = {}
        self.graphs: dict[int, _GraphOrigin] = {}
        self.tensors: dict[int, tuple[gs.Tensor, TensorProto]] = {}
        self.graph: gs.Graph = self._read_graph(proto.graph, {})
        used = _used(self.graph)
        for origin in self.graphs.values():
            constants = origin.constants()
            origin.defined = _defined(origin.graph, constants)
            origin.unused = {id(constant) for constant in constants} - used

    def write(self, target: GraphProto, *, weights: bool = True) -> None:
        """Write the edited graph into the empty message `target`.

        Equal, field by field, to the one read if nothing was edited. Without `weights`, large
        tensors of the outer graph are external ones that lie nowhere: name, type and shape.
        """
        _Writer(self, _used(self.graph), weights).write_graph(self.graph, target, set())

    # -- reading ---------------------------------------------------------------------------

    def _read_graph(self, proto: GraphProto, outer: _Scope) -> gs.Graph:
        inputs = {info.name for info in proto.input}
        local: dict[str, gs.Tensor] = {
            tensor.name: self._read_tensor(tensor)
            for tensor in proto.initializer
            if tensor.name not in inputs or self.initializers_are_inputs
        }
        infos = {info.name: info for info in (*proto.value_info, *proto.output, *proto.input)}
        written = (name for node in proto.node for name in node.output)
        for name in (*inputs, *written):
            local.setdefault(name, _read_variable(infos.get(name, ValueInfoProto(name=name))))
        for name in infos.keys() - local.keys():  # described here, but of a graph around this one
            local[name] = outer[name] if name in outer else _read_variable(infos[name])
        for tensor in proto.initializer:
            self.tensors.setdefault(id(local[tensor.name]), (local[tensor.name], tensor))

        scope = ChainMap(local, outer)
        graph = gs.Graph(
            nodes=[self._read_node(node, scope) for node in proto.node],
            inputs=[
                local[info.name]
                for info in proto.input
                if not isinstance(local[info.name], gs.Constant)
            ],
            outputs=[local[info.name] for info in proto.output],
            name=proto.name,
            doc_string=proto.doc_string,
            opset=next((o.version for o in self._imports if o.domain in ("", "ai.onnx")), None),
            import_domains=self._imports,
        )
        types = {id(tensor): _type(tensor) for tensor in local.values()}
        self.graphs[id(graph)] = _GraphOrigin(graph, proto, local, types)
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
        self.nodes[id(node)] = _NodeOrigin(node, proto, before)
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
                return copy.deepcopy(proto)

    def _read_tensor(self, proto: TensorProto) -> gs.Constant:
        constant = gs.Constant(proto.name, self.values(proto))
        self.tensors[id(constant)] = (constant, proto)
        return constant

    def values(self, proto: TensorProto) -> TensorValues:
        """Return the values of one of the model's tensors, not yet decoded."""
        return TensorValues(proto, self.folder, self._name)


@dataclass
class _Writer:
    """One writing of a RoundTrip."""

    source: RoundTrip
    used: set[int]
    weights: bool

    def write_graph(self, graph: gs.Graph, proto: GraphProto, outer: set[int]) -> None:
        """Write `graph`; `outer` are the constants that the graphs around it define."""
        new = _GraphOrigin(graph, GraphProto(name=graph.name), {}, {})
        origin = self.source.graphs.get(id(graph), new)
        before = origin.proto
        constants = self._constants(origin, outer)
        defined = _defined(graph, constants)

        for descriptor, value in before.ListFields():
            if descriptor.name not in _WRITTEN_ANEW:
                proto.MergeFrom(GraphProto(**{descriptor.name: value}))
        visible = outer | {id(constant) for constant in constants}
        bare = not self.weights and graph is self.source.graph
        proto.node.extend(self._write_node(node, visible, bare) for node in graph.nodes)

        listed = [origin.tensors[tensor.name] for tensor in before.initializer]
        kept = [tensor for tensor in listed if id(tensor) in defined]
        known = {id(tensor) for tensor in kept}
        added = [constant for constant in constants if id(constant) not in known]
        proto.initializer.extend(self._write_tensor(tensor, bare) for tensor in (*kept, *added))

        inputs = list(self._inputs(origin, defined))
        if self.source.initializers_are_inputs and graph is self.source.graph:
            inputs += added
        proto.input.extend(_write_values(inputs, before.input, origin))
        proto.output.extend(_write_values(graph.outputs, before.output, origin))

        gone = {n for n, t in origin.tensors.items() if id(t) in origin.defined - defined}
        for info in before.value_info:
            if info.name not in gone:
                tensor = origin.tensors[info.name]
                proto.value_info.append(_write_value(info, tensor, origin.types[id(tensor)]))
        proto.quantization_annotation.extend(
            _write_annotation(annotation, origin.tensors)
            for annotation in before.quantization_annotation
            if annotation.tensor_name not in gone
        )

    def _constants(self, origin: _GraphOrigin, outer: set[int]) -> list[gs.Constant]:
        """List the constants a graph defines: its old ones but those orphaned, then new ones."""
        kept = self.used | origin.unused
        constants = {id(c): c for c in origin.constants() if id(c) in kept}
        read = [tensor for node in origin.graph.nodes for tensor in node.inputs]
        for tensor in (*read, *origin.graph.outputs):
            if isinstance(tensor, gs.Constant):
                constants.setdefault(id(tensor), tensor)
        return [constant for key, constant in constants.items() if key not in outer]

    def _inputs(self, origin: _GraphOrigin, defined: set[int]) -> Iterator[gs.Tensor]:
        """List the graph's inputs, with the initialisers among them where they were."""
        variables = iter(origin.graph.inputs)
        for info in origin.proto.input:
            tensor = origin.tensors[info.name]
            if not isinstance(tensor, gs.Constant):
                yield from islice(variables, 1)
            elif id(tensor) in defined:
                yield tensor
        yield from variables

    def _write_node(self, node: gs.Node, visible: set[int], bare: bool) -> NodeProto:
        origin = self.source.nodes.get(id(node)) or _NodeOrigin(node, NodeProto(), {})
        proto = NodeProto()
        proto.CopyFrom(origin.proto)
        for name, value in (("op_type", node.op), ("name", node.name), ("domain", node.domain)):
            if getattr(proto, name) != (value or ""):
                setattr(proto, name, value or "")
        for names, tensors in ((proto.input, node.inputs), (proto.output, node.outputs)):
            if list(names) != [tensor.name for tensor in tensors]:
                names[:] = [tensor.name for tensor in tensors]
        del proto.attribute[:]
        originals = {attribute.name: attribute for attribute in origin.proto.attribute}
        for name, value in node.attrs.items():
            original = originals.get(name)
            untouched = original is not None and _same(value, origin.attrs[name])
            written = original if untouched else None
            if isinstance(value, (gs.Graph, gs.Constant, AttributeProto)) or written is None:
                bare = bare and node.op == "Constant"
                written = self._write_attribute(name, value, original, visible, bare)
            proto.attribute.append(written)
        return proto

    def _write_attribute(
        self, name: str, value: Any, original: AttributeProto | None, visible: set[int], bare: bool
    ) -> AttributeProto:
        if isinstance(value, AttributeProto):
            return value
        proto = AttributeProto(name=name)
        if isinstance(value, gs.Graph):
            proto.type = AttributeProto.GRAPH
            self.write_graph(value, proto.g, visible)
        elif isinstance(value, gs.Constant):
            proto.type = AttributeProto.TENSOR
            proto.t.CopyFrom(self._write_tensor(value, bare))
        else:
            kind = original.type if original is not None else None
            proto = helper.make_attribute(name, value, attr_type=kind)
        if original is not None and original.HasField("doc_string"):
            proto.doc_string = original.doc_string
        return proto

    def _write_tensor(self, tensor: gs.Tensor, bare: bool) -> TensorProto:
        """Write a constant, or the default of an input that a caller may override."""
        _, original = self.source.tensors.get(id(tensor), (None, None))
        if isinstance(tensor, gs.Variable):
            assert original is not None  # only what was an initialiser gets here
            return _named(original, tensor.name)
        values = tensor._values  # not .values, which would decode what nobody asked for
        if bare and math.prod(values.shape) > SMALL:
            return TensorProto(
                name=tensor.name,
                dims=values.shape,
                data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
                data_location=TensorProto.EXTERNAL,
            )
        if isinstance(values, TensorValues):
            return _named(values.tensor, tensor.name)
        if original is not None and _same_values(self.source.values(original), tensor.values):
            return _named(original, tensor.name)
        written = numpy_helper.from_array(np.asarray(tensor.values, order="C"), tensor.name)
        if original is not None:
            written.doc_string = original.doc_string
            written.metadata_props.MergeFrom(original.metadata_props)
        return written


def _used(graph: gs.Graph) -> set[int]:
    """Find the tensors that some node reads or some graph gives out, inner graphs included."""
    used = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        used |= {id(tensor) for tensor in node.inputs}
        for subgraph in node.subgraphs():
            used |= _used(subgraph)
    return used


def _defined(graph: gs.Graph, constants: Iterable[gs.Constant]) -> set[int]:
    """Find the tensors that get their value in `graph` itself."""
    written = (tensor for node in graph.nodes for tensor in node.outputs)
    return {id(tensor) for tensor in (*constants, *graph.inputs, *written)}


def _dtype(kind: int) -> np.dtype[Any]:
    try:
        return helper.tensor_dtype_to_np_dtype(kind)
    except KeyError:
        raise ModelError(f"the installed onnx knows no element type {kind}; upgrade it") from None


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
    dtype = _dtype(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return gs.Variable(info.name, dtype)
    shape = [
        d.dim_param or None if d.WhichOneof("value") != "dim_value" else d.dim_value
        for d in tensor.shape.dim
    ]
    return gs.Variable(info.name, dtype, shape)


def _type(tensor: gs.Tensor) -> _Type:
    return tensor.dtype, None if tensor.shape is None else tuple(tensor.shape)


def _write_values(
    tensors: Iterable[gs.Tensor], originals: Iterable[ValueInfoProto], origin: _GraphOrigin
) -> Iterator[ValueInfoProto]:
    """Describe the inputs or the outputs of a graph."""
    infos = {id(origin.tensors[info.name]): info for info in originals}
    for tensor in tensors:
        info = infos.get(id(tensor), ValueInfoProto())
        yield _write_value(info, tensor, origin.types.get(id(tensor)) if info.name else None)


def _write_value(
    original: ValueInfoProto, tensor: gs.Tensor, before: _Type | None
) -> ValueInfoProto:
    """Describe a tensor as `original` does, or by its own type and shape if those were edited."""
    info = ValueInfoProto()
    info.CopyFrom(original)
    info.name = tensor.name
    if before == _type(tensor) or tensor.dtype is None:
        return info
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    edited = helper.make_tensor_type_proto(kind, tensor.shape)
    axes = info.type.tensor_type.shape.dim
    for axis, old in zip(edited.tensor_type.shape.dim, axes, strict=False):
        if old.denotation:
            axis.denotation = old.denotation
    if info.type.denotation:
        edited.denotation = info.type.denotation
    info.type.CopyFrom(edited)
    return info


def _write_annotation(
    original: TensorAnnotation, tensors: Mapping[str, gs.Tensor]
) -> TensorAnnotation:
    """Write a quantisation annotation with the names that its tensors have now."""
    annotation = TensorAnnotation()
    annotation.CopyFrom(original)
    if original.tensor_name in tensors:
        annotation.tensor_name = tensors[original.tensor_name].name
    for entry in annotation.quant_parameter_tensor_names:
        if entry.value in tensors:
            entry.value = tensors[entry.value].name
    return annotation


def _named(tensor: TensorProto, name: str) -> TensorProto:
    if tensor.name == name:
        return tensor
    renamed = TensorProto()
    renamed.CopyFrom(tensor)
    renamed.name = name
    return renamed


def _same_values(before: TensorValues, values: npt.NDArray[Any]) -> bool:
    """Whether values that were read, and perhaps edited in place, are still what they were."""
    if (before.dtype, tuple(before.shape)) != (values.dtype, values.shape):
        return False
    if values.dtype == np.object_:  # strings
        return np.array_equal(before.load(), values)
    return before.load().tobytes() == values.tobytes()  # NaN equals NaN, −0 differs from 0


def _same(value: Any, before: Any) -> bool:
    return value is before or (type(value) is type(before) and bool(value == before))
