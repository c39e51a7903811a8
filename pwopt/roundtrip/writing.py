"""gs.Graph → ModelProto: the messages it came from, and new ones for what was edited."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import onnx_graphsurgeon as gs
from google.protobuf.message import Message
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorAnnotation,
    TensorProto,
    ValueInfoProto,
    helper,
)

from pwopt.errors import ModelError
from pwopt.roundtrip.reading import GraphOrigin, Origins, defined, used
from pwopt.roundtrip.tensors import SMALL, TensorValues, encoded, named
from pwopt.roundtrip.variables import write_value

_WRITTEN_ANEW = {"node", "initializer", "input", "output", "value_info", "quantization_annotation"}


def write(origins: Origins, *, weights: bool = True) -> ModelProto:
    """Write the model with its graph as that is now.

    Equal, field by field, to the one read if nothing was edited. Without `weights`, large tensors
    of the outer graph are external ones that lie nowhere: name, type and shape.

    Raises:
        ModelError: a text that is not UTF-8.
    """
    graph = origins.graph
    writer = _Writer(origins, used(graph))
    if not weights:
        outer = writer.constants(origins.graphs[id(graph)], set())
        inner = [v for n in graph.nodes if _is_constant(n) for v in n.attrs.values()]
        writer.bare = {id(tensor) for tensor in (*outer, *inner)}
    model = ModelProto()
    copy_fields(origins.model, model, without={"graph"})
    writer.write_graph(graph, model.graph, set())
    return model


def copy_fields(source: Message, target: Message, *, without: set[str]) -> None:
    """Copy a message but for some of its fields.

    Raises:
        ModelError: a text that is not UTF-8, which protobuf lets nobody set.
    """
    for descriptor, value in source.ListFields():
        if descriptor.name in without:
            continue
        if isinstance(value, bytes):  # protobuf's way to return text that is not UTF-8
            raise ModelError(f"the model's {descriptor.name} is not UTF-8 text; export it again")
        if isinstance(value, (str, int)):
            setattr(target, descriptor.name, value)
        else:
            getattr(target, descriptor.name).MergeFrom(value)


@dataclass(slots=True)
class _Writer:
    """One writing: what is used now, and what is written without its values if it is large."""

    origins: Origins
    used: set[int]
    bare: set[int] = field(default_factory=set)

    def write_graph(self, graph: gs.Graph, proto: GraphProto, outer: set[int]) -> None:
        """Write `graph`; `outer` are the constants that the graphs around it define."""
        new = GraphOrigin(graph, GraphProto(name=graph.name), {}, {}, set())
        origin = self.origins.graphs.get(id(graph), new)
        before = origin.proto
        constants = self.constants(origin, outer)
        defined_now = defined(graph, constants)

        copy_fields(before, proto, without=_WRITTEN_ANEW)
        visible = outer | {id(constant) for constant in constants}
        proto.node.extend(self._write_node(node, visible) for node in graph.nodes)

        listed = [origin.tensors[tensor.name] for tensor in before.initializer]
        kept = [tensor for tensor in listed if id(tensor) in defined_now]
        known = {id(tensor) for tensor in kept}
        added = [constant for constant in constants if id(constant) not in known]
        proto.initializer.extend(self._write_tensor(tensor) for tensor in (*kept, *added))

        inputs = [*_inputs(origin, defined_now)]
        if self.origins.initializers_are_inputs and graph is self.origins.graph:
            inputs += added
        proto.input.extend(_write_values(inputs, before.input, origin))
        proto.output.extend(_write_values(graph.outputs, before.output, origin))

        lost = origin.defined - defined_now
        gone = {name for name, tensor in origin.tensors.items() if id(tensor) in lost}
        for info in before.value_info:
            if info.name not in gone:
                tensor = origin.tensors[info.name]
                proto.value_info.append(write_value(info, tensor, origin.types[id(tensor)]))
        proto.quantization_annotation.extend(
            _write_annotation(annotation, origin.tensors)
            for annotation in before.quantization_annotation
            if annotation.tensor_name not in gone
        )

    def constants(self, origin: GraphOrigin, outer: set[int]) -> list[gs.Constant]:
        """List the constants a graph defines: its old ones but those orphaned, then new ones."""
        orphaned = self.origins.used - self.used
        constants = {id(c): c for c in origin.constants() if id(c) not in orphaned}
        read = [tensor for node in origin.graph.nodes for tensor in node.inputs]
        for tensor in (*read, *origin.graph.outputs):
            if isinstance(tensor, gs.Constant):
                constants.setdefault(id(tensor), tensor)
        return [constant for key, constant in constants.items() if key not in outer]

    def _write_node(self, node: gs.Node, visible: set[int]) -> NodeProto:
        origin = self.origins.of(node)
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
            if original is not None and _is_same(value, origin.attrs[name]):
                proto.attribute.append(original)
            else:
                proto.attribute.append(self._write_attribute(name, value, original, visible))
        return proto

    def _write_attribute(
        self, name: str, value: Any, original: AttributeProto | None, visible: set[int]
    ) -> AttributeProto:
        if isinstance(value, AttributeProto):
            return value
        proto = AttributeProto(name=name)
        if isinstance(value, gs.Graph):
            proto.type = AttributeProto.GRAPH
            self.write_graph(value, proto.g, visible)
        elif isinstance(value, gs.Constant):
            proto.type = AttributeProto.TENSOR
            proto.t.CopyFrom(self._write_tensor(value))
        else:
            kind = original.type if original is not None else None
            proto = helper.make_attribute(name, value, attr_type=kind)
        if original is not None and original.HasField("doc_string"):
            proto.doc_string = original.doc_string
        return proto

    def _write_tensor(self, tensor: gs.Tensor) -> TensorProto:
        """Write a constant, or the default of an input that a caller may override."""
        _, original = self.origins.tensors.get(id(tensor), (None, None))
        if isinstance(tensor, gs.Variable):
            assert original is not None  # only what was an initialiser gets here
            return named(original, tensor.name)
        values = tensor._values  # not .values, which would decode what nobody asked for
        if id(tensor) in self.bare and math.prod(values.shape) > SMALL:
            return TensorProto(
                name=tensor.name,
                dims=values.shape,
                data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
                data_location=TensorProto.EXTERNAL,
            )
        if isinstance(values, TensorValues):
            return named(values.tensor, tensor.name)
        if original is not None and self.origins.values(original).equal(tensor.values):
            return named(original, tensor.name)
        return encoded(tensor.values, tensor.name, original)


def _is_constant(node: gs.Node) -> bool:
    return node.op == "Constant" and node.domain in (None, "", "ai.onnx") and len(node.attrs) == 1


def _is_same(value: Any, before: Any) -> bool:
    """Tell whether an attribute is what it was, as far as can be seen without looking inside."""
    if isinstance(value, (gs.Graph, gs.Constant, AttributeProto)):
        return False
    return value is before or (type(value) is type(before) and bool(value == before))


def _inputs(origin: GraphOrigin, defined_now: set[int]) -> Iterator[gs.Tensor]:
    """List the graph's inputs, with the initialisers among them where they were."""
    variables = iter(origin.graph.inputs)
    for info in origin.proto.input:
        tensor = origin.tensors[info.name]
        if not isinstance(tensor, gs.Constant):
            yield from islice(variables, 1)
        elif id(tensor) in defined_now:
            yield tensor
    yield from variables


def _write_values(
    tensors: Iterable[gs.Tensor], originals: Iterable[ValueInfoProto], origin: GraphOrigin
) -> Iterator[ValueInfoProto]:
    """Describe the inputs or the outputs of a graph."""
    infos = {id(origin.tensors[info.name]): info for info in originals}
    for tensor in tensors:
        info = infos.get(id(tensor), ValueInfoProto())
        yield write_value(info, tensor, origin.types.get(id(tensor)) if info.name else None)


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
