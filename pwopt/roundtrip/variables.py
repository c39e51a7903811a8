"""ValueInfoProto ↔ gs.Variable: what is said about a tensor that is computed or fed."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorShapeProto, ValueInfoProto, helper

from pwopt.roundtrip.tensors import dtype

Type = tuple[Any, tuple[Any, ...] | None]
"""A tensor's element type and shape, to see whether they were edited."""


def type_of(tensor: gs.Tensor) -> Type:
    """Return a tensor's element type and shape as they are now."""
    return tensor.dtype, None if tensor.shape is None else tuple(tensor.shape)


def read_variable(info: ValueInfoProto) -> gs.Variable:
    """Make a variable of the type and shape that `info` declares.

    Raises:
        ModelError: an element type that the installed onnx does not know.
    """
    tensor = info.type.tensor_type
    kind = dtype(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return gs.Variable(info.name, kind)
    return gs.Variable(info.name, kind, list(axes(tensor.shape)))


def axes(shape: TensorShapeProto) -> tuple[int | str | None, ...]:
    """Read a shape; open axes are a symbol's name or None."""
    return tuple(
        d.dim_value if d.WhichOneof("value") == "dim_value" else d.dim_param or None
        for d in shape.dim
    )


def write_value(original: ValueInfoProto, tensor: gs.Tensor, before: Type | None) -> ValueInfoProto:
    """Describe a tensor as `original` does, or by its own type and shape if those were edited."""
    info = ValueInfoProto()
    info.CopyFrom(original)
    info.name = tensor.name
    if before == type_of(tensor) or tensor.dtype is None:
        return info
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    edited = helper.make_tensor_type_proto(kind, tensor.shape)
    before_axes = info.type.tensor_type.shape.dim
    for axis, old in zip(edited.tensor_type.shape.dim, before_axes, strict=False):
        if old.denotation:
            axis.denotation = old.denotation
    if info.type.denotation:
        edited.denotation = info.type.denotation
    info.type.CopyFrom(edited)
    return info
