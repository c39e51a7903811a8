"""Conv-to-gemm: write convolutions that are matrix products as such.

Before → after, for a map x of shape [N, C, H, W] and a kernel that reads all of it at once::

    x → Conv(W, b) → Flatten → y       ⇒    x → Flatten → Gemm(W', b) → y
    x → Conv → Relu → Conv → y         ⇒    x → Flatten → Gemm → Relu → Gemm → Unsqueeze → y
    f → Reshape → Conv → Flatten → y   ⇒    f → Gemm → y

and, with `general`, for any other 1×1 convolution::

    x → Conv 1×1 (W, b) → y            ⇒    x → Reshape → MatMul(W', ·) → Add b → Reshape → y

Maths: where the output is one pixel, y[n,k] = Σ W[k,c,i,j]·x[n,c,i,j] + b[k], which is Gemm with
transB = 1 on the flattened x; both sides are row-major, so W' of shape [K, C·H·W] is W reshaped,
bit for bit. A 1×1 convolution is the product W'·x over [N, C, H·W], with W' of shape [K, C].

Conditions: Conv of group 1 in 1-D, 2-D or 3-D with a constant floating-point weight, from opset 7
on. The model itself fixes the size of the map, and the only window on it covers it pixel by pixel;
taps that lie on padding are cut off the weight. Elementwise operators in between are carried
along. A Flatten, Reshape or Squeeze to [N, K] behind goes, and so does a Reshape or Unsqueeze of
[N, C·H·W] in front that nobody else reads; who else reads a map behind gets it from an
Unsqueeze. With `general`: no stride, no padding, and a constant bias; the size of the map may be
open.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from pwopt import shapes
from pwopt.editing import Edit
from pwopt.graph import (
    Names,
    constant,
    is_op,
    known_constant,
    leaves,
    like,
    optional_input,
    producer,
)
from pwopt.model import Model
from pwopt.operators import BINARY, BROADCASTING, UNARY, auto_pad, float_weight, is_same
from pwopt.rewriting import Context, Event, Pass
from pwopt.shapes import Binding, Shape

from ._reshaping import Reshaping

Taps = tuple[slice, ...]
"""The part of a kernel that lies on the input, one slice per spatial axis."""


@dataclass(frozen=True, kw_only=True)
class ConvToGemm(Pass):
    """Turn convolutions that see their whole input into Gemms.

    Options:
        general: turn other 1×1 convolutions into MatMuls too, which rarely pays
    """

    name: ClassVar[str] = "conv-to-gemm"
    exact: ClassVar[bool] = True

    general: bool = False

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Rewrite what touches as one site; then, one by one, 1×1 convolutions on larger maps."""
        graph = model.graph
        # Open axes stay open: `context.shapes` holds for some inputs, a rewrite for all.
        known = shapes.infer(model, Binding({}, {}))
        writer = _Writer(model, known)
        covering: dict[int, Taps] = {}
        pointwise = []
        for node in [node for node in graph.nodes if is_op(node, "Conv")]:
            taps = _taps(graph, node, known)
            if isinstance(taps, str):
                yield Event("skipped", node.outputs[0].name, taps)
            elif taps:
                covering[id(node)] = taps
            elif self.general and set(_kernel(node, known)) == {1}:
                pointwise.append(node)
        for region in _regions(graph, covering, known):
            where = region[0].outputs[0].name  # a convolution, what is carried comes behind
            count = sum(id(node) in covering for node in region)
            became = "became a Gemm" if count == 1 else f"became {count} Gemms"
            edit = writer.flattened(region, covering)
            yield context.settle(model, edit, where, became, {"convs": count})
        for node in pointwise:
            where = node.outputs[0].name
            reason = _why_no_product(graph, node) or _why_no_matmul(node)
            if reason:
                yield Event("skipped", where, reason)
                continue
            yield context.settle(model, writer.multiplied(node), where, "became a MatMul")


# -- which convolutions -----------------------------------------------------------------------


def _taps(graph: gs.Graph, node: gs.Node, known: dict[str, Shape]) -> Taps | str | None:
    """Find the taps of a convolution that reads its input at once; why not; None if none does."""
    kernel = _kernel(node, known)
    size = known.get(node.inputs[0].name, ())[2:]
    pixels = known.get(node.outputs[0].name, ())[2:]
    if not kernel or not len(kernel) == len(size) == len(pixels):
        return None
    if set(pixels) != {1}:
        return "its padding makes the output larger than a pixel" if kernel == size else None
    reason = _why_no_product(graph, node)
    if reason:
        return reason
    taps = []
    for axis, (side, length) in enumerate(zip(size, kernel, strict=True)):
        if not side or not length:
            return None
        step = _attribute(node, "dilations", axis, 1)
        begin = _begin(node, axis, (length - 1) * step + 1 - side)
        hits = [tap for tap in range(length) if 0 <= tap * step - begin < side]
        if len(hits) < side:
            return "its kernel does not read every pixel of the input"
        taps.append(slice(hits[0], hits[-1] + 1))
    return tuple(taps)


def _kernel(node: gs.Node, known: dict[str, Shape]) -> Shape:
    return known.get(node.inputs[1].name, ())[2:]


def _attribute(node: gs.Node, name: str, axis: int, default: int) -> int:
    values = node.attrs.get(name)
    return int(values[axis]) if values else default


def _begin(node: gs.Node, axis: int, excess: int) -> int:
    """Return the padding in front, where the one window is `excess` longer than the input."""
    if is_same(node):
        return (max(excess, 0) + int(auto_pad(node) == "SAME_LOWER")) // 2
    return 0 if auto_pad(node) == "VALID" else _attribute(node, "pads", axis, 0)


def _why_no_product(graph: gs.Graph, node: gs.Node) -> str | None:
    """Say why a convolution is no product with a constant weight, wherever its windows lie."""
    if graph.opset < 7:
        return "before opset 7, operands are broadcast by other rules"
    if node.attrs.get("group", 1) != 1:
        return f"it has {node.attrs['group']} groups"
    weight = float_weight(node)
    return weight if isinstance(weight, str) else None


def _why_no_matmul(node: gs.Node) -> str | None:
    """Say why a 1×1 convolution of group 1 is no product at every position of its input."""
    if max(node.attrs.get("strides", (1,))) > 1:
        return "its stride leaves pixels out"
    if auto_pad(node) == "NOTSET" and any(node.attrs.get("pads", ())):
        return "it is padded"
    bias = optional_input(node, 2)
    if bias is not None and constant(bias) is None:
        return "the Conv's bias is not a constant"
    return None


# -- what is rewritten together ---------------------------------------------------------------


def _regions(
    graph: gs.Graph, covering: dict[int, Taps], known: dict[str, Shape]
) -> list[list[gs.Node]]:
    """Group the convolutions in `covering` that touch, with the operators to be carried along.

    Those are what leads to another of the convolutions or to a flattening, so that no map comes
    back only to be flattened again.
    """
    ranks: dict[int, int] = {}  # of the maps of one pixel, by tensor
    members = []
    for node in graph.nodes:
        if id(node) in covering:
            rank = len(covering[id(node)]) + 2
        elif _is_elementwise(graph, node, ranks):
            rank = max(ranks.get(id(tensor), 0) for tensor in node.inputs)
        else:
            continue
        members.append(node)
        ranks[id(node.outputs[0])] = rank

    wanted = set(covering)
    for node in reversed(members):
        output = node.outputs[0]
        if any(id(r) in wanted for r in output.outputs) or _flattenings(output, known):
            wanted.add(id(node))

    regions: list[tuple[set[int], list[gs.Node]]] = []
    for node in [node for node in members if id(node) in wanted]:
        tensors = {id(t) for t in (*node.inputs, *node.outputs) if id(t) in ranks}
        if id(node) in covering:
            tensors.add(id(node.inputs[0]))  # siblings share the Flatten of what they read
        touching = [region for region in regions if region[0] & tensors]
        regions = [region for region in regions if not region[0] & tensors]
        joined = [other for _, nodes in touching for other in nodes]
        regions.append((tensors.union(*(t for t, _ in touching)), [*joined, node]))
    order = {id(node): place for place, node in enumerate(graph.nodes)}
    return [sorted(nodes, key=lambda node: order[id(node)]) for _, nodes in regions]


def _is_elementwise(graph: gs.Graph, node: gs.Node, ranks: dict[int, int]) -> bool:
    """Tell whether `node` does the same to maps of one pixel as to their flat twins."""
    if any(tensor.name for tensor in node.outputs[1:]):  # Dropout's mask is a map, too
        return False
    if is_op(node, "BatchNormalization"):  # takes matrices from opset 9 on
        return bool(graph.opset >= 9) and id(node.inputs[0]) in ranks
    if is_op(node, *UNARY, "Dropout"):
        return id(node.inputs[0]) in ranks
    if not is_op(node, *(BROADCASTING if graph.opset >= 8 else BINARY)):
        return False
    maps = {ranks[id(tensor)] for tensor in node.inputs if id(tensor) in ranks}
    others = [tensor for tensor in node.inputs if id(tensor) not in ranks]
    return len(maps) == 1 and all(_is_per_channel(tensor, max(maps)) for tensor in others)


def _is_per_channel(tensor: gs.Tensor, rank: int) -> bool:
    """Tell whether `tensor` is a constant that, beside a map of `rank` axes, varies along axis 1.

    Shapes align from the right (ONNX Broadcasting).
    """
    value = constant(tensor)
    if value is None or len(value.shape) > rank:
        return False
    aligned = (*[1] * (rank - len(value.shape)), *value.shape)
    return bool(prod(aligned) == aligned[1])


def _flattenings(tensor: gs.Tensor, known: dict[str, Shape]) -> list[gs.Node]:
    """List the nodes that make [N, K] of `tensor`, a map of shape [N, K, 1, …].

    All three operators keep the elements and their order, so that K columns leave N rows. Nodes in
    subgraphs are not among them, for `known` has nothing of what those write.
    """
    return [
        node
        for node in tensor.outputs
        if is_op(node, "Flatten", "Reshape", "Squeeze")
        # Without axes, Squeeze takes a batch of one away too, whatever was declared.
        and not (node.op == "Squeeze" and len(node.inputs) == 1 and "axes" not in node.attrs)
        and _is_matrix(node.outputs[0], _features(tensor, known), known)
    ]


def _features(tensor: gs.Tensor, known: dict[str, Shape]) -> int | None:
    """Return the elements of `tensor` behind the batch axis, if they are known."""
    sizes = [size for size in known.get(tensor.name, (None, None))[1:] if size is not None]
    return prod(sizes) if len(sizes) + 1 == len(known.get(tensor.name, ())) else None


def _is_matrix(tensor: gs.Tensor, columns: int | None, known: dict[str, Shape]) -> bool:
    shape = known.get(tensor.name, ())
    return columns is not None and len(shape) == 2 and shape[1] == columns


def _view_of_rows(tensor: gs.Tensor, known: dict[str, Shape]) -> gs.Node | None:
    """Return the node that makes the map `tensor` of its rows, [N, C·H·W]."""
    view = producer(tensor)
    if view is None or not is_op(view, "Reshape", "Unsqueeze"):
        return None
    return view if _is_matrix(view.inputs[0], _features(tensor, known), known) else None


# -- how it is rewritten ----------------------------------------------------------------------


class _Writer:
    """Makes the new nodes and their constants; what was shared stays shared."""

    def __init__(self, model: Model, known: dict[str, Shape]) -> None:
        self._graph = model.graph
        self._known = known
        self._names = Names(model)
        self._reshaping = Reshaping(self._graph, self._names)
        self._lists: dict[tuple[int, ...], gs.Constant] = {}

    def flattened(self, region: Sequence[gs.Node], covering: dict[int, Taps]) -> Edit:
        """Put matrices in the place of the maps of a region, and maps where others read them."""
        rank = 2 + max(len(covering.get(id(node), ())) for node in region)  # the same everywhere
        flat: dict[int, gs.Tensor] = {}
        old, new = list(region), []
        for node in region:
            x, output = node.inputs[0], node.outputs[0]
            views = _flattenings(output, self._known)
            old += views
            y = views[0].outputs[0] if views else self._inner(output, "flat")
            if id(node) in covering:
                if id(x) not in flat:
                    view = _view_of_rows(x, self._known)
                    if view is None or self._leaves(x, region):
                        flat[id(x)] = self._inner(x, "flat")
                        new.append(self._node("Flatten", [x], flat[id(x)], axis=1))
                    else:
                        flat[id(x)] = view.inputs[0]
                        old.append(view)
                inputs = [flat[id(x)], *self._weights(node, covering[id(node)], region)]
                new.append(gs.Node("Gemm", node.name, {"transB": 1}, inputs, [y]))
            else:
                inputs = [
                    flat[id(t)] if id(t) in flat else self._operand(node, i, region)
                    for i, t in enumerate(node.inputs)
                ]
                new.append(like(node, inputs, y))
            flat[id(output)] = y
            new += [self._node("Identity", [y], view.outputs[0]) for view in views[1:]]
            if self._leaves(output, old):
                new.append(self._unsqueeze(y, output, rank))
        return Edit(self._graph, old, new)

    def multiplied(self, node: gs.Node) -> Edit:
        """Put a MatMul over [N, C, pixels] in the place of a 1×1 convolution."""
        x, output = node.inputs[0], node.outputs[0]
        channels, depth, *kernel = known_constant(node.inputs[1]).shape
        nodes: list[gs.Node] = []

        def then(op: str, *inputs: gs.Tensor, **attrs: int) -> gs.Tensor:
            nodes.append(self._node(op, inputs, self._inner(output, op.lower()), **attrs))
            return nodes[-1].outputs[0]

        def integers(*values: int) -> gs.Constant:
            return self._integers(f"{output.name}.shape", values)

        weight = self._derived(node, 1, (), (channels, depth), [node])
        is_row = len(kernel) == 1  # [N, C, L] is what MatMul wants
        y = then("MatMul", weight, x if is_row else then("Reshape", x, integers(0, depth, -1)))
        if optional_input(node, 2) is not None:
            y = then("Add", y, self._derived(node, 2, (), (channels, 1), [node]))
        if not is_row:
            size = self._known.get(output.name, (None,) * (len(kernel) + 2))[2:]
            if size.count(None) < 2:
                shape = integers(0, channels, *(-1 if side is None else side for side in size))
            elif channels == depth:
                shape = then("Shape", x)
            else:
                axes = integers(*range(2, len(kernel) + 2))
                sides = then("Gather", then("Shape", x), axes)
                shape = then("Concat", integers(0, channels), sides, axis=0)
            then("Reshape", y, shape)
        nodes[-1].outputs[0] = output
        return Edit(self._graph, [node], nodes)

    def _weights(self, node: gs.Node, taps: Taps, region: Sequence[gs.Node]) -> list[gs.Tensor]:
        """Return the weight [K, C·H·W] and the bias [K] for a Gemm with transB = 1."""
        channels, depth = known_constant(node.inputs[1]).shape[:2]
        columns = depth * prod(tap.stop - tap.start for tap in taps)
        weight = self._derived(node, 1, taps, (channels, columns), region)
        bias = optional_input(node, 2)
        if bias is not None:
            return [weight, bias]
        if self._graph.opset >= 11:
            return [weight]
        zeros = np.zeros(channels, weight.dtype)
        return [weight, gs.Constant(self._names.tensor(f"{node.outputs[0].name}.bias"), zeros)]

    def _operand(self, node: gs.Node, index: int, region: Sequence[gs.Node]) -> gs.Tensor:
        """Return what an elementwise `node` reads beside matrices for its input `index`."""
        tensor = node.inputs[index]
        value = constant(tensor) if is_op(node, *BROADCASTING) else None
        if value is None or (len(value.shape) < 3 and prod(value.shape) == 1):
            return tensor
        return self._derived(node, index, (), (prod(value.shape),), region)

    def _derived(
        self,
        node: gs.Node,
        index: int,
        taps: Taps,
        shape: tuple[int, ...],
        readers: Sequence[gs.Node],
    ) -> gs.Constant:
        """Return the constant input `index` of `node`, cut to `taps` and reshaped."""
        tensor = node.inputs[index]
        values = np.ascontiguousarray(known_constant(tensor).values[(..., *taps)]).reshape(shape)
        part = ("weight", "bias")[index - 1] if is_op(node, "Conv") else "operand"
        return self._reshaping.make(tensor, values, f"{node.outputs[0].name}.{part}", readers)

    def _leaves(self, tensor: gs.Tensor, readers: Sequence[gs.Node]) -> bool:
        """Tell whether the caller, or another than `readers`, reads `tensor`, or none at all."""
        return not tensor.outputs or leaves(self._graph, tensor, readers)

    def _unsqueeze(self, matrix: gs.Tensor, output: gs.Tensor, rank: int) -> gs.Node:
        """Make the map `output` of its flat twin."""
        axes = tuple(range(2, rank))
        if self._graph.opset < 13:
            return self._node("Unsqueeze", [matrix], output, axes=list(axes))
        return self._node(
            "Unsqueeze", [matrix, self._integers(f"{output.name}.axes", axes)], output
        )

    def _integers(self, name: str, values: tuple[int, ...]) -> gs.Constant:
        """Return a shape or axes: one initialiser for all that want the same values."""
        if values not in self._lists:
            self._lists[values] = gs.Constant(self._names.tensor(name), np.array(values, np.int64))
        return self._lists[values]

    def _inner(self, near: gs.Tensor, what: str) -> gs.Variable:
        return gs.Variable(self._names.tensor(f"{near.name}.{what}"), near.dtype)

    def _node(
        self, op: str, inputs: Sequence[gs.Tensor], output: gs.Tensor, **attrs: Any
    ) -> gs.Node:
        name = self._names.node(f"{output.name}.{op.lower()}")
        return gs.Node(op, name, attrs, list(inputs), [output])
