"""Linear: Conv, Gemm and MatMul as one thing, y = W * x + b, and the layers a split makes of it.

A split weight runs in parts, `reduce` (1×1), `core` (the kernel) and `expand` (1×1)::

    Conv    → Conv for each part; the core has the stride, pads, auto_pad and dilations
    Gemm    → MatMul for each part but the last, then Gemm
    MatMul  → MatMul for each part, then Add if there is a bias

The bias goes to the last part. What stands before a Gemm is a MatMul, because Gemm needs a bias
before opset 11 (ONNX operators, Gemm).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from pwopt import cost
from pwopt.cost import ConvSize
from pwopt.errors import ModelError
from pwopt.graph import (
    Names,
    constant,
    decoded,
    is_op,
    known_constant,
    label,
    optional_input,
    shape_of,
)
from pwopt.lowrank import Factors
from pwopt.operators import auto_pad, is_same
from pwopt.shapes import Shape

Array = npt.NDArray[Any]

_Step = tuple[str, str, dict[str, Any], list[gs.Tensor]]  # part, operator, attributes, constants

_NOMINAL_SIZE = 28  # output positions along each axis of a map that is not known


@dataclass(frozen=True, slots=True)
class Window:
    """What a kernel sees of a map, one number for each spatial axis; of a row, all are empty.

    `pads` has all begins, then all ends, as ONNX has them.
    """

    kernel: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A Conv, Gemm or MatMul with constant weight and bias, seen as y = W * x + b.

    `size` describes it as a convolution; that of a Gemm or MatMul has the kernel () and a position
    for every row.
    """

    node: gs.Node
    size: ConvSize

    @property
    def name(self) -> str:
        """What messages call it."""
        return label(self.node)

    @property
    def where(self) -> str:
        """The tensor it writes."""
        return str(self.node.outputs[0].name)

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in what it reads and writes."""
        return 1 if self.node.op == "Conv" else -1

    @property
    def is_pointwise(self) -> bool:
        """Whether its kernel covers one position; it may have a stride."""
        return prod(self.size.kernel) == 1

    def window(self, size: Sequence[int]) -> Window:
        """Return the window of its kernel over an input of `size`: height, width and so on.

        auto_pad is resolved (ONNX operators, Conv): SAME_UPPER and SAME_LOWER pad for size / stride
        positions, rounded up, and crop nothing where a stride is longer than the kernel.
        """
        attrs, kernel = self.node.attrs, self.size.kernel
        axes = len(kernel)
        if not axes:
            return Window()
        strides = tuple(attrs.get("strides") or [1] * axes)
        dilations = tuple(attrs.get("dilations") or [1] * axes)
        pads = tuple(attrs.get("pads") or [0] * 2 * axes)
        if is_same(self.node):
            places = zip(size, kernel, strides, dilations, strict=True)
            totals = [
                max((-(-length // stride) - 1) * stride + (taps - 1) * dilation + 1 - length, 0)
                for length, taps, stride, dilation in places
            ]
            less, more = [total // 2 for total in totals], [(total + 1) // 2 for total in totals]
            is_upper = auto_pad(self.node) == "SAME_UPPER"
            pads = (*less, *more) if is_upper else (*more, *less)
        elif auto_pad(self.node) == "VALID":
            pads = (0,) * 2 * axes
        return Window(kernel, pads, strides, dilations)

    def weight(self) -> Array:
        """Decode the weight: (Cout, Cin, *kernel), alpha and transB of Gemm applied. Read only.

        Raises:
            ModelError: it holds NaN or infinite values.
        """
        values = decoded(known_constant(self.node.inputs[1]))
        if self.node.op != "Conv" and not self.node.attrs.get("transB"):
            values = values.T
        alpha = self.node.attrs.get("alpha", 1.0)
        return self._finite(values if alpha == 1 else values * alpha, "weight")

    def bias(self) -> Array:
        """Decode the bias: (Cout,), zeros where there is none, with beta of Gemm applied.

        Raises:
            ModelError: it holds NaN or infinite values.
        """
        channels, tensor = self.size.out_channels, optional_input(self.node, 2)
        if tensor is None:
            return np.zeros(channels, known_constant(self.node.inputs[1]).dtype)
        values = np.broadcast_to(known_constant(tensor).values.reshape(-1), channels)
        return self._finite(values * self.node.attrs.get("beta", 1.0), "bias")

    def split(self, factors: Factors, names: Names) -> list[gs.Node]:
        """Make the nodes that take its place, as the function `split` does."""
        return split(self.node, initializers(self.node, factors, names), names)

    def _finite(self, values: Array, what: str) -> Array:
        if not np.isfinite(values).all():
            raise ModelError(
                f"layer '{self.name}': the {what} holds NaN or infinite values; "
                "export the model again"
            )
        return values


def linear(node: gs.Node, shapes: Mapping[str, Shape]) -> Linear | str:
    """See a node as a linear layer, or say why it cannot be split; weights are not decoded.

    `shapes` are those of `pwopt.shapes.infer`.
    """
    if not is_op(node, "Conv", "Gemm", "MatMul"):
        return "only Conv, Gemm and MatMul are split"
    weight, tensor = constant(node.inputs[1]), optional_input(node, 2)
    if weight is None:
        return "weight is not a constant"
    if weight.dtype.kind != "f":
        return wrong_type(weight)
    if node.op != "Conv" and len(weight.shape) != 2:
        return f"weight of {node.op} is not a matrix"
    if node.attrs.get("transA"):
        return "Gemm with transA"
    size = (conv_size if node.op == "Conv" else _matrix_size)(node, weight, shapes)
    if size.groups > 1:
        return grouped(size)
    if tensor is None:
        return Linear(node, size)
    bias = constant(tensor)
    if bias is None:
        return "bias is not a constant"
    if prod(bias.shape) != 1 and not prod(bias.shape) == bias.shape[-1] == size.out_channels:
        return "bias is not one number a channel"
    return Linear(node, size)


def wrong_type(weight: gs.Constant) -> str:
    """Say why a weight that is not of floating point is not split."""
    return f"weight is {weight.dtype.name}: only float16, float32 and float64 are split"


def grouped(conv: ConvSize) -> str:
    """Say why a convolution of several groups is not split."""
    kind = "depthwise" if conv.groups == conv.in_channels else "grouped"
    return f"{kind}: {conv.groups} groups"


def conv_size(node: gs.Node, weight: gs.Constant, shapes: Mapping[str, Shape]) -> ConvSize:
    """Describe a Conv; where its map's size is not known, as one of a common size."""
    out_channels, in_channels, *kernel = weight.shape
    groups = node.attrs.get("group", 1)
    read, written = (cost.positions(shape_of(t, shapes)) for t in (node.inputs[0], node.outputs[0]))
    if read is None or written is None:
        strides = node.attrs.get("strides", [1] * len(kernel))
        written = _NOMINAL_SIZE ** len(kernel)
        read = written * prod(strides)
    return ConvSize(
        in_channels=in_channels * groups,
        out_channels=out_channels,
        kernel=tuple(kernel),
        groups=groups,
        bias=optional_input(node, 2) is not None,
        input_positions=read,
        output_positions=written,
    )


def _matrix_size(node: gs.Node, weight: gs.Constant, shapes: Mapping[str, Shape]) -> ConvSize:
    """Describe a Gemm or MatMul; axes of rows whose size is not known count as one row."""
    in_channels, out_channels = weight.shape[::-1] if node.attrs.get("transB") else weight.shape
    rows = prod(size or 1 for size in (shape_of(node.inputs[0], shapes) or ())[:-1])
    return ConvSize(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel=(),
        bias=optional_input(node, 2) is not None,
        input_positions=rows,
        output_positions=rows,
    )


def initializers(node: gs.Node, factors: Factors, names: Names) -> dict[str, gs.Constant]:
    """Make the initialisers of a split, of the type of the weight that `node` reads.

    Values beyond that type become infinite. Convolutions that share a weight can share these.

    Returns:
        Part → weight, in the order in which the parts run, then "bias" if the factors have one.
        One of zeros is left out for a MatMul, which needs no Add then.
    """
    where, dtype = node.outputs[0].name, known_constant(node.inputs[1]).dtype
    arrays = {}
    for part in ("reduce", "core", "expand"):
        weight = getattr(factors, part)
        if weight is not None:  # what a Gemm or MatMul reads is (in, out)
            arrays[part] = (f"{part}.weight", weight if node.op == "Conv" else weight.T)
    if factors.bias is not None and (node.op != "MatMul" or factors.bias.any()):
        arrays["bias"] = ("bias", factors.bias)
    with np.errstate(over="ignore"):
        return {
            part: gs.Constant(names.tensor(f"{where}.{name}"), values.astype(dtype, copy=False))
            for part, (name, values) in arrays.items()
        }


def split(node: gs.Node, parts: Mapping[str, gs.Constant], names: Names) -> list[gs.Node]:
    """Make the nodes that take the place of `node`, to be put there by `pwopt.graph.replace`.

    The last one writes the tensor that `node` wrote, which `node` itself no longer does.

    Args:
        node: A Conv, Gemm or MatMul that `linear` would split; the bias of a Conv may be computed.
        parts: What `initializers` made; without a bias, the layer's own stays.
        names: Names that are free.
    """
    name, output, tensor = label(node), node.outputs[0], node.inputs[0]
    bias = [parts["bias"]] if "bias" in parts else _own_bias(node, names)
    steps = [_step(node, part, weight) for part, weight in parts.items() if part != "bias"]
    if node.op != "MatMul":
        part, _, attrs, weights = steps[-1]
        steps[-1] = (part, node.op, attrs, weights + bias)
    elif bias:
        steps.append(("bias", "Add", {}, bias))
    node.outputs.clear()
    nodes = []
    for part, op, attrs, constants in steps:
        inputs, tensor = [tensor, *constants], output
        if part != steps[-1][0]:
            tensor = gs.Variable(names.tensor(f"{output.name}.{part}"), output.dtype)
        new = names.node(f"{name}.{part}")
        nodes.append(gs.Node(op, new, attrs, inputs, [tensor], node.domain))
    return nodes


def _step(node: gs.Node, part: str, weight: gs.Constant) -> _Step:
    if node.op != "Conv":
        return part, "MatMul", {}, [weight]
    attrs = dict(node.attrs) if part == "core" else {}
    return part, "Conv", attrs | {"kernel_shape": list(weight.shape[2:])}, [weight]


def _own_bias(node: gs.Node, names: Names) -> list[gs.Tensor]:
    """Return the bias input, as an initialiser where it is constant, for fast kernels need that."""
    bias = optional_input(node, 2)
    if bias is None:
        return []
    value, beta = constant(bias), node.attrs.get("beta", 1.0)
    if value is None or (value is bias and beta == 1):
        return [bias]
    values = np.asarray(value.values * beta, value.dtype)  # a product of no axes is no array
    return [gs.Constant(names.tensor(f"{node.outputs[0].name}.bias"), values)]
