"""A model without its large weights: enough to check it and to infer shapes."""

import math

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from pwopt import external
from pwopt.roundtrip import SMALL, copy_fields


def without_weights(model: ModelProto, folder: str) -> ModelProto:
    """Copy a model but for its large weights, which become inputs.

    Small tensors stay, since shapes may be computed from them; so do those in subgraphs.

    Args:
        model: The model; large weights of its outer graph are not read.
        folder: Where its external data lies.

    Raises:
        ModelError: external data of a small tensor that cannot be read.
    """
    result = ModelProto()
    copy_fields(model, result, without={"graph"})
    graph = result.graph
    copy_fields(model.graph, graph, without={"node", "initializer"})
    listed = {info.name for info in graph.input}
    for tensor in model.graph.initializer:
        if not _is_large(tensor):
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            graph.input.append(_describe(tensor, tensor.name))
    for node in model.graph.node:
        value = node.attribute[0].t if _is_plain_constant(node) else None
        if value is not None and _is_large(value):
            graph.input.append(_describe(value, node.output[0]))
        else:
            graph.node.append(node)
    external.load(result, folder)
    return result


def _is_plain_constant(node: NodeProto) -> bool:
    return (
        node.op_type == "Constant"
        and node.domain in ("", "ai.onnx")
        and len(node.attribute) == 1
        and node.attribute[0].type == AttributeProto.TENSOR
    )


def _is_large(tensor: TensorProto) -> bool:
    return math.prod(tensor.dims) > SMALL


def _describe(tensor: TensorProto, name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)


def drop_untrue_value_info(graph: GraphProto, skeleton: ModelProto) -> None:
    """Drop the entries that shape inference, told nothing about inner tensors, contradicts.

    If it contradicts any, then those go too of which it knows nothing: they may follow from it.

    Args:
        graph: The graph to edit.
        skeleton: The model it belongs to, without weights; its own value_info is lost.
    """
    del skeleton.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(skeleton)
    types = {info.name: info.type.tensor_type for info in inferred.graph.value_info}
    known = [info for info in graph.value_info if info.name in types]
    true = [info for info in known if _agree(info.type.tensor_type, types[info.name])]
    if len(true) < len(known):
        del graph.value_info[:]
        graph.value_info.extend(true)


def _agree(one: onnx.TypeProto.Tensor, other: onnx.TypeProto.Tensor) -> bool:
    if one.elem_type != other.elem_type:
        return False
    if not (one.HasField("shape") and other.HasField("shape")):
        return True
    if len(one.shape.dim) != len(other.shape.dim):
        return False
    return all(
        not (a.HasField("dim_value") and b.HasField("dim_value")) or a.dim_value == b.dim_value
        for a, b in zip(one.shape.dim, other.shape.dim, strict=True)
    )
