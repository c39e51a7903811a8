"""Affine: what BatchNormalization, and arithmetic with constants, does to each channel."""

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.constants import Array, constant_value
from pwopt.operators import ARITHMETIC, is_training

OPERATORS = ("BatchNormalization", *ARITHMETIC)


class Affine(NamedTuple):
    """y = scale·x + shift, both of shape (channels,), float64."""

    scale: Array
    shift: Array

    def after(self, first: "Affine") -> "Affine":
        """Return the affine that does `first`, then this one."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)


def affine(
    node: gs.Node, tensor: gs.Tensor, channels: int, *, trailing: int, rank: int | None, opset: int
) -> Affine | str:
    """Read what `node`, one of `OPERATORS`, does to the channels of its input `tensor`.

    Args:
        node: The operator.
        tensor: The one of its inputs that is not constant.
        channels: Channels of `tensor`.
        trailing: How many axes `tensor` has behind that of the channels.
        rank: How many it has in all; None if that is not known.
        opset: Version of the standard operators.

    Returns:
        Scale and shift, or why `node` is no such thing.
    """
    if node.op == "BatchNormalization":
        if rank != trailing + 2:
            return "BatchNormalization normalises another axis"
        return _batch_norm(node, opset)
    other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
    operand = constant_value(other)
    if operand is None:
        return f"the other operand of {node.op} is not a constant"
    # Shapes align from the right (ONNX Broadcasting): the channels are the only axis that may vary.
    shape = [1] * (trailing + 1 - len(operand.shape)) + list(operand.shape)
    size = shape[-1 - trailing]
    known = trailing + 1 if rank is None else rank
    if len(shape) > known or size not in (1, channels) or np.prod(shape) != size:
        return f"the operand of {node.op} varies along more than the channels"
    values = np.broadcast_to(operand.values.astype(np.float64).reshape(-1), channels)
    ones, zeros = np.ones(channels), np.zeros(channels)
    if node.op == "Mul":
        return Affine(values, zeros)
    if node.op == "Add":
        return Affine(ones, values)
    if node.op == "Sub":
        return Affine(ones, -values) if node.inputs[0] is tensor else Affine(-ones, values)
    if node.inputs[0] is not tensor:
        return "Div divides by what is not constant"
    with np.errstate(divide="ignore"):  # whoever folds it looks for what is not finite
        return Affine(1 / values, zeros)


def _batch_norm(node: gs.Node, opset: int) -> Affine | str:
    """Read a BatchNormalization (ONNX operators, versions 1 to 15) in inference mode."""
    if is_training(node, opset):
        return "BatchNormalization is in training mode"
    if not node.attrs.get("spatial", 1):
        return "BatchNormalization normalises every position on its own"
    if len(node.outputs) > 1:
        return "BatchNormalization gives out its statistics"
    constants = [constant_value(tensor) for tensor in node.inputs[1:5]]
    if any(value is None for value in constants):
        return "BatchNormalization's parameters are not constant"
    gamma, beta, mean, variance = (c.values.astype(np.float64) for c in constants if c is not None)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        return Affine(scale, beta - scale * mean)
