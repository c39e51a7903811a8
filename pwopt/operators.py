"""Operators: which work element by element, and what others do at inference."""

import onnx_graphsurgeon as gs

from pwopt.constants import constant_value
from pwopt.graph import constant, is_op, is_output, optional_input

UNARY = (
    *("Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu"),
    *("HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal"),
    *("Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign"),
    *("Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
)
"""Elementwise in their first input; any others are scalars."""

ARITHMETIC = ("Add", "Sub", "Mul", "Div")
"""Elementwise in two inputs, and affine in each (Div in the first)."""

BINARY = (*ARITHMETIC, "Pow", "PRelu")
"""Elementwise in two inputs."""

BROADCASTING = (*BINARY, "Max", "Mean", "Min", "Sum")
"""Elementwise in all inputs, which are broadcast; before opset 7 by other rules, the last four only
from opset 8 on."""


def is_training(node: gs.Node, opset: int) -> bool:
    """Tell whether a BatchNormalization or a Dropout may train (ONNX operators, all versions)."""
    mode = node.attrs.get("training_mode", 0)
    given = optional_input(node, 2) if node.op == "Dropout" else None
    if given is not None:
        value = constant_value(given)
        mode = value is None or value.values.any()
    # Before opset 7, training is the default; `is_test` does not exist later.
    return bool(mode) or not node.attrs.get("is_test", opset >= 7)


def is_one_output(graph: gs.Graph, node: gs.Node) -> bool:
    """Tell whether nobody sees more of `node` than its first output."""
    return not any(t.outputs or is_output(graph, t) for t in node.outputs[1:])


def gives_on(graph: gs.Graph, node: gs.Node) -> bool:
    """Tell whether `node` gives its first input on as it is: Identity, or Dropout at inference."""
    if not is_op(node, "Dropout"):
        return is_op(node, "Identity")
    return is_one_output(graph, node) and not is_training(node, graph.opset)


def float_weight(layer: gs.Node, *, computed: bool = False, place: str = "") -> gs.Constant | str:
    """Return the weight of a layer that has one, or why it is no constant of floating point.

    Args:
        layer: Conv, ConvTranspose, Gemm or MatMul.
        computed: Whether the weight may be computed, as `constant_value` can.
        place: Which layer it is, if there are several.
    """
    weight = (constant_value if computed else constant)(layer.inputs[1])
    if weight is not None and weight.dtype.kind == "f":
        return weight
    whose = " ".join(filter(None, ("the", place, f"{layer.op}'s weight")))
    return f"{whose} is {'not a constant' if weight is None else weight.dtype.name}"


def is_pointwise(node: gs.Node) -> bool:
    """Tell whether `node` is a Conv with a kernel of 1 along every axis."""
    if not is_op(node, "Conv"):
        return False
    weight = constant(node.inputs[1])
    shape = node.inputs[1].shape if weight is None else weight.shape
    kernel = node.attrs.get("kernel_shape", shape[2:] if shape else None)
    return bool(kernel) and all(size == 1 for size in kernel)


def reduced_axes(reduction: gs.Node) -> list[int] | None:
    """Return the axes of a ReduceMean, [] where it names none; None if they are not constant."""
    given = optional_input(reduction, 1)  # from opset 18 on
    if given is None:
        return list(reduction.attrs.get("axes", ()))
    axes = constant(given)
    return None if axes is None else [int(axis) for axis in axes.values.reshape(-1)]


def is_over_space(reduction: gs.Node, rank: int) -> bool:
    """Tell whether a ReduceMean of a map with `rank` axes goes over all but the first two."""
    axes = reduced_axes(reduction) or []
    return sorted(axis % rank for axis in axes) == list(range(2, rank))


def auto_pad(node: gs.Node) -> str:
    """Return how a Conv or a pool pads by itself; NOTSET if its pads say."""
    return str(node.attrs.get("auto_pad", "NOTSET"))


def is_same(node: gs.Node) -> bool:
    """Tell whether a Conv or a pool pads for as many windows as size / stride, rounded up."""
    return auto_pad(node).startswith("SAME")


def shifts_by_size(kernel: int, stride: int) -> bool:
    """Tell whether auto_pad=SAME_* moves windows along an axis, by an amount that its size sets.

    A kernel of 1 needs no padding, but at large strides onnxruntime crops the input then: seen
    from a stride of 4 on, where it should take what a stride of 2 or 3 takes.
    """
    return kernel > 1 or stride > 2


def contradicts_itself(node: gs.Node) -> bool:
    """Tell whether a Conv has both auto_pad and pads: runtimes differ on which one holds."""
    return auto_pad(node) != "NOTSET" and any(node.attrs.get("pads", ()))
