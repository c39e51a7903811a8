"""Constants as exporters leave them: behind casts, reshapes and the like."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import helper

from pwopt.graph import constant, is_op, producer

Array = npt.NDArray[Any]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def constant_value(tensor: gs.Tensor) -> gs.Constant | None:
    """Return the constant that `tensor` is, or that a few operators on constants make of it.

    Known are Constant with any attribute, Identity, Cast, CastLike, Reshape, Expand, Squeeze,
    Unsqueeze and Transpose. What is computed comes as a new gs.Constant, which no node reads.
    """
    known = constant(tensor)
    if known is not None:
        return known
    node = producer(tensor)
    if node is None or not is_op(node, "Constant", *_RULES):
        return None
    if node.op == "Constant":
        values = _attribute(node)
    elif node.op == "CastLike":
        values = _cast_like(node)
    else:
        inputs = [constant_value(t) for t in node.inputs if not t.is_empty()]
        if any(value is None for value in inputs):
            return None
        values = _RULES[node.op](node, [c.values for c in inputs if c is not None])
    return None if values is None else gs.Constant(tensor.name, values)


def _attribute(node: gs.Node) -> Array | None:
    """Read a Constant that holds numbers instead of a tensor (ONNX operators, Constant-12)."""
    for name, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        for key in (name, f"{name}s"):
            if key in node.attrs:
                return np.asarray(node.attrs[key], dtype)
    return None


def _cast_like(node: gs.Node) -> Array | None:
    value, dtype = constant_value(node.inputs[0]), _dtype(node.inputs[1])
    return None if value is None or dtype is None else _converted(value.values, dtype)


def _dtype(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """Return the type of `tensor`: its own, or that of the weight of the layer that writes it."""
    node = producer(tensor)
    if tensor.dtype is None and node is not None and is_op(node, *_LAYERS):
        tensor = node.inputs[1]
    return None if tensor.dtype is None else np.dtype(tensor.dtype)


def _converted(values: Array, dtype: Any) -> Array | None:
    """Cast between the numbers that numpy knows; floats only to floats."""
    source, target = values.dtype.kind, np.dtype(dtype).kind
    if source not in "fiub" or target not in ("fiu" if source != "f" else "f"):
        return None
    with np.errstate(over="ignore"):  # becomes infinite, as in ONNX
        return values.astype(dtype)


def _cast(node: gs.Node, inputs: Sequence[Array]) -> Array | None:
    target = node.attrs["to"]
    dtype = helper.tensor_dtype_to_np_dtype(target) if isinstance(target, int) else target
    return _converted(inputs[0], dtype)


def _reshape(node: gs.Node, inputs: Sequence[Array]) -> Array:
    values, shape = inputs[0], inputs[1].tolist()
    if not node.attrs.get("allowzero", 0):  # 0 keeps the size that is there
        shape = [size or values.shape[axis] for axis, size in enumerate(shape)]
    return values.reshape(shape)


def _expand(node: gs.Node, inputs: Sequence[Array]) -> Array:
    values, shape = inputs
    return np.broadcast_to(values, np.broadcast_shapes(values.shape, tuple(shape.tolist())))


def _axes(node: gs.Node, inputs: Sequence[Array]) -> tuple[int, ...] | None:
    """Return axes from the attribute (before opset 13) or from the input."""
    axes = node.attrs.get("axes", inputs[1].tolist() if len(inputs) > 1 else None)
    return None if axes is None else tuple(axes)


def _unsqueeze(node: gs.Node, inputs: Sequence[Array]) -> Array:
    return np.expand_dims(inputs[0], _axes(node, inputs) or ())


def _squeeze(node: gs.Node, inputs: Sequence[Array]) -> Array:
    return np.squeeze(inputs[0], _axes(node, inputs))


def _transpose(node: gs.Node, inputs: Sequence[Array]) -> Array:
    return np.transpose(inputs[0], node.attrs.get("perm"))


_RULES: dict[str, Callable[[gs.Node, Sequence[Array]], Array | None]] = {
    "Identity": lambda node, inputs: inputs[0],
    "Cast": _cast,
    "CastLike": lambda node, inputs: None,  # its second input need not be constant
    "Reshape": _reshape,
    "Expand": _expand,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
}
