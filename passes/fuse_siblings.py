"""Fuse-siblings: make 1×1 convolutions of one tensor one convolution and a Split.

Before → after, for 1×1 convolutions with weights W₁ … W_n and biases b₁ … b_n::

    x → Conv 1×1 (W₁, b₁) → y₁
    …                               ⇒   x → Conv 1×1 ([W₁; …; W_n], [b₁; …; b_n]) → Split → y₁ … y_n
    x → Conv 1×1 (W_n, b_n) → y_n

Maths: the output channels of a convolution do not know of each other, so weights and biases are
put one behind the other along them, bit for bit; 0 is the bias of a sibling without one.

Conditions: two or more Convs of group 1 with a kernel of 1 that read one tensor with the same
strides and pads; weights and biases are constant and of floating point. Dilations say nothing
about a kernel of one tap and are left out, and so is auto_pad, which adds no padding there, but
makes onnxruntime crop if it is SAME_* and a stride is large (those above 2 are left alone). The
Split writes the very tensors the siblings wrote, so it does not matter who reads them.

Fewer and wider convolutions are not faster everywhere: let it be measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.constants import Array
from pwopt.editing import Edit
from pwopt.graph import Names, constant, known_constant, optional_input
from pwopt.model import Model
from pwopt.operators import (
    auto_pad,
    contradicts_itself,
    float_weight,
    is_pointwise,
    is_same,
    shifts_by_size,
)
from pwopt.rewriting import Context, Event, Pass


@dataclass(frozen=True, kw_only=True)
class FuseSiblings(Pass):
    """Make 1×1 Convs that read one tensor one Conv and a Split."""

    name: ClassVar[str] = "fuse-siblings"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Fuse tensor by tensor, in the order of the graph."""
        fusing = _Fusing(model)
        for readers in _pointwise_readers(model.graph):
            alike: dict[tuple[Any, ...], list[gs.Node]] = {}
            for conv in readers:
                reason = _obstacle(conv)
                if reason:
                    yield Event("skipped", conv.outputs[0].name, reason)
                else:
                    alike.setdefault(_geometry(conv), []).append(conv)
            for siblings in alike.values():
                where = siblings[0].outputs[0].name
                if len(siblings) == 1:
                    yield Event("skipped", where, "no sibling has the same strides and pads")
                    continue
                edit = Edit(model.graph, old=siblings, new=fusing.fused(siblings))
                reason = f"{len(siblings)} siblings fused into one Conv"
                yield context.settle(model, edit, where, reason, {"siblings": len(siblings)})


def _pointwise_readers(graph: gs.Graph) -> list[list[gs.Node]]:
    """List, for every tensor that several 1×1 Convs convolve, these Convs."""
    readers: dict[int, list[gs.Node]] = {}
    for node in graph.nodes:
        if is_pointwise(node):
            readers.setdefault(id(node.inputs[0]), []).append(node)
    return [convs for convs in readers.values() if len(convs) > 1]


def _obstacle(conv: gs.Node) -> str | None:
    """Say why `conv` cannot be fused with any sibling; None if it can."""
    if conv.attrs.get("group", 1) != 1:
        return f"the Conv has {conv.attrs['group']} groups"
    weight = float_weight(conv)
    if isinstance(weight, str):
        return weight
    if contradicts_itself(conv):
        return "the Conv has both auto_pad and pads"
    if is_same(conv) and any(shifts_by_size(1, stride) for stride in conv.attrs.get("strides", ())):
        return f"auto_pad={auto_pad(conv)} with such strides crops"
    bias = optional_input(conv, 2)
    if bias is not None and constant(bias) is None:
        return "the Conv's bias is not a constant"
    return None


def _geometry(conv: gs.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return strides and pads."""
    axes = len(known_constant(conv.inputs[1]).shape) - 2
    strides = conv.attrs.get("strides", [1] * axes)
    pads = conv.attrs.get("pads", [0] * 2 * axes)
    return tuple(strides), tuple(pads)


class _Fusing:
    """Makes the nodes that replace siblings; weights that were shared stay shared."""

    def __init__(self, model: Model) -> None:
        self._opset = model.graph.opset
        self._names = Names(model)
        self._made: dict[tuple[str | int, ...], gs.Constant] = {}

    def fused(self, siblings: Sequence[gs.Node]) -> list[gs.Node]:
        """Return the Conv and the Split, wired, with names from the first sibling's output."""
        where = siblings[0].outputs[0].name
        weights = [conv.inputs[1] for conv in siblings]
        first = known_constant(weights[0])
        strides, pads = _geometry(siblings[0])
        attrs = {"kernel_shape": [1] * len(strides), "strides": list(strides), "pads": list(pads)}
        channels = [int(known_constant(weight).shape[0]) for weight in weights]
        read = [siblings[0].inputs[0], self._joined(weights, f"{where}.siblings.weight", first)]
        biases = [optional_input(conv, 2) for conv in siblings]
        if any(bias is not None for bias in biases):
            parts = [n if b is None else b for b, n in zip(biases, channels, strict=True)]
            read.append(self._joined(parts, f"{where}.siblings.bias", first))
        inner = gs.Variable(self._names.tensor(f"{where}.siblings"), first.dtype)
        name = self._names.node(f"{siblings[0].name or where}.siblings")
        conv = gs.Node("Conv", name, attrs, read, [inner])
        return [conv, self._split(inner, channels, [conv.outputs[0] for conv in siblings])]

    def _joined(
        self, parts: Sequence[gs.Tensor | int], name: str, like: gs.Constant
    ) -> gs.Constant:
        """Put constants one behind the other; a number stands for so many zeros."""
        key = tuple(part if isinstance(part, int) else part.name for part in parts)
        if key not in self._made:
            values = [_values(part, like.dtype) for part in parts]
            self._made[key] = gs.Constant(self._names.tensor(name), np.concatenate(values))
        return self._made[key]

    def _split(
        self, tensor: gs.Tensor, channels: Sequence[int], outputs: Sequence[gs.Tensor]
    ) -> gs.Node:
        """Split along the channels; their numbers are an input from opset 13 on."""
        where = outputs[0].name
        name = self._names.node(f"{where}.split")
        if self._opset < 13:
            attrs = {"axis": 1, "split": list(channels)}
            return gs.Node("Split", name, attrs, [tensor], list(outputs))
        sizes = gs.Constant(self._names.tensor(f"{where}.split"), np.array(channels, np.int64))
        return gs.Node("Split", name, {"axis": 1}, [tensor, sizes], list(outputs))


def _values(part: gs.Tensor | int, dtype: Any) -> Array:
    value = None if isinstance(part, int) else constant(part)
    return np.zeros(part, dtype) if value is None else np.asarray(value.values)
