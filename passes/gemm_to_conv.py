"""Gemm-to-conv: write fully connected layers behind a map as convolutions.

Before → after, for a map x [N, C, H, W] and a Gemm with K outputs::

    x [N,C,1,1] → Flatten → Gemm(W) → y     ⇒   x → Conv 1×1 (W') → Flatten → y
    x [N,C,H,W] → Flatten → Gemm(W) → y     ⇒   x → Conv H×W (W') → Flatten → y
    x → Flatten → Gemm → Relu → Gemm → y    ⇒   x → Conv H×W → Relu → Conv 1×1 → Flatten → y

Maths: Flatten lists a map row by row, channels first, so the [K, C·H·W] weight of a Gemm is the
[K, C, H, W] weight of a convolution that covers the whole map: the same sum ("there is no such
thing as fully connected layers", LeCun 2015). Behind a Transpose of the map the axes are listed in
another order, and the weight is transposed to match. α and β are multiplied in, in float64, if
they are not 1; else all values stay bit for bit.

Conditions: channels, height and width of the map are static, the batch may be open. What makes
rows of the map is a Flatten, Reshape, Squeeze, or ReduceMean over space without keepdims. The
layer is Gemm without transA, or MatMul with or without Add; its weight is constant and float32 or
float16 (onnxruntime has no Conv of doubles); its bias is constant and the same for all rows.
Elementwise operators, Dropout and BatchNormalization between the layers come along, as do
constants that vary along the features only. Rows that are read elsewhere, or are outputs, get a
Flatten of their own.

dense=true turns the whole network fully convolutional: the final Flatten goes, height and width of
the inputs become symbols, and a larger image gives a map of predictions [N, K, H', W']. A pool over
the whole map becomes a pool of the size that the map has for one crop, at stride 1::

    GlobalAveragePool of a k×k map → Flatten → Gemm → y   ⇒   AveragePool k×k → Conv 1×1 → y

On an image of the crop's size nothing changes but the shape, [N, K, 1, 1]. On a larger one, the
prediction at (i, j) is what the head says to the window of the last map that begins there. It
equals the prediction for the crop that begins at (i·s, j·s), s the product of all strides, if no
layer pads and no pool rounds up (OverFeat, Sermanet et al. 2014; FCN, Long et al. 2015). Else the
crop's own border is zeros where the large image has pixels, and they differ; the event says so. An
image whose size is open needs the crop's by --shape. Refused is what does not carry over to another
size: Reshape, Gemm that stays, constants that vary over space, squeeze-and-excitation, which would
meet a map of another size, and normalisation over the whole map.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from pwopt import shapes
from pwopt.editing import Edit
from pwopt.errors import ModelError
from pwopt.graph import Names, constant, is_only_reader, is_op, is_output, producer, replace
from pwopt.model import Model
from pwopt.rewriting import Context, Event, Pass
from pwopt.shapes import Binding, Shape

Array = npt.NDArray[Any]

VIEWS = ("Flatten", "Reshape", "Squeeze")
LAYERS = ("Gemm", "MatMul")
SOFTMAX = ("Softmax", "LogSoftmax")
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "PRelu")
POOLS = {
    "GlobalAveragePool": "AveragePool",
    "GlobalMaxPool": "MaxPool",
    "ReduceMean": "AveragePool",
}
ELEMENTWISE = (
    *("Abs", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish"),
    *("Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid"),
    *("Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu"),
)


@dataclass(frozen=True, kw_only=True)
class GemmToConv(Pass):
    """Write fully connected layers behind a map as convolutions.

    Options:
        dense: make the network fully convolutional, so that a larger image gives a map of
            predictions
    """

    name: ClassVar[str] = "gemm-to-conv"
    exact: ClassVar[bool] = True

    dense: bool = False

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Rewrite head by head, a head being all layers behind one map; dense: all or nothing."""
        if self.dense:
            yield from _make_dense(model, context)
            return
        layers = [node for node in model.graph.nodes if is_op(node, *LAYERS)]
        if not layers:
            return
        lifting = _Lifting(model, shapes.infer(model, Binding({}, {})))
        done: set[int] = set()
        for head in lifting.heads():
            if not head.layers:
                continue
            done |= {id(layer.node) for layer in head.layers}
            replacement = lifting.build(head)
            edit = Edit(model.graph, replacement.old, replacement.new)
            count = len(head.layers)
            reason = f"{count} layer{'s' * (count > 1)} written as Conv"
            yield context.settle(model, edit, head.layers[0].output.name, reason, {"layers": count})
        for node in layers:
            if id(node) not in done:
                why = lifting.why_not(node)
                if why:
                    yield Event("skipped", node.outputs[0].name, why)


class _Map(NamedTuple):
    """The map whose rows, [N, features], a tensor holds."""

    sizes: tuple[int, ...]
    """Channels and spatial sizes."""

    order: tuple[int, ...]
    """The map's axes, the batch left out, in the order in which rows list them."""

    @property
    def features(self) -> int:
        return prod(self.sizes)

    @property
    def is_plain(self) -> bool:
        return self.order == tuple(range(len(self.sizes)))

    @property
    def is_pixel(self) -> bool:
        return self.is_plain and prod(self.sizes[1:]) == 1


@dataclass(frozen=True)
class _Layer:
    """A Gemm, or a MatMul with the Add behind it, and what its convolution is made of."""

    node: gs.Node
    add: gs.Node | None
    output: gs.Tensor
    weight: Array
    bias: Array | None


@dataclass
class _Head:
    """What makes rows of a map (`root`), and the nodes behind it that can run on maps instead."""

    root: gs.Node
    maps: dict[int, _Map]
    members: list[_Layer | gs.Node] = field(default_factory=list)

    @property
    def layers(self) -> list[_Layer]:
        return [member for member in self.members if isinstance(member, _Layer)]


class _Replacement(NamedTuple):
    old: list[gs.Node]
    new: list[gs.Node]


class _Lifting:
    """Finds heads and makes convolutions of them. `known` has the shapes of all tensors."""

    def __init__(self, model: Model, known: Mapping[str, Shape], *, dense: bool = False) -> None:
        self.graph = model.graph
        self.known = known
        self.dense = dense
        self.reasons: dict[int, str] = {}
        """Node → why it is not lifted."""
        self._names = Names(model)
        self._constants: list[tuple[gs.Constant, gs.Constant]] = []  # old, new

    # -- finding ------------------------------------------------------------------------------

    def heads(self) -> Iterator[_Head]:
        """List the heads; each may be edited before the next is asked for."""
        for node in list(self.graph.nodes):
            start = self._start(node) if node.outputs else None
            if isinstance(start, _Map):
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

    def _start(self, node: gs.Node) -> _Map | str | None:
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
            mean = _is_mean_over_space(node, len(shape))
            channels, *space = shape[1:]
            if not (mean and channels and (all(space) or not self.dense)):
                return None
            return _plain((channels, *[1] * len(space)))
        sizes = tuple(size for size in shape[1:] if size)
        if len(sizes) < len(shape) - 1:
            return "the size of the map before it is open"
        # A view [M, F] of [N, C, H, W] with F = C·H·W has M = N, hence keeps the order. Where
        # inference knows nothing of F, the weight of the layer will tell.
        if rows[1] not in (None, prod(sizes)):
            return f"{node.op} before it cuts the map into other rows"
        transpose = producer(source)
        if transpose is None or not is_op(transpose, "Transpose"):
            return _plain(sizes)
        perm = transpose.attrs.get("perm", list(reversed(range(len(shape)))))
        if perm[0] != 0:
            return _plain(sizes)
        order = tuple(axis - 1 for axis in perm[1:])
        return _Map(tuple(sizes[order.index(axis)] for axis in range(len(sizes))), order)

    def _grow(self, root: gs.Node, start: _Map) -> _Head:
        head = _Head(root, {id(root.outputs[0]): start})
        behind: set[int] = set()  # tensors behind a layer
        for node in self.graph.nodes:
            if not any(id(tensor) in head.maps for tensor in node.inputs):
                continue
            lifted = self._lifted(node, head.maps)
            if isinstance(lifted, str):
                self.reasons[id(node)] = lifted
            elif isinstance(lifted, _Layer):
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

    def _lifted(self, node: gs.Node, maps: Mapping[int, _Map]) -> _Layer | _Map | str | None:
        if is_op(node, *LAYERS):
            return self._layer(node, maps)
        if any(t.outputs or is_output(self.graph, t) for t in node.outputs[1:]):
            return None
        if not self._is_elementwise(node, maps):
            return None
        lifted = [maps[id(tensor)] for tensor in node.inputs if id(tensor) in maps]
        same = all(other == lifted[0] for other in lifted)
        return lifted[0] if same and lifted[0].is_plain else None

    def _layer(self, node: gs.Node, maps: Mapping[int, _Map]) -> _Layer | str | None:
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
            added = constant(_operand(add, node.outputs[0]))
            assert added is not None  # or it were no bias
            bias = _per_channel(added.values, channels)
        elif len(node.inputs) > 2 and not node.inputs[2].is_empty():
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
        return _Layer(node, add, output, np.ascontiguousarray(kernel), bias)

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

    def _is_elementwise(self, node: gs.Node, maps: Mapping[int, _Map]) -> bool:
        """Tell whether `node` does to each element of rows what it does to each of maps."""
        first, *others = node.inputs
        rows = maps.get(id(first))
        if is_op(node, *ARITHMETIC):
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
            return _is_inference(node)
        if is_op(node, "BatchNormalization"):
            attrs = node.attrs
            trains = attrs.get("training_mode", 0) or not attrs.get("is_test", self.graph.opset > 6)
            return rows.is_pixel and not trains and bool(attrs.get("spatial", 1))
        if is_op(node, *SOFTMAX):  # before opset 13 it would run over positions, too
            along = node.attrs.get("axis", -1) in (1, -1)
            return self.dense and self.graph.opset >= 13 and rows.is_pixel and along
        return is_op(node, *ELEMENTWISE)

    # -- building -----------------------------------------------------------------------------

    def build(self, head: _Head) -> _Replacement:
        """Make the nodes that do on maps what `head` does on rows."""
        old = [head.root]
        for member in head.members:
            old += [member.node, member.add] if isinstance(member, _Layer) else [member]
        old = [node for node in old if node is not None]
        old = [*self._sizes_of(head.root), *old]
        inside = {id(node) for node in old}
        rows, source = head.root.outputs[0], head.root.inputs[0]
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
            if self._leaves(rows, inside):
                old = old[old.index(head.root) + 1 :]
            elif transpose and is_only_reader(self.graph, head.root, source):
                old.insert(0, transpose)
        for member in head.members:
            output = member.output if isinstance(member, _Layer) else member.outputs[0]
            direct = self._is_prediction(output, head)
            maps[id(output)] = output if direct else self._map(output)
            if isinstance(member, _Layer):
                new.append(self._convolution(member, maps, inside))
            else:
                new.append(self._elementwise(member, head.maps, maps))
            if not direct:
                new += self._exit(output, maps[id(output)], head, inside)
        return _Replacement(old, new)

    def _map(self, rows: gs.Tensor) -> gs.Variable:
        return gs.Variable(self._names.tensor(f"{rows.name}.map"), rows.dtype)

    def _leaves(self, tensor: gs.Tensor, inside: set[int]) -> bool:
        return is_output(self.graph, tensor) or any(id(n) not in inside for n in tensor.outputs)

    def _sizes_of(self, view: gs.Node) -> list[gs.Node]:
        """List the nodes that only compute the shape which a Reshape gives its map."""
        owned = [view]

        def visit(tensor: gs.Tensor) -> None:
            node = producer(tensor)
            if node is None or tensor is view.inputs[0]:
                return
            if self._leaves(tensor, {id(other) for other in owned}):
                return
            owned.append(node)
            for above in () if is_op(node, "Shape") else node.inputs:
                visit(above)

        for tensor in view.inputs[1:]:
            visit(tensor)
        return owned[1:]

    def _is_prediction(self, rows: gs.Tensor, head: _Head) -> bool:
        """Tell whether the caller is to get the map instead of these rows."""
        return self.dense and is_output(self.graph, rows) and head.maps[id(rows)].is_pixel

    def _exit(
        self, rows: gs.Tensor, map_: gs.Tensor, head: _Head, inside: set[int]
    ) -> list[gs.Node]:
        """Make rows for those outside who want them, or hand out the map."""
        if not self._leaves(rows, inside):
            return []
        if self._is_prediction(rows, head):
            return [gs.Node("Identity", self._names.node(rows.name), {}, [map_], [rows])]
        name = self._names.node(f"{rows.name}.flatten")
        return [gs.Node("Flatten", name, {"axis": 1}, [map_], [rows])]

    def _mean(self, node: gs.Node, output: gs.Tensor) -> gs.Node:
        if self.dense:
            return _window(node, output, self.known)
        attrs = {**node.attrs, "keepdims": 1}
        return gs.Node(node.op, node.name, attrs, list(node.inputs), [output], node.domain)

    def _convolution(
        self, layer: _Layer, maps: Mapping[int, gs.Tensor], inside: set[int]
    ) -> gs.Node:
        node, output = layer.node, layer.output
        same = node.attrs.get("alpha", 1.0) == 1
        name = f"{output.name}.weight"
        weight = self._constant(node.inputs[1], layer.weight, same, name, inside)
        inputs = [maps[id(node.inputs[0])], weight]
        if layer.bias is not None:
            old = _operand(layer.add, node.outputs[0]) if layer.add else node.inputs[2]
            same = node.attrs.get("beta", 1.0) == 1
            inputs.append(self._constant(old, layer.bias, same, f"{output.name}.bias", inside))
        attrs = {"kernel_shape": list(layer.weight.shape[2:])}
        return gs.Node("Conv", node.name, attrs, inputs, [maps[id(output)]], node.domain)

    def _constant(
        self, tensor: gs.Tensor, values: Array, same: bool, name: str, inside: set[int]
    ) -> gs.Constant:
        """Make an initialiser; layers that share the old one share the new one.

        If `same`, the values are the old ones in another shape, and it takes over the old name
        where nobody else reads that, or returns the old one where the shape is the same, too.
        """
        old = constant(tensor)
        assert old is not None  # a layer has constant weights
        same = same and tensor is old and values.size == prod(old.shape)
        if same and values.shape == old.shape:
            return old
        made = [new for other, new in self._constants if other is old]
        for new in made:
            if np.array_equal(new.values, values, equal_nan=True):
                return new
        name = old.name if same else name
        if not same or self._leaves(old, inside) or any(new.name == name for new in made):
            name = self._names.tensor(name)
        new = gs.Constant(name, values)
        self._constants.append((old, new))
        return new

    def _elementwise(
        self, node: gs.Node, rows: Mapping[int, _Map], maps: Mapping[int, gs.Tensor]
    ) -> gs.Node:
        output = node.outputs[0]
        inputs = [maps.get(id(tensor), tensor) for tensor in node.inputs]
        attrs = dict(node.attrs)
        if is_op(node, *SOFTMAX):
            attrs["axis"] = 1
        if is_op(node, *ARITHMETIC):
            for i, tensor in enumerate(node.inputs):
                value = constant(tensor)
                if value is not None and value.shape and prod(value.shape) > 1:
                    name = self._names.tensor(f"{output.name}.operand")
                    sizes = rows[id(output)].sizes
                    inputs[i] = gs.Constant(name, value.values.reshape(sizes))
        return gs.Node(node.op, node.name, attrs, inputs, [maps[id(output)]], node.domain)


def _plain(sizes: tuple[int, ...]) -> _Map:
    return _Map(sizes, tuple(range(len(sizes))))


def _drop_what_leads_nowhere(head: _Head, behind: set[int]) -> None:
    """Drop the members in front of which there is no layer, nor behind."""
    kept: list[_Layer | gs.Node] = []
    for member in reversed(head.members):
        if isinstance(member, _Layer):
            kept.append(member)
            continue
        output = member.outputs[0]
        readers = {id(other.node if isinstance(other, _Layer) else other) for other in kept}
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


def _is_inference(dropout: gs.Node) -> bool:
    """Tell whether a Dropout does nothing (ONNX operators, versions 1 to 22)."""
    if len(dropout.inputs) < 3 or dropout.inputs[2].is_empty():
        return True
    training = constant(dropout.inputs[2])
    return training is not None and not training.values.any()


def _is_mean_over_space(node: gs.Node, rank: int) -> bool:
    """Tell whether a ReduceMean of a map with `rank` axes goes over all but the first two."""
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1:  # from opset 18 on
        given = constant(node.inputs[1])
        axes = None if given is None else given.values.tolist()
    return axes is not None and sorted(axis % rank for axis in axes) == list(range(2, rank))


# -- dense ------------------------------------------------------------------------------------


def _make_dense(model: Model, context: Context) -> Iterator[Event]:
    """Make the network fully convolutional, or say why that is not possible."""
    graph, given = model.graph, context.shapes or {}
    fed = {i.name for i in shapes.inputs(model)}
    images = [t for t in graph.inputs if t.name in fed and t.outputs]
    where = graph.nodes[-1].outputs[0].name if graph.nodes else ""
    if not images or not where:
        return
    for image in images:
        if not 3 <= len(image.shape) <= 5:
            yield Event("skipped", where, f"input '{image.name}' is no map")
            return
    sizes = {t.name: [t.shape[axis] for axis in _space(t)] for t in images}
    fixed = any(isinstance(size, int) for space in sizes.values() for size in space)
    unknown = [name for name, space in sizes.items() if name not in given and not _are_ints(space)]
    if unknown:
        if fixed or any(is_op(node, *VIEWS, *LAYERS, *POOLS) for node in graph.nodes):
            reason = f"the size of input '{unknown[0]}' is open; give that of a crop with --shape"
            yield Event("skipped", where, reason)
        return

    crop = shapes.bind(model, given)
    lifting = _Lifting(model, shapes.infer(model, crop), dense=True)
    edits = [
        Edit(graph, [node], [_window(node, node.outputs[0], lifting.known)])
        for node in list(graph.nodes)
        if _pools_all(node, lifting.known)
    ]
    for head in lifting.heads():
        old, new = lifting.build(head)
        if old:
            edits.append(Edit(graph, old, new))
    if not (fixed or edits):
        return
    survey = _survey(model, images, crop, lifting)
    if isinstance(survey, str):
        for edit in reversed(edits):
            edit.undo()
        yield Event("skipped", where, survey)
        return
    for edit in edits:
        edit.settle()
        for node in edit.new:
            _bypass(graph, node)
    _open_axes(images, survey)
    size = "×".join(str(crop.shapes[images[0].name][axis]) for axis in _space(images[0]))
    step = "×".join(str(stride) for stride in survey.stride)
    reason = f"made fully convolutional: a prediction every {step} pixels"
    if survey.padded:
        reason += "; layers pad, so predictions differ from those for crops"
    yield Event("rewrote", where, reason, {"crop": size, "stride": step, "padded": survey.padded})


def _space(image: gs.Tensor) -> range:
    """Return the axes of an input that are space: the last ones, unless it is turned at once."""
    rank = len(image.shape)
    turned = [0, rank - 1, *range(1, rank - 1)]
    if all(is_op(node, "Transpose") and node.attrs.get("perm") == turned for node in image.outputs):
        return range(1, rank - 1)
    return range(2, rank)


def _are_ints(sizes: Iterable[object]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _pools_all(node: gs.Node, known: Mapping[str, Shape]) -> bool:
    """Tell whether `node` pools a whole map, of known size, to one pixel."""
    if not is_op(node, *POOLS):
        return False
    shape = known.get(node.inputs[0].name, ())
    if node.op == "ReduceMean" and not (
        node.attrs.get("keepdims", 1) and _is_mean_over_space(node, len(shape))
    ):
        return False
    return 3 <= len(shape) <= 5 and _are_ints(shape[2:])


def _window(node: gs.Node, output: gs.Tensor, known: Mapping[str, Shape]) -> gs.Node:
    """Make the pool that slides over a map what `node` pools as a whole."""
    attrs = {"kernel_shape": list(known[node.inputs[0].name][2:])}
    return gs.Node(POOLS[node.op], node.name, attrs, [node.inputs[0]], [output], node.domain)


@dataclass
class _Survey:
    """What is known of a network that carries over to larger images."""

    shapes: Mapping[str, Shape]
    """Shapes for one crop."""

    maps: list[gs.Tensor] = field(default_factory=list)
    """All that is computed from the images."""

    stride: tuple[int, ...] = ()
    """Pixels of the image from one prediction to the next, per axis of space."""

    padded: int = 0
    """How many layers look beyond the border."""


def _survey(
    model: Model, images: list[gs.Tensor], crop: Binding, lifting: _Lifting
) -> _Survey | str:
    """Look through a network whose heads are convolutions; or say what ties it to one size."""
    graph = model.graph
    survey = _Survey(shapes.infer(model, crop))
    strides = {id(image): (1,) * len(_space(image)) for image in images}
    for node in _live(graph):
        read = [strides[id(tensor)] for tensor in node.inputs if id(tensor) in strides]
        if not read and not any(node.subgraphs()):
            continue
        if not _is_local(node, images, strides, survey.shapes, graph.opset):
            return _why_not_dense(node, lifting)
        own = node.attrs.get("strides", [1] * len(read[0]))
        steps = tuple(np.max(read, axis=0) * own)
        strides |= {id(tensor): steps for tensor in node.outputs}
        survey.maps += node.outputs
        survey.padded += _is_padded(node)
        survey.stride = max(survey.stride, steps)
    try:
        shapes.infer(model, Binding({t.name: _doubled(t, crop) for t in images}, {}))
    except ModelError as error:
        return f"maps no longer fit together on a larger image ({error})"
    return survey


def _why_not_dense(node: gs.Node, lifting: _Lifting) -> str:
    if is_op(node, "Flatten") and node.outputs[0].outputs:
        node = node.outputs[0].outputs[0]  # who wants rows is to blame
    why = lifting.why_not(node) if is_op(node, *LAYERS) else None
    text = f"{node.op} '{node.outputs[0].name}' does not carry over to larger images"
    return f"{text}: {why}" if why else text


def _live(graph: gs.Graph) -> list[gs.Node]:
    """List the nodes that outputs are computed from, in order."""
    dead: set[int] = set()
    for node in reversed(graph.nodes):
        read = any(id(reader) not in dead for tensor in node.outputs for reader in tensor.outputs)
        if not read and not any(is_output(graph, tensor) for tensor in node.outputs):
            dead.add(id(node))
    return [node for node in graph.nodes if id(node) not in dead]


def _doubled(image: gs.Tensor, crop: Binding) -> tuple[int, ...]:
    space, sizes = _space(image), crop.shapes[image.name]
    return tuple(size * (2 if axis in space else 1) for axis, size in enumerate(sizes))


def _is_local(
    node: gs.Node,
    images: list[gs.Tensor],
    maps: Mapping[int, Any],
    known: Mapping[str, Shape],
    opset: int,
) -> bool:
    """Tell whether `node` does the same at every place of its maps, however large they are."""
    first, *others = node.inputs
    rank = len(known.get(node.outputs[0].name, ()))
    if is_op(node, *ARITHMETIC, "Max", "Min", "Sum"):
        constants = [constant(tensor) for tensor in node.inputs if id(tensor) not in maps]
        uniform = all(c is not None and prod(c.shape[-(rank - 2) :]) == 1 for c in constants)
        return uniform and rank > 2 and "axis" not in node.attrs
    if is_op(node, "Concat", "Split", *SOFTMAX):
        default = {"Concat": 1, "Split": 0}.get(node.op, -1)
        by_channel = rank > 2 and node.attrs.get("axis", default) % rank == 1
        return by_channel and (opset >= 13 or not is_op(node, *SOFTMAX))
    if id(first) not in maps or any(id(tensor) in maps for tensor in others):
        return False
    if is_op(node, "MaxPool"):
        return len(node.outputs) == 1  # indices count through one map
    if is_op(node, "BatchNormalization"):
        return not node.attrs.get("training_mode", 0) and len(node.outputs) == 1
    if is_op(node, "Transpose"):
        return any(first is image for image in images) and _space(first).start == 1
    return is_op(node, *ELEMENTWISE, "Conv", "AveragePool", "LpPool", "LRN", "Pad")


def _is_padded(node: gs.Node) -> bool:
    attrs = node.attrs
    if attrs.get("auto_pad", "NOTSET").startswith("SAME") or attrs.get("ceil_mode", 0):
        return True
    return is_op(node, "Pad") or any(attrs.get("pads", ()))


def _bypass(graph: gs.Graph, node: gs.Node) -> None:
    """Let the node before an Identity write what that writes, if nobody else reads it."""
    source = node.inputs[0]
    before = producer(source)
    if not is_op(node, "Identity") or before is None or not is_only_reader(graph, node, source):
        return
    target = node.outputs[0]
    node.outputs.clear()
    before.outputs[next(i for i, t in enumerate(before.outputs) if t is source)] = target
    replace(graph, node, [])


def _open_axes(images: list[gs.Tensor], survey: _Survey) -> None:
    """Let inputs and all maps say that their height and width are open."""
    for image in images:
        space = _space(image)
        for axis, symbol in zip(space, ("D", "H", "W")[-len(space) :], strict=True):
            if isinstance(image.shape[axis], int):
                image.shape[axis] = symbol
    for tensor in survey.maps:
        shape = survey.shapes.get(tensor.name)
        if tensor.shape is not None and shape is not None:
            batch = tensor.shape[0] if tensor.shape else None
            tensor.shape = [batch, shape[1], *[None] * (len(shape) - 2)]
