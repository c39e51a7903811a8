"""Arithmetic, comparisons and logic, element by element, with numpy's broadcasting."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pwopt.learn.operators.node import Node, together

Operator = Callable[..., Tensor]


def unary(function: Callable[[Tensor], Tensor]) -> Operator:
    """Make an operator of a function of one tensor."""
    return lambda node, x: function(x)


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Make an operator of a function of two tensors."""
    return lambda node, x, y: function(*together(x, y))


def variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Make an operator that joins any number of tensors, two by two."""
    return lambda node, *inputs: functools.reduce(function, together(*inputs))


def divide(x: Tensor, y: Tensor) -> Tensor:
    """Divide; integers towards zero, as ONNX has it."""
    if x.is_floating_point():
        return x / y
    return torch.div(x, y, rounding_mode="trunc")


def power(x: Tensor, y: Tensor) -> Tensor:
    """Raise to a power; the result has the type of the base."""
    return torch.pow(x, y).to(x.dtype)


def mod(node: Node, x: Tensor, y: Tensor) -> Tensor:
    """ONNX Mod: the sign of the divisor, with `fmod` that of the dividend."""
    x, y = together(x, y)
    return torch.fmod(x, y) if node.get("fmod", 0) else torch.remainder(x, y)


def mean(node: Node, *inputs: Tensor) -> Tensor:
    """ONNX Mean: of several tensors."""
    total: Tensor = functools.reduce(torch.add, together(*inputs))
    return total / len(inputs)


def where(node: Node, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """ONNX Where."""
    condition, x, y = together(condition, x, y)
    return torch.where(condition, x, y)
