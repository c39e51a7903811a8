"""ONNX operators in torch: one function each, by the name of the operator.

A function gets its `Node` and its inputs, None where one is left out, and returns its output, or
several as a tuple. Operators follow the ONNX specification from opset 6 on; where that is not
clear, onnxruntime.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor

from pwopt.learn.operators import (
    activation,
    convolution,
    elementwise,
    linear,
    normalization,
    pooling,
    reduction,
    resizing,
    shaping,
    windows,
)
from pwopt.learn.operators.elementwise import binary, unary, variadic
from pwopt.learn.operators.node import Node
from pwopt.learn.operators.reduction import reduce

__all__ = ["LIMITS", "OLDEST", "OPERATORS", "Node"]

OLDEST = 6
"""The oldest opset that is known."""

OPERATORS: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "Conv": convolution.conv,
    "ConvTranspose": convolution.conv_transpose,
    # Pools
    "AveragePool": pooling.average_pool,
    "GlobalAveragePool": pooling.global_average_pool,
    "GlobalMaxPool": pooling.global_max_pool,
    "LpPool": pooling.lp_pool,
    "MaxPool": pooling.max_pool,
    # Products
    "Einsum": linear.einsum,
    "Gemm": linear.gemm,
    "MatMul": linear.matmul,
    # Arithmetic
    "Abs": unary(torch.abs),
    "Add": binary(torch.add),
    "Ceil": unary(torch.ceil),
    "Cos": unary(torch.cos),
    "Div": binary(elementwise.divide),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Floor": unary(torch.floor),
    "Log": unary(torch.log),
    "Max": variadic(torch.maximum),
    "Mean": elementwise.mean,
    "Min": variadic(torch.minimum),
    "Mod": elementwise.mod,
    "Mul": binary(torch.mul),
    "Neg": unary(torch.neg),
    "Pow": binary(elementwise.power),
    "Reciprocal": unary(torch.reciprocal),
    "Round": unary(torch.round),
    "Sign": unary(torch.sign),
    "Sin": unary(torch.sin),
    "Sqrt": unary(torch.sqrt),
    "Sub": binary(torch.sub),
    "Sum": variadic(torch.add),
    # Comparisons and logic
    "And": binary(torch.logical_and),
    "Equal": binary(torch.eq),
    "Greater": binary(torch.gt),
    "GreaterOrEqual": binary(torch.ge),
    "Less": binary(torch.lt),
    "LessOrEqual": binary(torch.le),
    "Not": unary(torch.logical_not),
    "Or": binary(torch.logical_or),
    "Where": elementwise.where,
    "Xor": binary(torch.logical_xor),
    # Activations
    "Celu": activation.celu,
    "Clip": activation.clip,
    "Elu": activation.elu,
    "Gelu": activation.gelu,
    "HardSigmoid": activation.hard_sigmoid,
    "HardSwish": unary(F.hardswish),
    "LeakyRelu": activation.leaky_relu,
    "LogSoftmax": activation.log_softmax,
    "Mish": unary(F.mish),
    "PRelu": activation.prelu,
    "Relu": unary(torch.relu),
    "Selu": activation.selu,
    "Shrink": activation.shrink,
    "Sigmoid": unary(torch.sigmoid),
    "Softmax": activation.softmax,
    "Softplus": unary(F.softplus),
    "Softsign": unary(F.softsign),
    "Swish": activation.swish,
    "Tanh": unary(torch.tanh),
    "ThresholdedRelu": activation.thresholded_relu,
    # Normalisations
    "BatchNormalization": normalization.batch_normalization,
    "Dropout": normalization.dropout,
    "GroupNormalization": normalization.group_normalization,
    "InstanceNormalization": normalization.instance_normalization,
    "LRN": normalization.lrn,
    "LayerNormalization": normalization.layer_normalization,
    # Shapes and places
    "Cast": shaping.cast,
    "Concat": shaping.concat,
    "Constant": shaping.constant,
    "ConstantOfShape": shaping.constant_of_shape,
    "DepthToSpace": shaping.depth_to_space,
    "Expand": shaping.expand,
    "Flatten": shaping.flatten,
    "Gather": shaping.gather,
    "GatherElements": shaping.gather_elements,
    "Identity": shaping.identity,
    "Pad": shaping.pad,
    "Range": shaping.range_,
    "Reshape": shaping.reshape,
    "Resize": resizing.resize,
    "Shape": shaping.shape,
    "Size": shaping.size,
    "Slice": shaping.slice_,
    "SpaceToDepth": shaping.space_to_depth,
    "Split": shaping.split,
    "Squeeze": shaping.squeeze,
    "Tile": shaping.tile,
    "Transpose": shaping.transpose,
    "Trilu": shaping.trilu,
    "Unsqueeze": shaping.unsqueeze,
    "Upsample": resizing.upsample,
    # Reductions
    "ArgMax": reduction.arg_max,
    "ArgMin": reduction.arg_min,
    "CumSum": reduction.cumulative_sum,
    "ReduceL1": reduce(lambda x, axes, keep: reduction.total(x.abs(), axes, keep)),
    "ReduceL2": reduce(lambda x, axes, keep: reduction.total(x * x, axes, keep).sqrt()),
    "ReduceLogSum": reduce(lambda x, axes, keep: reduction.total(x, axes, keep).log()),
    "ReduceLogSumExp": reduce(torch.logsumexp),
    "ReduceMax": reduce(torch.amax),
    "ReduceMean": reduce(torch.mean),
    "ReduceMin": reduce(torch.amin),
    "ReduceProd": reduce(reduction.product),
    "ReduceSum": reduce(reduction.total),
    "ReduceSumSquare": reduce(lambda x, axes, keep: reduction.total(x * x, axes, keep)),
    "TopK": reduction.top_k,
}


def _one_output(node: Node) -> str | None:
    return None if node.outputs == 1 else "with a second output"


def _max_pool(node: Node) -> str | None:
    return _one_output(node) or windows.limits(node)


LIMITS: Mapping[str, Callable[[Node], str | None]] = {
    "AveragePool": windows.limits,
    "BatchNormalization": _one_output,
    "Cast": shaping.cast_limits,
    "Constant": shaping.constant_limits,
    "Conv": windows.limits,
    "ConvTranspose": windows.limits,
    "LpPool": windows.limits,
    "MaxPool": _max_pool,
    "Resize": resizing.limits,
    "Upsample": resizing.limits,
}
"""Operators of which not everything is known: what a node asks for and is missing, if anything."""
