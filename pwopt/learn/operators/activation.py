"""Activations: the non-linear functions between layers."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor

from pwopt.learn.operators.node import Node


def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """ONNX LeakyRelu."""
    return F.leaky_relu(x, node.get("alpha", 0.01))


def prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    """ONNX PRelu; the slope is broadcast to x, before opset 7 along the channels."""
    if node.opset < 7 and slope.numel() > 1:
        slope = slope.reshape(-1, *[1] * (x.dim() - 2))
    return torch.where(x < 0, slope * x, x)


def elu(node: Node, x: Tensor) -> Tensor:
    """ONNX Elu."""
    return F.elu(x, node.get("alpha", 1.0))


def selu(node: Node, x: Tensor) -> Tensor:
    """ONNX Selu."""
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813)
    scaled: Tensor = gamma * F.elu(x, alpha)
    return scaled


def celu(node: Node, x: Tensor) -> Tensor:
    """ONNX Celu."""
    return F.celu(x, node.get("alpha", 1.0))


def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """ONNX HardSigmoid."""
    return torch.clamp(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0, 1)


def swish(node: Node, x: Tensor) -> Tensor:
    """ONNX Swish."""
    return x * torch.sigmoid(node.get("alpha", 1.0) * x)


def gelu(node: Node, x: Tensor) -> Tensor:
    """ONNX Gelu."""
    return F.gelu(x, approximate=node.get("approximate", "none"))


def shrink(node: Node, x: Tensor) -> Tensor:
    """ONNX Shrink: what is small becomes 0, the rest moves towards it."""
    limit, bias = node.get("lambd", 0.5), node.get("bias", 0.0)
    moved = torch.where(x > limit, x - bias, torch.zeros_like(x))
    return torch.where(x < -limit, x + bias, moved)


def thresholded_relu(node: Node, x: Tensor) -> Tensor:
    """ONNX ThresholdedRelu."""
    return torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


def clip(
    node: Node, x: Tensor, smallest: Tensor | None = None, largest: Tensor | None = None
) -> Tensor:
    """ONNX Clip; before opset 11 its bounds are attributes."""
    low = node.get("min") if smallest is None else smallest.item()
    high = node.get("max") if largest is None else largest.item()
    return x if low is None and high is None else torch.clamp(x, low, high)


def softmax(node: Node, x: Tensor) -> Tensor:
    """ONNX Softmax."""
    return _over_axis(node, x, torch.softmax)


def log_softmax(node: Node, x: Tensor) -> Tensor:
    """ONNX LogSoftmax."""
    return _over_axis(node, x, torch.log_softmax)


def _over_axis(node: Node, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply along an axis; before opset 13, over all axes from that one on."""
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % max(x.dim(), 1)
    rows = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return function(rows, 1).reshape(x.shape)
