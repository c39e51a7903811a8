"""What a layer costs: multiply-accumulates, parameters, bytes, predicted time. Pure functions.

One MAC is one multiply-accumulate of Conv, ConvTranspose, Gemm or MatMul.
Bias, pooling and activations count nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import numpy as np

Shape = Sequence[int | None]
Sides = Literal["input", "output", "both"]

COUNTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

KERNEL_BLOCK = 16
"""Channels that onnxruntime's blocked convolution computes at once: rank 20 costs as much as 32."""

MACS_PER_ELEMENT_MOVED = 24
"""Reading or writing one element takes as long as this many MACs (fitted on one CPU thread)."""

_PACKED_BITS = {
    "int4": 4,
    "uint4": 4,
    "float4_e2m1fn": 4,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
    "int2": 2,
    "uint2": 2,
}


def node_macs(
    op: str, attributes: Mapping[str, object], inputs: Sequence[Shape | None], output: Shape | None
) -> int | None:
    """Count the MACs of one node, or None where a shape it takes is unknown.

    Args:
        op: One of `COUNTED_OPS`.
        attributes: The node's attributes; only `transA` of Gemm is read.
        inputs: Shapes of the node's inputs, the weight of a convolution second:
            (Cout, Cin/group, *kernel) for Conv, (Cin, Cout/group, *kernel) for ConvTranspose.
        output: Shape of the node's output.
    """
    first, second = inputs[:2]
    if op == "Conv":  # every output element sums over its group's inputs under the kernel
        return _product(output, second and second[1:])
    if op == "ConvTranspose":  # every input element is spread over its group's outputs
        return _product(first, second and second[1:])
    if op == "Gemm":
        return _product(output, first and first[:1] if attributes.get("transA") else _last(first))
    if op == "MatMul":
        return _product(output, _last(first))
    raise ValueError(f"MACs are not defined for {op}")


def positions(shape: Shape | None) -> int | None:
    """Count batch × spatial elements of a map (N, C, *spatial); None where one is unknown."""
    return _product(shape and shape[:1], shape and shape[2:])


def is_parameter(dtype: np.dtype) -> bool:
    """Tell whether constants of this type count as parameters.

    Floating point of any width and quantized weights (8 bits and fewer) do; wider integers are
    shapes and indices, booleans and strings are no weights.
    """
    if dtype.kind == "V":  # the ml_dtypes: bfloat16, float8, int4, ...
        return True
    return dtype.kind in "fc" or (dtype.kind in "iu" and dtype.itemsize == 1)


def tensor_bytes(elements: int, dtype: np.dtype) -> int:
    """Count the bytes of `elements` of this type in a file; types below 8 bits are packed."""
    return -(-elements * _PACKED_BITS.get(dtype.name, 8 * dtype.itemsize) // 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvSize:
    """All of a convolution that its cost depends on. Positions are batch × spatial elements."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    groups: int = 1
    bias: bool = False
    input_positions: int
    output_positions: int

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.in_channels // self.groups * self.out_channels * prod(self.kernel)

    @property
    def params(self) -> int:
        """Elements of weight and bias."""
        return self.weights + self.bias * self.out_channels

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.weights * self.output_positions

    @property
    def time(self) -> int:
        """Predicted time in onnxruntime on one CPU thread, in units of one MAC; groups are 1.

        The blocked kernel computes whole blocks of channels; to that comes the memory traffic of
        activations and weights. Reproduces measured speed-ups of splits within 20 %.
        """
        computed = (
            _blocked(self.in_channels)
            * _blocked(self.out_channels)
            * prod(self.kernel)
            * self.output_positions
        )
        moved = (
            self.in_channels * self.input_positions
            + self.out_channels * self.output_positions
            + self.weights
        )
        return computed + MACS_PER_ELEMENT_MOVED * moved


@dataclass(frozen=True)
class Split:
    """What replaces a convolution when it is split at a rank r.

    input: 1×1 (Cin→r), k×k (r→Cout). output: k×k (Cin→r), 1×1 (r→Cout). both: 1×1, k×k, 1×1.
    The k×k keeps the stride, so a 1×1 before it runs on the full-resolution input. The bias goes
    to the last one.
    """

    conv: ConvSize
    sides: Sides
    rank: int

    @cached_property
    def parts(self) -> tuple[ConvSize, ...]:
        """The convolutions, in the order they run."""
        conv, rank = self.conv, self.rank
        pointwise = (1,) * len(conv.kernel)
        reduces, expands = self.sides != "output", self.sides != "input"
        core = replace(
            conv,
            in_channels=rank if reduces else conv.in_channels,
            out_channels=rank if expands else conv.out_channels,
            bias=conv.bias and not expands,
        )
        reduce = replace(
            conv,
            out_channels=rank,
            kernel=pointwise,
            bias=False,
            output_positions=conv.input_positions,
        )
        expand = replace(
            conv, in_channels=rank, kernel=pointwise, input_positions=conv.output_positions
        )
        return (reduce,) * reduces + (core,) + (expand,) * expands

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all parts."""
        return sum(part.macs for part in self.parts)

    @property
    def params(self) -> int:
        """Elements of the weights and biases of all parts."""
        return sum(part.params for part in self.parts)

    @cached_property
    def speedup(self) -> float:
        """How many times faster it is than the convolution it replaces, after `ConvSize.time`."""
        return self.conv.time / sum(part.time for part in self.parts)


def _blocked(channels: int) -> int:
    return -(-channels // KERNEL_BLOCK) * KERNEL_BLOCK


def _last(shape: Shape | None) -> Shape | None:
    return shape and shape[-1:]


def _product(*shapes: Shape | None) -> int | None:
    product = 1
    for shape in shapes:
        if shape is None:
            return None
        for size in shape:
            if size is None:
                return None
            product *= size
    return product
