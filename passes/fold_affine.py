"""Fold-affine: put per-channel constants behind a convolution or Gemm into its weight and bias.

Before → after, with a scale s and a shift t per output channel::

    x → Conv(W, b) → BatchNormalization | Mul | Add → y      ⇒      x → Conv(W', b') → y
    x → Gemm(W, b) → BatchNormalization | Mul | Add → y      ⇒      x → Gemm(W', b') → y

Maths: s·(W*x + b) + t = (s·W)*x + (s·b + t). For BatchNormalization s = scale/√(var + ε) and
t = bias − s·mean; for Mul t = 0, for Add s = 1. Computed in float64; each fold rounds once to the
weight's type.

Conditions: the Conv or Gemm has constant weight and bias, and nobody else sees its output; the
other operand is constant and varies along the channels only; BatchNormalization is in inference
mode. A weight that others read too is copied first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from pwopt.graph import (
    Names,
    constant,
    is_only_reader,
    is_op,
    optional_input,
    producer,
    replace,
    set_input,
)
from pwopt.model import Model
from pwopt.rewriting import Context, Event, Pass

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class FoldAffine(Pass):
    """Fold per-channel constants into the Conv or Gemm before them."""

    name: ClassVar[str] = "fold-affine"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Fold in the order of the graph, so that a chain folds into its layer one by one."""
        names = Names(model)
        for node in list(model.graph.nodes):
            if not is_op(node, "BatchNormalization", "Mul", "Add"):
                continue
            where = node.outputs[0].name
            tensor = _layer_output(node)
            if tensor is not None:
                reason = _fold(model.graph, node, tensor, names)
            elif node.op == "BatchNormalization":
                before = producer(node.inputs[0])
                reason = f"reads {before.op if before else 'an input'}, not a Conv or Gemm"
            else:
                continue  # arithmetic elsewhere is no site
            if reason:
                yield Event("skipped", where, reason)
            else:
                yield Event("rewrote", where, f"{node.op} folded", {"op": node.op})


class _Affine(NamedTuple):
    """y = scale·x + shift, both of shape (channels,), float64."""

    scale: Array
    shift: Array


def _layer_output(node: gs.Node) -> gs.Tensor | None:
    """Return the operand of `node` that a Conv or Gemm writes; None if there is none."""
    for tensor in node.inputs:
        layer = producer(tensor)
        if layer is not None and is_op(layer, "Conv", "Gemm"):
            return tensor
    return None


@np.errstate(over="ignore", divide="ignore", invalid="ignore")  # looked for at the end
def _fold(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor, names: Names) -> str | None:
    """Fold `node` into the layer that writes `tensor`; return why if that is not possible."""
    layer = tensor.inputs[0]
    if not is_only_reader(graph, node, tensor):
        return f"the {layer.op}'s output is read elsewhere too"
    if graph.opset < 7 and (layer.op, node.op) != ("Conv", "BatchNormalization"):
        return "before opset 7, operands are broadcast by other rules"
    weight = constant(layer.inputs[1])
    if weight is None:
        return f"the {layer.op}'s weight is not a constant"
    if weight.dtype.kind != "f":
        return f"the {layer.op}'s weight is {weight.dtype.name}"
    axis = 0 if layer.op == "Conv" or layer.attrs.get("transB", 0) else 1
    channels = weight.shape[axis]
    bias = _bias(layer, channels)
    if isinstance(bias, str):
        return bias
    rank = len(weight.shape) if layer.op == "Conv" else 2
    affine = _affine(node, tensor, channels, rank, graph.opset)
    if isinstance(affine, str):
        return affine

    along = [channels if i == axis else 1 for i in range(len(weight.shape))]
    exact = weight.values * affine.scale.reshape(along)
    new_weight = exact.astype(weight.dtype)
    new_bias = (bias * affine.scale + affine.shift).astype(weight.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return f"the folded weight would not be finite in {weight.dtype.name}"
    if _loses_digits(new_weight, exact, axis):
        return f"the folded weight would be too small for {weight.dtype.name}"
    layer.attrs.pop("beta", None)
    _set_constant(graph, layer, 1, new_weight, names, "weight")
    _set_constant(graph, layer, 2, new_bias, names, "bias")

    output = node.outputs[0]
    node.outputs.clear()
    layer.outputs.clear()
    layer.outputs.append(output)
    replace(graph, node, [])
    return None


def _loses_digits(rounded: Array, exact: Array, axis: int) -> bool:
    """Tell whether a whole channel is so small that its type rounds it coarsely, or to zero."""
    others = tuple(i for i in range(exact.ndim) if i != axis)
    error = np.abs(rounded - exact).max(axis=others)
    size = np.abs(exact).max(axis=others)
    return bool((error > 2 * np.finfo(rounded.dtype).eps * size).any())


def _bias(layer: gs.Node, channels: int) -> Array | str:
    """Return what the layer adds per channel, shape (channels,), or why that is not known."""
    tensor = optional_input(layer, 2)
    if tensor is None:
        return np.zeros(channels)
    bias = constant(tensor)
    if bias is None:
        return f"the {layer.op}'s bias is not a constant"
    if bias.shape and int(np.prod(bias.shape[:-1])) != 1:
        return f"the {layer.op}'s bias differs from row to row"
    scaled = layer.attrs.get("beta", 1.0) * bias.values.astype(np.float64)
    return np.broadcast_to(scaled.reshape(-1), channels)


def _affine(
    node: gs.Node, tensor: gs.Tensor, channels: int, rank: int, opset: int
) -> _Affine | str:
    """Read scale and shift of `node`, whose input `tensor` has `rank` axes, channels second."""
    if node.op == "BatchNormalization":
        return _batch_norm(node, opset)
    other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
    operand = constant(other)
    if operand is None:
        return f"the other operand of {node.op} is not a constant"
    # Shapes align from the right (ONNX Broadcasting): axis 1 is the only one that may vary.
    full = [1] * (rank - len(operand.shape)) + list(operand.shape)
    if len(full) != rank or full[1] not in (1, channels) or np.prod(full) != full[1]:
        return f"the operand of {node.op} varies along more than the channels"
    values = np.broadcast_to(operand.values.astype(np.float64).reshape(-1), channels)
    if node.op == "Mul":
        return _Affine(values, np.zeros(channels))
    return _Affine(np.ones(channels), values)


def _batch_norm(node: gs.Node, opset: int) -> _Affine | str:
    """Read a BatchNormalization (ONNX operators, versions 1 to 15) in inference mode."""
    # Before opset 7, training is the default; `is_test` does not exist later.
    if node.attrs.get("training_mode", 0) or not node.attrs.get("is_test", opset >= 7):
        return "BatchNormalization is in training mode"
    if not node.attrs.get("spatial", 1):
        return "BatchNormalization normalises every position on its own"
    if len(node.outputs) > 1:
        return "BatchNormalization gives out its statistics"
    constants = [constant(tensor) for tensor in node.inputs[1:5]]
    if any(value is None for value in constants):
        return "BatchNormalization's parameters are not constant"
    gamma, beta, mean, variance = (c.values.astype(np.float64) for c in constants if c is not None)
    scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return _Affine(scale, beta - scale * mean)


def _set_constant(
    graph: gs.Graph, layer: gs.Node, index: int, values: Array, names: Names, part: str
) -> None:
    """Give `layer` an initialiser with `values`: its own one, or a new one if others read that."""
    old = optional_input(layer, index)
    if isinstance(old, gs.Constant) and is_only_reader(graph, layer, old):
        old.values = values
        return
    name = names.tensor(f"{layer.outputs[0].name}.{part}")
    set_input(graph, layer, index, gs.Constant(name, values))
