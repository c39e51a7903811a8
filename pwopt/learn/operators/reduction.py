"""Reductions over axes, sums along them, and the largest elements."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pwopt.learn.operators.node import Node, ints

_Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def reduce(function: _Reduction) -> Callable[..., Tensor]:
    """Make an operator of a function that reduces the axes it gets.

    The axes are an attribute, or an input from opset 18 on (of ReduceSum: 13). Without any, all
    are reduced, or with `noop_with_empty_axes` none: then every element is reduced by itself.
    """

    def operator(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        keep = bool(node.get("keepdims", 1))
        given = node.get("axes", ()) if axes is None else ints(axes)
        if not given and node.get("noop_with_empty_axes", 0):
            return function(x.unsqueeze(-1), (-1,), False)
        return function(x, tuple(given or range(x.dim())), keep)

    return operator


def product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """Multiply over several axes."""
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def total(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """Add over several axes; the type stays."""
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def arg_max(node: Node, x: Tensor) -> Tensor:
    """ONNX ArgMax."""
    return _arg(node, x, torch.argmax)


def arg_min(node: Node, x: Tensor) -> Tensor:
    """ONNX ArgMin."""
    return _arg(node, x, torch.argmin)


class _Arg(Protocol):
    def __call__(self, x: Tensor, /, *, dim: int, keepdim: bool) -> Tensor: ...


def _arg(node: Node, x: Tensor, function: _Arg) -> Tensor:
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    if not node.get("select_last_index", 0):
        return function(x, dim=axis, keepdim=keep)
    place: Tensor = x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keep)
    return place


def top_k(node: Node, x: Tensor, count: Tensor | None = None) -> tuple[Tensor, ...]:
    """ONNX TopK, equal elements in order; before opset 10, k is an attribute."""
    k = node.get("k") if count is None else int(count.item())
    axis = node.get("axis", -1)
    values, places = x.sort(dim=axis, descending=bool(node.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, k), places.narrow(axis, 0, k)


def cumulative_sum(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    """ONNX CumSum."""
    along = int(axis.item())
    x = x.flip(along) if node.get("reverse", 0) else x
    sums = x.cumsum(along, dtype=x.dtype)
    sums = sums - x if node.get("exclusive", 0) else sums
    return sums.flip(along) if node.get("reverse", 0) else sums
