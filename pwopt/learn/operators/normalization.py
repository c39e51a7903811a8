"""Normalisations, as at inference."""

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor

from pwopt.learn.operators.node import Node
from pwopt.learn.operators.windows import pad


def batch_normalization(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """ONNX BatchNormalization at inference: mean and variance are given."""
    return F.batch_norm(x, mean, variance, scale, bias, eps=node.get("epsilon", 1e-5))


def instance_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """ONNX InstanceNormalization: every channel is a group of its own."""
    return F.group_norm(x, x.shape[1], scale, bias, node.get("epsilon", 1e-5))


def group_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """ONNX GroupNormalization; before opset 21 it has one scale and bias a group."""
    groups = node.get("num_groups")
    if node.opset < 21:
        times = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(times), bias.repeat_interleave(times)
    return F.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


def layer_normalization(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """ONNX LayerNormalization, with mean and inverse deviation if asked for."""
    shape = x.shape[node.get("axis", -1) % x.dim() :]
    scale, bias = scale.expand(shape), None if bias is None else bias.expand(shape)
    epsilon = node.get("epsilon", 1e-5)
    if node.outputs == 1:
        return F.layer_norm(x, shape, scale, bias, epsilon)
    return torch.native_layer_norm(x, shape, scale, bias, epsilon)


def lrn(node: Node, x: Tensor) -> Tensor:
    """ONNX LRN: over `size` neighbouring channels."""
    size, channels = node.get("size"), x.shape[1]
    before = (size - 1) // 2
    rest = [0] * (x.dim() - 2)
    squares = pad(x * x, [before, *rest], [size - 1 - before, *rest])
    total = sum(squares[:, i : i + channels] for i in range(size))
    factor = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * total
    normalized: Tensor = x / factor ** node.get("beta", 0.75)
    return normalized


def dropout(node: Node, x: Tensor, *_: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """ONNX Dropout at inference: nothing is dropped."""
    return (x, torch.ones_like(x, dtype=torch.bool)) if node.outputs > 1 else x
