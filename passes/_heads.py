"""Heads: the layers behind a flattened map, seen as convolutions of the map.

The maths and the conditions stand in `gemm_to_conv`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.constants import Array
from pwopt.graph import (
    Names,
    constant,
    is_only_reader,
    is_op,
    is_output,
    known_constant,
    leaves,
    like,
    optional_input,
    producer,
)
from pwopt.model import Model
from pwopt.operators import BINARY, UNARY, is_one_output, is_over_space, is_training
from pwopt.shapes import Shape

from ._reshaping import Reshaping

VIEWS = ("Flatten", "Reshape", "Squeeze")
LAYERS = ("Gemm", "MatMul")
SOFTMAX = ("Softmax", "LogSoftmax")
POOLS = {
    "GlobalAveragePool": "AveragePool",
    "GlobalMaxPool": "MaxPool",
    "ReduceMean": "AveragePool",
}


class Map(NamedTuple):
    """The map whose rows, [N, features], a tensor holds."""

    sizes: tuple[int, ...]
    """Channels and spatial sizes."""

    order: tuple[int, ...]
    """The map's axes, the batch left out, in the order in which rows list them."""

    @property
    def features(self) -> int:
        """How many values a row has."""
        return prod(self.sizes)

    @property
    def is_plain(self) -> bool:
        """Whether rows list channels first, then space row by row."""
        return self.order == tuple(range(len(self.sizes)))

    @property
    def is_pixel(self) -> bool:
        """Whether rows list channels alone."""
        return self.is_plain and prod(self.sizes[1:]) == 1


@dataclass(frozen=True)
class Layer:
    """A Gemm, or a MatMul with the Add behind it, and what its convolution is made of."""

    node: gs.Node
    add: gs.Node | None
    output: gs.Tensor
    weight: Array
    bias: Array | None


@dataclass
class Head:
    """What makes rows of a map (`root`), and the nodes behind it that can run on maps instead."""

    root: gs.Node
    maps: dict[int, Map]
    members: list[Layer | gs.Node] = field(default_factory=list)

    @property
    def layers(self) -> list[Layer]:
        """What becomes convolutions."""
        return [member for member in self.members if isinstance(member, Layer)]


class Replacement(NamedTuple):
    """What an edit takes out, and what it puts in."""

    old: list[gs.Node]
    new: list[gs.Node]


class Lifting:
    """Finds heads and makes convolutions of them. `known` has the shapes of all tensors."""

    def __init__(self, model: Model, known: Mapping[str, Shape], *, dense: bool = False) -> None:
        self.graph = model.graph
        self.known = known
        self.dense = dense
        self.reasons: dict[int, str] = {}
        """Node → why it is not lifted."""
        self._names = Names(model)
        self._reshaping = Reshaping(self.graph, self._names)

    # -- finding ------------------------------------------------------------------------------

    def heads(self) -> Iterator[Head]:
        """List the heads; each may be edited before the next is asked for."""
        for node in list(self.graph.nodes):
            start = self._start(node) if node.outputs else None
            if isinstance(start, Map):
                yield self._grow(node, start)
            elif start:
                self.reasons[id(node)] = start

    def why_not(self, node: gs.Node) -> str | None:
        """Say why a Gemm or MatMul stays; None for a MatMul that is no layer of rows."""
        if id(node) in self.reasons:
            return self.reasons[id(node)]
        if node.op == "MatMul":
            weight = constant(node.inputs[1])
            rank = len(self.known.get(node.inputs[0].name, ()))
            if weight is None or len(weight.shape) != 2 or rank != 2:
                return None
        before = producer(node.inputs[0])
        if before is not None and id(before) in self.reasons:
            return self.reasons[id(before)]
        return f"reads {before.op if before else 'an input'}, not a flattened map"

    def _start(self, node: gs.Node) -> Map | str | None:
        """Return the map that `node` flattens, why it does not quite, or None."""
        if not is_op(node, *VIEWS, "ReduceMean"):
            return None
        source, rows = node.inputs[0], self.known.get(node.outputs[0].name)
        shape = self.known.get(source.name, ())
        if rows is None or len(rows) != 2 or len(shape) < 3:
            return None
        if len(shape) > 5:
            return f"the map before it has {len(shape) - 2} spatial axes"
        if node.op == "ReduceMean":
            mean = is_over_space(node, len(shape))
            channels, *space = shape[1:]
            if not (mean and channels and (all(space) or not self.dense)):
                return None
            return _plain((channels, *[1] * len(space)))
        sizes = tuple(size for size in shape[1:] if size)
        if len(sizes) < len(shape) - 1:
            return "the size of the map before it is open"
        # A view [M, F] of [N, C, H, W] with F = C·H·W has M = N, hence keeps the order. Where
        # inference knows nothing of F, the weight of the layer will tell.
        if rows[1] != prod(sizes) and (rows[1] or self.dense):
            return f"{node.op} before it cuts the map into other rows"
        transpose = producer(source)
        if transpose is None or not is_op(transpose, "Transpose"):
            return _plain(sizes)
        perm = transpose.attrs.get("perm", list(reversed(range(len(shape)))))
        turns_image = self.dense and producer(transpose.inputs[0]) is None
        if perm[0] != 0 or turns_image:
            return _plain(sizes)
        order = tuple(axis - 1 for axis in perm[1:])
        return Map(tuple(sizes[order.index(axis)] for axis in range(len(sizes))), order)

    def _grow(self, root: gs.Node, start: Map) -> Head:
        head = Head(root, {id(root.outputs[0]): start})
        behind: set[int] = set()  # tensors behind a layer
        for node in self.graph.nodes:
            if not any(id(tensor) in head.maps for tensor in node.inputs):
                continue
            lifted = self._lifted(node, head.maps)
            if isinstance(lifted, str):
                self.reasons[id(node)] = lifted
            elif isinstance(lifted, Layer):
                ones = (1,) * (len(start.sizes) - 1)
                head.maps[id(lifted.output)] = _plain((lifted.weight.shape[0], *ones))
                head.members.append(lifted)
                behind.add(id(lifted.output))
            elif lifted is not None:
                head.maps[id(node.outputs[0])] = lifted
                head.members.append(node)
                if any(id(tensor) in behind for tensor in node.inputs):
                    behind.add(id(node.outputs[0]))
        if not self.dense:
            _drop_what_leads_nowhere(head, behind)
        return head

    def _lifted(self, node: gs.Node, maps: Mapping[int, Map]) -> Layer | Map | str | None:
        if is_op(node, *LAYERS):
            return self._layer(node, maps)
        if not (is_one_output(self.graph, node) and self._is_elementwise(node, maps)):
            return None
        lifted = [maps[id(tensor)] for tensor in node.inputs if id(tensor) in maps]
        same = all(other == lifted[0] for other in lifted)
        return lifted[0] if same and lifted[0].is_plain else None

    def _layer(self, node: gs.Node, maps: Mapping[int, Map]) -> Layer | str | None:
        rows, weight = maps.get(id(node.inputs[0])), constant(node.inputs[1])
        if rows is None:
            return "the map is not its first operand" if node.op == "Gemm" else None
        if weight is None:
            return f"the {node.op}'s weight is not a constant"
        if node.attrs.get("transA", 0):
            return "transA takes the batch for the features"
        if weight.dtype not in (np.float16, np.float32):
            return f"onnxruntime has no Conv of {weight.dtype.name}"
        if len(weight.shape) != 2:
            return f"the {node.op}'s weight has {len(weight.shape)} axes"
        outwards = 0 if node.attrs.get("transB", 0) else 1
        if weight.shape[1 - outwards] != rows.features:
            return f"the {node.op}'s weight does not fit the map, {rows.features} values"
        channels = weight.shape[outwards]
        add = self._add_behind(node, channels) if node.op == "MatMul" else None
        bias: Array | str | None = None
        if add is not None:
            bias = _per_channel(known_constant(_operand(add, node.outputs[0])).values, channels)
        elif optional_input(node, 2) is not None:
            bias = _gemm_bias(node, channels)
        if isinstance(bias, str):
            return bias
        values = _scaled(weight.values, node.attrs.get("alpha", 1.0))
        if values is None:
            return f"the weight times alpha would not be finite in {weight.dtype.name}"
        values = values if outwards == 0 else values.T
        listed = [rows.sizes[axis] for axis in rows.order]
        back = [1 + rows.order.index(axis) for axis in range(len(listed))]
        kernel = values.reshape(channels, *listed).transpose(0, *back)
        output = (add or node).outputs[0]
        return Layer(node, add, output, np.ascontiguousarray(kernel), bias)

    def _add_behind(self, node: gs.Node, channels: int) -> gs.Node | None:
        """Return the Add that gives a MatMul its bias, if nothing else reads the MatMul."""
        output = node.outputs[0]
        add = output.outputs[0] if output.outputs else None
        if add is None or not is_op(add, "Add") or self.graph.opset < 7:
            return None
        if not is_only_reader(self.graph, add, output):
            return None
        bias = constant(_operand(add, output))
        return add if bias is not None and _is_along_features(bias, channels) else None

    def _is_elementwise(self, node: gs.Node, maps: Mapping[int, Map]) -> bool:
        """Tell whether `node` does to each element of rows what it does to each of maps."""
        first, *others = node.inputs
        rows = maps.get(id(first))
        if is_op(node, *BINARY):
            lifted = next(maps[id(t)] for t in node.inputs if id(t) in maps)
            operands = [constant(t) for t in node.inputs if id(t) not in maps]
            return (
                self.graph.opset >= 7  # before, operands are broadcast by other rules
                and (rows is not None or node.op != "PRelu")
                and all(c is not None and _is_along_features(c, lifted.features) for c in operands)
            )
        if rows is None or any(id(tensor) in maps for tensor in others):
            return False
        if is_op(node, "Dropout"):
            return not is_training(node, self.graph.opset)
        if is_op(node, "BatchNormalization"):
            trains = is_training(node, self.graph.opset)
            return rows.is_pixel and not trains and bool(node.attrs.get("spatial", 1))
        if is_op(node, *SOFTMAX):  # before opset 13 it would run over positions, too
            along = node.attrs.get("axis", -1) in (1, -1)
            return self.dense and self.graph.opset >= 13 and rows.is_pixel and along
        return is_op(node, *UNARY)

    # -- building -----------------------------------------------------------------------------

    def build(self, head: Head) -> Replacement:
        """Make the nodes that do on maps what `head` does on rows."""
        rows, source = head.root.outputs[0], head.root.inputs[0]
        front = [*self._sizes_of(head.root), head.root]
        old: list[gs.Node] = []
        for member in head.members:
            old += [member.node] if isinstance(member, Layer) else [member]
            old += [member.add] if isinstance(member, Layer) and member.add else []
        inside = [*front, *old]
        new: list[gs.Node] = []
        maps: dict[int, gs.Tensor] = {}
        if head.root.op == "ReduceMean":
            maps[id(rows)] = self._map(rows)
            new.append(self._mean(head.root, maps[id(rows)]))
            new += self._exit(rows, maps[id(rows)], head, inside)
        elif self._is_prediction(rows, head):
            maps[id(rows)] = source
            new += self._exit(rows, source, head, inside)
        else:
            transpose = None if head.maps[id(rows)].is_plain else producer(source)
            maps[id(rows)] = transpose.inputs[0] if transpose else source
            if leaves(self.graph, rows, inside):
                front = []
            elif transpose and is_only_reader(self.graph, head.root, source):
                front = [transpose, *front]
        for member in head.members:
            output = member.output if isinstance(member, Layer) else member.outputs[0]
            direct = self._is_prediction(output, head)
            maps[id(output)] = output if direct else self._map(output)
            if isinstance(member, Layer):
                new.append(self._convolution(member, maps, inside))
            else:
                new.append(self._elementwise(member, head, maps, inside))
            if not direct:
                new += self._exit(output, maps[id(output)], head, inside)
        return Replacement([*front, *old], new)

    def _map(self, rows: gs.Tensor) -> gs.Variable:
        return gs.Variable(self._names.tensor(f"{rows.name}.map"), rows.dtype)

    def _sizes_of(self, view: gs.Node) -> list[gs.Node]:
        """List the nodes that only compute the shape which a Reshape gives its map."""
        owned: list[gs.Node] = []
        inside = [view]

        def visit(tensor: gs.Tensor) -> None:
            node = producer(tensor)
            if node is None or tensor is view.inputs[0]:
                return
            if any(leaves(self.graph, output, inside) for output in node.outputs):
                return
            owned.append(node)
            inside.append(node)
            for above in () if is_op(node, "Shape") else node.inputs:
                visit(above)

        for tensor in view.inputs[1:] if is_op(view, *VIEWS) else ():
            visit(tensor)
        return owned

    def _is_prediction(self, rows: gs.Tensor, head: Head) -> bool:
        """Tell whether the caller is to get the map instead of these rows."""
        return self.dense and is_output(self.graph, rows) and head.maps[id(rows)].is_pixel

    def _exit(
        self, rows: gs.Tensor, map_: gs.Tensor, head: Head, inside: Sequence[gs.Node]
    ) -> list[gs.Node]:
        """Make rows for those outside who want them, or hand out the map."""
        if not leaves(self.graph, rows, inside):
            return []
        if self._is_prediction(rows, head):
            return [gs.Node("Identity", self._names.node(rows.name), {}, [map_], [rows])]
        name = self._names.node(f"{rows.name}.flatten")
        return [gs.Node("Flatten", name, {"axis": 1}, [map_], [rows])]

    def _mean(self, node: gs.Node, output: gs.Tensor) -> gs.Node:
        if self.dense:
            return window(node, output, self.known)
        return like(node, node.inputs, output, {**node.attrs, "keepdims": 1})

    def _convolution(
        self, layer: Layer, maps: Mapping[int, gs.Tensor], inside: Sequence[gs.Node]
    ) -> gs.Node:
        node, output = layer.node, layer.output
        same = node.attrs.get("alpha", 1.0) == 1
        name = f"{output.name}.weight"
        weight = self._reshaping.make(node.inputs[1], layer.weight, name, inside, same=same)
        inputs = [maps[id(node.inputs[0])], weight]
        if layer.bias is not None:
            old = _operand(layer.add, node.outputs[0]) if layer.add else node.inputs[2]
            same = node.attrs.get("beta", 1.0) == 1
            name = f"{output.name}.bias"
            inputs.append(self._reshaping.make(old, layer.bias, name, inside, same=same))
        attrs = {"kernel_shape": list(layer.weight.shape[2:])}
        return gs.Node("Conv", node.name, attrs, inputs, [maps[id(output)]], node.domain)

    def _elementwise(
        self, node: gs.Node, head: Head, maps: Mapping[int, gs.Tensor], inside: Sequence[gs.Node]
    ) -> gs.Node:
        output = node.outputs[0]
        inputs = [maps.get(id(tensor), tensor) for tensor in node.inputs]
        attrs = dict(node.attrs)
        if is_op(node, *SOFTMAX):
            attrs["axis"] = 1
        if is_op(node, *BINARY):
            for i, tensor in enumerate(node.inputs):
                value = constant(tensor)
                if value is not None and value.shape and prod(value.shape) > 1:
                    along = value.values.reshape(head.maps[id(output)].sizes)
                    name = f"{output.name}.operand"
                    inputs[i] = self._reshaping.make(tensor, along, name, inside)
        return like(node, inputs, maps[id(output)], attrs)


def _plain(sizes: tuple[int, ...]) -> Map:
    return Map(sizes, tuple(range(len(sizes))))


def _drop_what_leads_nowhere(head: Head, behind: set[int]) -> None:
    """Drop the members in front of which there is no layer, nor behind."""
    kept: list[Layer | gs.Node] = []
    for member in reversed(head.members):
        if isinstance(member, Layer):
            kept.append(member)
            continue
        output = member.outputs[0]
        readers = {id(other.node if isinstance(other, Layer) else other) for other in kept}
        if id(output) in behind or any(id(reader) in readers for reader in output.outputs):
            kept.append(member)
    head.members = kept[::-1]


def _operand(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    """Return the other operand of a binary operator."""
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def _is_along_features(value: gs.Constant, features: int) -> bool:
    """Tell whether a constant, broadcast to rows [N, features], is the same for all rows."""
    shape = list(value.shape)
    return len(shape) <= 2 and prod(shape) in (1, features) and prod(shape[:-1]) == 1


def _gemm_bias(node: gs.Node, channels: int) -> Array | str | None:
    """Return beta times a Gemm's C, shape (channels,), or why it cannot be a Conv's bias."""
    bias, beta = constant(node.inputs[2]), node.attrs.get("beta", 1.0)
    if beta == 0:
        return None
    if bias is None:
        return "the Gemm's bias is not a constant"
    if not _is_along_features(bias, channels):
        return "the Gemm's bias differs from row to row"
    values = _scaled(bias.values, beta)
    if values is None:
        return f"the bias times beta would not be finite in {bias.dtype.name}"
    return _per_channel(values, channels)


def _per_channel(values: Array, channels: int) -> Array:
    return np.ascontiguousarray(np.broadcast_to(values.reshape(-1), channels))


@np.errstate(over="ignore", invalid="ignore")  # looked for at the end
def _scaled(values: Array, factor: float) -> Array | None:
    """Multiply in float64 and round once; None if the result is not finite."""
    if factor == 1:
        return values
    scaled: Array = (values.astype(np.float64) * factor).astype(values.dtype)
    return scaled if np.isfinite(scaled).all() else None


def window(node: gs.Node, output: gs.Tensor, known: Mapping[str, Shape]) -> gs.Node:
    """Make the pool that slides over a map what `node` pools as a whole."""
    attrs = {"kernel_shape": list(known[node.inputs[0].name][2:])}
    return gs.Node(POOLS[node.op], node.name, attrs, [node.inputs[0]], [output], node.domain)
