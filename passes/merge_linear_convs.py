"""Merge-linear-convs: make one layer of two that follow each other with nothing non-linear between.

Before → after::

    x → Conv 1×1 → Conv 1×1 → y              ⇒      x → Conv 1×1 → y
    x → Conv k×k → Conv 1×1 → y              ⇒      x → Conv k×k → y
    x → Conv 1×1 → Conv k×k → y              ⇒      x → Conv k×k → y
    x → Conv 1×k → Conv k×1 → y              ⇒      x → Conv k×k → y
    x → Gemm | MatMul → Gemm | MatMul → y    ⇒      x → Gemm | MatMul → y

Maths, for a convolution (W, b) with stride s, dilation d and pads p behind one (V, a) with stride
s', dilation d', pads p'. Along each axis one of the kernels has a single tap, so every tap of the
merged kernel is a product W_j·V_i, and the bias is b + Σ_j W_j·a. The merged stride is s·s'.

- W has one tap and no pads: output o reads x at o·s·s' + i·d' − p', so d' and p' stay. The number
  of outputs is the same, since ⌊⌊n/s'⌋/s⌋ = ⌊n/(s·s')⌋.
- V has one tap: W's tap j reads x at (o·s + j·d − p)·s' − p', so the dilation is s'·d and the pads
  are s'·p + p'. Where W reads its padding, before position 0 or behind the last of V's ⌈n/s'⌉
  outputs (n = size of x with p'), the merged one reads its own, and the number of outputs is the
  same as above. V has written a bias at every position but W's padding: hence none is allowed, or
  no pads p.

Groups g and g' give a convolution of gcd(g, g') groups, zeros filled in. For matrices,
(α'xV + β'a)·αW + βb = x·(αα'VW) + (αβ'·aW + βb). Computed in float64, rounded once.

Conditions: constant floating-point weights; nobody else reads what lies between, which may pass
through Identity, and Dropout in inference mode; a bias in the first is constant, and then one in
the second too; along each axis one of the kernels has a single tap; auto_pad=SAME, on a k×k or
with a stride above 2, only if the other convolution is 1×1 with stride 1 and no pads. MACs and
parameters must both fall; a weight that others read as well is not saved.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import gcd, prod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.constants import Array
from pwopt.cost import node_macs
from pwopt.editing import Edit
from pwopt.graph import (
    Names,
    constant,
    is_only_reader,
    is_op,
    known_constant,
    leaves,
    optional_input,
    producer,
)
from pwopt.model import Model
from pwopt.operators import (
    contradicts_itself,
    float_weight,
    is_one_output,
    is_same,
    is_training,
    shifts_by_size,
)
from pwopt.rewriting import Context, Event, Pass
from pwopt.shapes import Shape, bind, infer


@dataclass(frozen=True, kw_only=True)
class MergeLinearConvs(Pass):
    """Merge linear layers that follow each other directly."""

    name: ClassVar[str] = "merge-linear-convs"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Merge pair by pair until nothing is left to merge.

        Raises:
            SpecError: the shapes in `context` do not fit the model's inputs.
            ModelError: there is a pair to merge, but the model's shapes cannot be inferred.
        """
        names = Names(model)
        shapes = cache(lambda: infer(model, bind(model, context.shapes)))
        judged: dict[tuple[int, int], tuple[_Pair, Event]] = {}  # the pair keeps its ids its own
        merging = True
        while merging:  # a merged layer may merge again
            merging = False
            skipped = []
            for node in list(model.graph.nodes):
                pair = _pair(node)
                if pair is None:
                    continue
                key = id(pair.first), id(pair.second)
                if key in judged:
                    skipped.append(judged[key][1])
                    continue
                where = node.outputs[0].name
                found = _replacement(model.graph, pair, shapes, names)
                if isinstance(found, str):
                    skipped.append(Event("skipped", where, found))
                    continue
                layer, gain = found
                edit = Edit(model.graph, pair.nodes, [layer])
                reason = f"merged with the {pair.first.op} before it"
                event = context.settle(model, edit, where, reason, gain)
                if event.kind == "rewrote":
                    merging = True
                    yield event
                else:
                    judged[key] = pair, event
                    skipped.append(event)
        yield from skipped


# -- what may be merged -----------------------------------------------------------------------


class _Pair(NamedTuple):
    """Two linear layers, and what lies between them in the order of the data."""

    first: gs.Node
    between: tuple[gs.Node, ...]
    second: gs.Node

    @property
    def nodes(self) -> tuple[gs.Node, ...]:
        return self.first, *self.between, self.second


@dataclass(frozen=True)
class _Merged:
    """What takes the place of a pair.

    `weight` and `bias` compute in float64, when called; without `bias`, the second layer's stays.
    """

    op: str
    attrs: dict[str, Any]
    shape: tuple[int, ...]
    outputs: int
    weight: Callable[[], Array]
    bias: Callable[[], Array] | None

    @property
    def params(self) -> int:
        """Elements of the new constants."""
        return prod(self.shape) + (self.outputs if self.bias else 0)


def _pair(second: gs.Node) -> _Pair | None:
    """Return the pair that ends in `second`; None if that or what it reads is no linear layer."""
    if not is_op(second, "Conv", "Gemm", "MatMul") or not second.inputs:
        return None
    between: list[gs.Node] = []
    first = producer(second.inputs[0])
    while first is not None and is_op(first, "Identity", "Dropout"):
        between.insert(0, first)
        first = producer(first.inputs[0])
    kinds = ("Conv",) if second.op == "Conv" else ("Gemm", "MatMul")
    return _Pair(first, tuple(between), second) if first and is_op(first, *kinds) else None


def _replacement(
    graph: gs.Graph, pair: _Pair, shapes: Callable[[], Mapping[str, Shape]], names: Names
) -> tuple[gs.Node, dict[str, int]] | str:
    """Make the layer that `pair` merges into and count what it saves, or say why it does not."""
    merged = _merged(graph, pair)
    if isinstance(merged, str):
        return merged
    gain = _gain(graph, pair, merged, shapes())
    if isinstance(gain, str):
        return gain
    layer = _layer(pair, merged, names)
    return layer if isinstance(layer, str) else (layer, gain)


def _merged(graph: gs.Graph, pair: _Pair) -> _Merged | str:
    """Describe what `pair` merges into, or say why it does not."""
    first, between, second = pair
    for node, reader in zip(pair.nodes, pair.nodes[1:], strict=False):
        if not is_only_reader(graph, reader, node.outputs[0]):
            return f"the {node.op}'s output is read elsewhere too"
    for node in between:
        if node.op == "Dropout" and (reason := _active(graph, node)):
            return reason
    for node, place in ((first, "first"), (second, "second")):
        weight = float_weight(node, place=place)
        if isinstance(weight, str):
            return weight
    if optional_input(first, 2) is not None:
        for node, place in ((first, "first"), (second, "second")):
            bias = optional_input(node, 2)
            if bias is not None and constant(bias) is None:
                return f"the {place} {node.op}'s bias is not a constant"
    return _merged_convs(first, second) if second.op == "Conv" else _merged_matrices(graph, pair)


def _active(graph: gs.Graph, dropout: gs.Node) -> str | None:
    """Say how a Dropout (ONNX operators, versions 1 to 22) differs from an Identity, if it does."""
    if not is_one_output(graph, dropout):
        return "Dropout's mask is read"
    return "Dropout is in training mode" if is_training(dropout, graph.opset) else None


def _float64(tensor: gs.Tensor) -> Array:
    return np.asarray(known_constant(tensor).values, np.float64)


def _shape(layer: gs.Node) -> tuple[int, ...]:
    """Return the shape of the weight."""
    return tuple(known_constant(layer.inputs[1]).shape)


# -- convolutions -----------------------------------------------------------------------------


class _Window(NamedTuple):
    """What a convolution reads along one axis; pads in front and behind."""

    kernel: int
    stride: int
    dilation: int
    pads: Sequence[int]


def _merged_convs(first: gs.Node, second: gs.Node) -> _Merged | str:
    for node in (first, second):
        if contradicts_itself(node):
            return "auto_pad and pads contradict each other"
    windows = [_windows(node) for node in (first, second)]
    if any(pad < 0 for side in windows for window in side for pad in window.pads):
        return "negative pads"
    auto_pad = ""
    for node, other in ((first, windows[1]), (second, windows[0])):
        if _goes_by_size(node):
            auto_pad = node.attrs["auto_pad"]
            if any(w.kernel > 1 or w.stride > 1 or any(w.pads) for w in other):
                return f"auto_pad={auto_pad} would pad otherwise after merging"
    composed = []
    for both in zip(*windows, strict=True):
        window = _compose(*both)
        if isinstance(window, str):
            return window
        composed.append(window)

    bias = optional_input(first, 2)
    biased = bias is not None and bool(_float64(bias).any())
    if biased and (_goes_by_size(second) or any(any(w.pads) for w in windows[1])):
        return "the first Conv's bias would leak into the second one's padding"
    groups = first.attrs.get("group", 1), second.attrs.get("group", 1)
    group = gcd(*groups)
    attrs: dict[str, Any] = {
        "dilations": [w.dilation for w in composed],
        "group": group,
        "kernel_shape": [w.kernel for w in composed],
        "strides": [w.stride for w in composed],
    }
    if auto_pad:
        attrs["auto_pad"] = auto_pad
    else:
        attrs["pads"] = [w.pads[side] for side in (0, 1) for w in composed]
    outputs = _shape(second)[0]
    inputs = _shape(first)[1] * groups[0] // group
    return _Merged(
        "Conv",
        attrs,
        (outputs, inputs, *attrs["kernel_shape"]),
        outputs,
        partial(_conv_weight, first, second, group),
        partial(_conv_bias, first, second) if biased else None,
    )


def _goes_by_size(conv: gs.Node) -> bool:
    """Tell whether auto_pad pads, or crops, by the size of the input."""
    kernel = _shape(conv)[2:]
    strides = conv.attrs.get("strides", [1] * len(kernel))
    return is_same(conv) and any(map(shifts_by_size, kernel, strides))


def _windows(conv: gs.Node) -> list[_Window]:
    """Describe a Conv axis by axis; auto_pad=SAME of a k×k is left to the caller."""
    kernel = _shape(conv)[2:]
    rank = len(kernel)
    pads = conv.attrs.get("pads", [0] * 2 * rank)
    strides, dilations = (conv.attrs.get(name, [1] * rank) for name in ("strides", "dilations"))
    return [
        _Window(taps, stride, dilation if taps > 1 else 1, sides)
        for taps, stride, dilation, *sides in zip(
            kernel, strides, dilations, pads[:rank], pads[rank:], strict=True
        )
    ]


def _compose(first: _Window, second: _Window) -> _Window | str:
    """Return the window that does what `second` behind `first` does, or why there is none."""
    stride = first.stride * second.stride
    if second.kernel == 1 and not any(second.pads):
        return _Window(first.kernel, stride, first.dilation, first.pads)
    if first.kernel > 1 and second.kernel > 1:
        return "neither kernel is 1×1"
    if first.kernel > 1:
        return "the second Conv pads what a k×k wrote"
    pads = [first.stride * pad + own for pad, own in zip(second.pads, first.pads, strict=True)]
    return _Window(second.kernel, stride, first.stride * second.dilation, pads)


def _conv_weight(first: gs.Node, second: gs.Node, group: int) -> Array:
    inner, outer = (
        _regrouped(_float64(node.inputs[1]), node.attrs.get("group", 1), group)
        for node in (first, second)
    )
    return _product(inner, outer, group)


def _conv_bias(first: gs.Node, second: gs.Node) -> Array:
    """Return what `second` makes of the bias of `first`, with its own, shape (outputs,)."""
    group = second.attrs.get("group", 1)
    outer = _float64(second.inputs[1])
    taps = outer.reshape(group, -1, outer.shape[1], prod(outer.shape[2:])).sum(axis=-1)
    shift: Array = (taps @ _float64(first.inputs[2]).reshape(group, -1, 1)).reshape(-1)
    own = optional_input(second, 2)
    return shift if own is None else shift + _float64(own)


def _product(inner: Array, outer: Array, group: int) -> Array:
    """Return the weight of the convolution `outer` behind the convolution `inner`.

    Along each axis one of the two has a single tap.

    Args:
        inner: Weight of the first, shape (channels between, Cin/group, *kernel).
        outer: Weight of the second, shape (Cout, channels between/group, *kernel).
        group: Groups of both.
    """
    (between, inputs, *before), (outputs, width, *behind) = inner.shape, outer.shape
    rows = np.moveaxis(outer.reshape(group, outputs // group, width, -1), 2, 3)
    columns = inner.reshape(group, between // group, -1)
    taps = rows.reshape(group, -1, width) @ columns
    rank = len(before)
    order = [0, 1 + rank, *(i for axis in range(rank) for i in (1 + axis, 2 + rank + axis))]
    kernel = [i * j for i, j in zip(before, behind, strict=True)]
    split: Array = taps.reshape(outputs, *behind, inputs, *before)
    return split.transpose(order).reshape(outputs, inputs, *kernel)


def _regrouped(weight: Array, groups: int, fewer: int) -> Array:
    """Write the weight of a grouped convolution for `fewer` groups, a divisor of `groups`."""
    outputs, inputs, *kernel = weight.shape
    joined = groups // fewer
    blocks = weight.reshape(fewer, joined, outputs // groups, inputs, *kernel)
    result = np.zeros((fewer, joined, outputs // groups, joined, inputs, *kernel))
    for i in range(joined):
        result[:, i, :, i] = blocks[:, i]
    return result.reshape(outputs, joined * inputs, *kernel)


# -- matrices ---------------------------------------------------------------------------------


def _merged_matrices(graph: gs.Graph, pair: _Pair) -> _Merged | str:
    first, second = pair.first, pair.second
    for node in (first, second):
        if node.op == "Gemm" and graph.opset < 7:
            return "before opset 7, a Gemm's bias is broadcast by other rules"
        if len(_shape(node)) != 2:
            return f"the {node.op}'s right operand is not a matrix"
    if second.attrs.get("transA", 0):
        return "the second Gemm transposes what it reads"
    inputs, outputs = _matrix_shape(first)[0], _matrix_shape(second)[1]
    biased = optional_input(first, 2) is not None
    if biased:
        for node in (first, second):
            bias = optional_input(node, 2)
            if bias is not None and prod(_float64(bias).shape[:-1]) != 1:
                return f"the {node.op}'s bias differs from row to row"
    op = "MatMul" if first.op == second.op == "MatMul" else "Gemm"
    attrs = {}
    if first.attrs.get("transA", 0):
        attrs["transA"] = 1
    if not biased and "beta" in second.attrs:
        attrs["beta"] = second.attrs["beta"]
    weight = partial(_matrix_weight, first, second)
    bias = partial(_matrix_bias, first, second) if biased else None
    return _Merged(op, attrs, (inputs, outputs), outputs, weight, bias)


def _matrix_shape(node: gs.Node) -> tuple[int, ...]:
    """Return (inputs, outputs)."""
    shape = _shape(node)
    return shape[::-1] if node.attrs.get("transB", 0) else shape


def _matrix_weight(first: gs.Node, second: gs.Node) -> Array:
    return _matrix(first) @ _matrix(second)


def _matrix_bias(first: gs.Node, second: gs.Node) -> Array:
    return _row(first) @ _matrix(second) + _row(second)


def _matrix(node: gs.Node) -> Array:
    """Return what the layer multiplies by from the right, shape (inputs, outputs)."""
    weight: Array = _float64(node.inputs[1]) * node.attrs.get("alpha", 1.0)
    return weight.T if node.attrs.get("transB", 0) else weight


def _row(node: gs.Node) -> Array:
    """Return what the layer adds to every row, shape (outputs,)."""
    bias = optional_input(node, 2)
    if bias is None:
        return np.zeros(_matrix_shape(node)[1])
    row = (_float64(bias) * node.attrs.get("beta", 1.0)).reshape(-1)
    return np.broadcast_to(row, _matrix_shape(node)[1])


# -- what it saves, and the new layer ---------------------------------------------------------


def _gain(
    graph: gs.Graph, pair: _Pair, merged: _Merged, known: Mapping[str, Shape]
) -> dict[str, int] | str:
    """Count what merging saves, or say why it saves nothing."""
    first, second = pair.first, pair.second
    macs = [
        node_macs(op, attrs, [known.get(read.name), weight], known.get(written.name))
        for op, attrs, read, weight, written in (
            (first.op, first.attrs, first.inputs[0], _shape(first), first.outputs[0]),
            (second.op, second.attrs, second.inputs[0], _shape(second), second.outputs[0]),
            (merged.op, merged.attrs, first.inputs[0], merged.shape, second.outputs[0]),
        )
    ]
    one, two, both = macs
    if one is None or two is None or both is None:
        return "its MACs are not known; give the input's shape with --shape"
    if both >= one + two:
        return f"merged it would take {both} MACs instead of {one + two}"
    constants = [*first.inputs[1:3], second.inputs[1], *second.inputs[2 : 3 if merged.bias else 2]]
    freed = _freed(graph, constants, (first, second))
    if merged.params >= freed:
        return f"merged it would take {merged.params} new parameters and free only {freed}"
    return {"saved_macs": one + two - both, "saved_params": freed - merged.params}


def _freed(graph: gs.Graph, tensors: Sequence[gs.Tensor], nodes: Sequence[gs.Node]) -> int:
    """Count the elements of those constants that only `nodes` read."""
    freed = 0
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        value = constant(tensor)
        if value is not None and not leaves(graph, tensor, nodes):
            freed += prod(value.shape)
    return freed


@np.errstate(over="ignore", invalid="ignore")  # looked for at the end
def _layer(pair: _Pair, merged: _Merged, names: Names) -> gs.Node | str:
    """Make the merged layer, which writes what the second one writes and takes its name."""
    second = pair.second
    output = second.outputs[0]
    dtype = np.dtype(known_constant(second.inputs[1]).dtype)
    weight = merged.weight().astype(dtype)
    bias = merged.bias().astype(dtype) if merged.bias else None
    if not (np.isfinite(weight).all() and (bias is None or np.isfinite(bias).all())):
        return f"the merged weight would not be finite in {dtype.name}"
    inputs = [pair.first.inputs[0], gs.Constant(names.tensor(f"{output.name}.weight"), weight)]
    if bias is not None:
        inputs.append(gs.Constant(names.tensor(f"{output.name}.bias"), bias))
    elif (own := optional_input(second, 2)) is not None:
        inputs.append(own)
    return gs.Node(merged.op, second.name, merged.attrs, inputs, [output], second.domain)
