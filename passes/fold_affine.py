"""Fold-affine: put per-channel constants behind a layer into its weight and bias.

Before → after, with a scale s and a shift t per output channel::

    x → Conv | ConvTranspose | Gemm (W, b) → affine → y   ⇒   x → the same (W', b') → y
    x → MatMul(W) → affine → y                            ⇒   x → MatMul(W') → Add(b') → y
    x → MatMul(W) → Add(b) → affine → y                   ⇒   x → MatMul(W') → Add(b') → y

where affine is BatchNormalization, Mul, Add, Sub or Div, and Identity or Dropout may stand in
between.

Maths: s·(W*x + b) + t = (s·W)*x + (s·b + t). For BatchNormalization s = scale/√(var + ε) and
t = bias − s·mean; Mul has t = 0, Add s = 1, y = c − x has s = −1, Div s = 1/c. Computed in
float64; each fold rounds once to the weight's type.

Conditions: the layer has constant weight and bias, and nobody else sees what lies between it and
the affine's output; the other operand is constant, if need be behind casts and reshapes, and
varies along the output channels only; c / x is not affine; BatchNormalization and Dropout are in
inference mode. The channels are axis 1, for MatMul the last axis: a BatchNormalization behind
MatMul must see two axes. The shift alone stays behind MatMul, which has no bias of its own.
Weights that others read stay as they are beside the new ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.affine import OPERATORS, Affine, affine
from pwopt.constants import Array
from pwopt.editing import Edit
from pwopt.graph import Names, is_only_reader, is_op, is_output, like, producer
from pwopt.model import Model
from pwopt.operators import float_weight, gives_on
from pwopt.rewriting import Context, Event, Pass

from ._folding import Initializers, folded, known_shapes, layer_bias

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, kw_only=True)
class FoldAffine(Pass):
    """Fold per-channel constants into the layer before them."""

    name: ClassVar[str] = "fold-affine"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Fold in the order of the graph, so that a chain folds into its layer one by one."""
        folder = _Folder(model)
        for node in list(model.graph.nodes):
            if not is_op(node, *OPERATORS):
                continue
            where = node.outputs[0].name
            site = _site(model.graph, node)
            if site is None:
                if node.op == "BatchNormalization":
                    before = producer(node.inputs[0])
                    what = before.op if before else "an input"
                    yield Event("skipped", where, f"reads {what}, not a layer with a weight")
                continue  # arithmetic elsewhere is no site
            new = folder.fold(site)
            if isinstance(new, str):
                yield Event("skipped", where, new)
                continue
            edit = Edit(model.graph, old=[*site.path, *site.casts(model.graph)], new=new)
            reason, data = f"{node.op} folded", {"op": node.op}
            yield context.settle(model, edit, where, reason, data, free=True)


class _Site(NamedTuple):
    """A layer and the affines behind it, each with the tensor it reads: one, or two at a MatMul."""

    path: list[gs.Node]
    """All nodes from the layer to the last affine."""
    affines: list[tuple[gs.Node, gs.Tensor]]

    @property
    def layer(self) -> gs.Node:
        return self.path[0]

    def casts(self, graph: gs.Graph) -> list[gs.Node]:
        """List what casts a constant for an affine alone, perhaps to the type of its tensor."""
        operands = [(node, tensor) for node, _ in self.affines for tensor in node.inputs]
        writers = [producer(t) for node, t in operands if is_only_reader(graph, node, t)]
        return [node for node in writers if node is not None and is_op(node, "CastLike")]


def _site(graph: gs.Graph, node: gs.Node) -> _Site | None:
    """Return the site that ends with `node`; None if it is no candidate."""
    for tensor in _operands(node):
        start, between = _behind(graph, tensor)
        layer = producer(start)
        if layer is None:
            continue
        this = (node, tensor)
        if is_op(layer, "MatMul") and is_op(node, "Add", "Sub"):
            return None  # is its bias already
        if is_op(layer, *LAYERS):
            return _Site([layer, *between, node], [this])
        for operand in _operands(layer) if is_op(layer, "Add", "Sub") else ():
            first, inner = _behind(graph, operand)
            matmul = producer(first)
            if matmul is not None and is_op(matmul, "MatMul"):
                path = [matmul, *inner, layer, *between, node]
                return _Site(path, [(layer, operand), this])
    return None


def _operands(node: gs.Node) -> list[gs.Tensor]:
    return list(node.inputs[:1] if node.op == "BatchNormalization" else node.inputs)


def _behind(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]]:
    """Go back to where `tensor` comes from unchanged; return that and the nodes in between."""
    between: list[gs.Node] = []
    while (node := producer(tensor)) is not None and gives_on(graph, node):
        between.insert(0, node)
        tensor = node.inputs[0]
    return tensor, between


class _Folder:
    """Makes the nodes that take the place of a site."""

    def __init__(self, model: Model) -> None:
        self._graph = model.graph
        self._names = Names(model)
        self._shapes = known_shapes(model)
        self._initializers = Initializers(self._graph, self._names)

    @np.errstate(over="ignore", invalid="ignore")  # looked for at the end
    def fold(self, site: _Site) -> list[gs.Node] | str:
        """Fold the affines of `site` into its layer; return why if that is not possible."""
        layer, node = site.layer, site.path[-1]
        casts = site.casts(self._graph)
        for writer, reader in pairwise(site.path):
            tensor = writer.outputs[0]
            readers = [node for node in tensor.outputs if not any(node is cast for cast in casts)]
            if is_output(self._graph, tensor) or len(readers) != 1 or readers[0] is not reader:
                return f"the {layer.op}'s output is read elsewhere too"
        old = node.op == "BatchNormalization" and layer.op in ("Conv", "ConvTranspose")
        if self._graph.opset < 7 and not old:
            return "before opset 7, operands are broadcast by other rules"
        weight = float_weight(layer, computed=True)
        if isinstance(weight, str):
            return weight
        if layer.op == "MatMul" and len(weight.shape) != 2:
            return "the MatMul's weight is not a matrix"
        total = self._total(site, weight)
        if isinstance(total, str):
            return total
        bias = layer_bias(layer, len(total.scale))
        if isinstance(bias, str):
            return bias

        exact = scaled_outputs(layer, weight.values, total.scale)
        values = exact.astype(weight.dtype)
        shift = total.shift if bias is None else bias * total.scale + total.shift
        shift = shift.astype(weight.dtype)
        if not (np.isfinite(values).all() and np.isfinite(shift).all()):
            return f"the folded weight would not be finite in {weight.dtype.name}"
        outputs = 0 if layer.op == "Conv" or layer.attrs.get("transB") else 1
        if _loses_digits(values, exact, outputs):
            return f"the folded weight would be too small for {weight.dtype.name}"
        inputs = [layer.inputs[0], layer.inputs[1]]
        if (total.scale != 1).any():
            inputs[1] = self._initializers.make(layer, 1, values, "weight")
        if bias is None and not shift.any():
            return [folded(layer, inputs, node.outputs[0])]
        if layer.op != "MatMul":
            inputs.append(self._initializers.make(layer, 2, shift, "bias"))
            return [folded(layer, inputs, node.outputs[0])]
        return self._matmul(site, inputs, shift)

    def _total(self, site: _Site, weight: gs.Constant) -> Affine | str:
        """Compose the affines of `site`, whose layer has `weight`."""
        layer, size = site.layer, channels(site.layer, weight)
        rank: int | None = len(weight.shape)
        if layer.op == "MatMul":
            shape = self._shapes.get(layer.inputs[0].name)
            rank = None if shape is None else len(shape)
        trailing = len(weight.shape) - 2
        total = Affine(np.ones(size), np.zeros(size))
        for node, tensor in site.affines:
            step = affine(node, tensor, size, trailing=trailing, rank=rank, opset=self._graph.opset)
            if isinstance(step, str):
                return step
            total = step.after(total)
        return total

    def _matmul(self, site: _Site, inputs: list[gs.Tensor], shift: Array) -> list[gs.Node]:
        """Make a MatMul with an Add behind it: the one that is there already, or a new one."""
        layer, output = site.layer, site.path[-1].outputs[0]
        product = gs.Variable(self._names.tensor(f"{output.name}.product"), output.dtype)
        matmul = like(layer, inputs, product)
        if len(site.affines) == 1:
            bias = gs.Constant(self._names.tensor(f"{layer.outputs[0].name}.bias"), shift)
            name = self._names.node(f"{layer.name or output.name}.bias")
            return [matmul, gs.Node("Add", name, {}, [product, bias], [output])]
        add, operand = site.affines[0]
        index = 1 if add.inputs[0] is operand else 0
        bias = self._initializers.make(add, index, shift, "bias")
        return [matmul, gs.Node("Add", add.name, {}, [product, bias], [output], add.domain)]


def _loses_digits(rounded: Array, exact: Array, axis: int) -> bool:
    """Tell whether a whole channel is so small that its type rounds it coarsely, or to zero."""
    others = tuple(i for i in range(exact.ndim) if i != axis)
    error = np.abs(rounded - exact).max(axis=others)
    size = np.abs(exact).max(axis=others)
    return bool((error > 2 * np.finfo(rounded.dtype).eps * size).any())


def channels(layer: gs.Node, weight: gs.Constant) -> int:
    """Return how many output channels a layer of `LAYERS` has."""
    shape = weight.shape
    if layer.op == "Conv":
        return int(shape[0])
    if layer.op == "ConvTranspose":
        return int(shape[1] * layer.attrs.get("group", 1))
    return int(shape[0] if layer.attrs.get("transB", 0) else shape[1])


def scaled_outputs(layer: gs.Node, weight: Array, scale: Array) -> Array:
    """Multiply a layer's weight by `scale`, of shape (output channels,), in float64."""
    if layer.op == "Conv":
        return weight * scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    if layer.op == "ConvTranspose":  # (Cin, Cout/group, …): each group has its own rows
        group = layer.attrs.get("group", 1)
        grouped = weight.reshape(group, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        return (grouped * scale.reshape(group, 1, -1, 1)).reshape(weight.shape)
    return weight * (scale[:, None] if layer.attrs.get("transB", 0) else scale)
