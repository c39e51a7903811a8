"""Pools: windows that slide, and whole maps."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor

from pwopt.learn.operators.node import Node
from pwopt.learn.operators.windows import Windows, pad, windows

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def max_pool(node: Node, x: Tensor) -> Tensor:
    """ONNX MaxPool, its values only."""
    w = windows(node, x.shape[2:], node.get("kernel_shape"))
    beyond = _beyond(node, x.shape[2:], w)
    padding = list(w.before)
    fits = all(2 * p <= k for p, k in zip(padding, w.kernel, strict=True))
    if any(beyond) or not w.is_symmetric or not fits:
        after = [a + b for a, b in zip(w.after, beyond, strict=True)]
        x, padding = pad(x, w.before, after, value=-math.inf), [0] * len(padding)
    pool = _MAX[len(padding)]
    return pool(x, list(w.kernel), list(w.strides), padding, list(w.dilations))


def average_pool(node: Node, x: Tensor) -> Tensor:
    """ONNX AveragePool."""
    w = windows(node, x.shape[2:], node.get("kernel_shape"))
    beyond = _beyond(node, x.shape[2:], w)
    counts_pads = bool(node.get("count_include_pad", 0))
    padding = list(w.before)
    fits = all(2 * p <= k for p, k in zip(padding, w.kernel, strict=True))
    if fits and w.is_symmetric and not any(beyond) and set(w.dilations) == {1}:
        pool = _AVERAGE[len(padding)]
        return pool(x, list(w.kernel), list(w.strides), padding, False, counts_pads)
    inside = torch.ones_like(x[:1, :1])
    if counts_pads:
        inside = pad(inside, w.before, w.after, value=1)
        counts = _summed(pad(inside, [0] * len(beyond), beyond), w)
    else:
        counts = _summed(_padded(inside, w, beyond), w)
    return _summed(_padded(x, w, beyond), w) / counts


def lp_pool(node: Node, x: Tensor) -> Tensor:
    """ONNX LpPool: the p-th root of the sum of p-th powers."""
    w = windows(node, x.shape[2:], node.get("kernel_shape"))
    p = node.get("p", 2)
    powers = x.abs().pow(p)
    return _summed(_padded(powers, w, _beyond(node, x.shape[2:], w)), w).pow(1 / p)


def global_average_pool(node: Node, x: Tensor) -> Tensor:
    """ONNX GlobalAveragePool."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_max_pool(node: Node, x: Tensor) -> Tensor:
    """ONNX GlobalMaxPool."""
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def _beyond(node: Node, size: Sequence[int], w: Windows) -> list[int]:
    """Return by how much the last windows of a pool with ceil_mode reach beyond the padding.

    Windows that would start there are left out (ONNX operators, AveragePool-19).
    """
    if not node.get("ceil_mode", 0):
        return [0] * len(size)
    return [
        _reach(length, *axis)
        for length, *axis in zip(size, w.before, w.after, w.extents, w.strides, strict=True)
    ]


def _reach(length: int, before: int, after: int, extent: int, stride: int) -> int:
    padded = length + before + after
    count = -(-(padded - extent) // stride) + 1
    if (count - 1) * stride >= length + before:
        count -= 1
    return max((count - 1) * stride + extent - padded, 0)


def _padded(x: Tensor, w: Windows, beyond: Sequence[int]) -> Tensor:
    return pad(x, w.before, [a + b for a, b in zip(w.after, beyond, strict=True)])


def _summed(x: Tensor, w: Windows) -> Tensor:
    """Sum over each window of a map that is padded already."""
    rank = len(w.kernel)
    planes = x.reshape(-1, 1, *x.shape[2:])
    sums = _CONV[rank](planes, x.new_ones(1, 1, *w.kernel), None, w.strides, 0, w.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])
