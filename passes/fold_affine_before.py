"""Fold-affine-before: put per-channel constants in front of a layer into its weight and bias.

Before → after, with a scale s and a shift t per input channel::

    x → affine → Conv(W, b) → y                          ⇒   x → Conv(W', b') → y
    x → affine → MaxPool → Conv(W, b) → y                ⇒   x → MaxPool → Conv(W', b') → y
    x → affine → AveragePool → Flatten → Gemm(W, b) → y  ⇒   x → … → Gemm(W', b') → y

where affine is BatchNormalization, Mul, Add, Sub or Div, and the layer Conv, Gemm or MatMul.

Maths: W*(s·x + t) + b = (W·s)*x + (b + Σ W·t), summed over input channels and taps. On the way:
a maximum of s·x + t is s times the maximum plus t if s ≥ 0; a mean likewise for any s, as long as
it is one over elements of x only; Flatten makes each channel H·W columns of a Gemm.

Conditions: constant weight and bias; the other operand is constant, if need be behind casts and
reshapes, and varies along axis 1 only; BatchNormalization is in inference mode. Nobody reads the
affine's output but such layers, through pools, Flatten, Reshape to rows, Identity and Dropout, and
each takes it in full. With a shift, a Conv must be unpadded (its padding has none of it), an
AveragePool must not count its padding, and MatMul, which has no bias, is no taker.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.affine import Affine, affine
from pwopt.constants import Array, constant_value
from pwopt.editing import Edit
from pwopt.graph import Names, is_op, is_output, like
from pwopt.model import Model
from pwopt.operators import ARITHMETIC, auto_pad, float_weight, gives_on, is_one_output, is_same
from pwopt.rewriting import Context, Event, Pass

from ._folding import Initializers, folded, known_shapes, layer_bias

MAXIMA = ("MaxPool", "GlobalMaxPool")

MEANS = ("AveragePool", "GlobalAveragePool")


@dataclass(frozen=True, kw_only=True)
class FoldAffineBefore(Pass):
    """Fold per-channel constants into the layers behind them."""

    name: ClassVar[str] = "fold-affine-before"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Fold against the order of the graph, so that a chain folds into its layer one by one."""
        folder = _Folder(model)
        for node in reversed(list(model.graph.nodes)):
            tensor = _operand(node)
            if tensor is None:
                continue
            region = _Region()
            folder.explore(node.outputs[0], region)
            if not region.layers:
                continue
            where = node.outputs[0].name
            new = folder.fold(node, tensor, region)
            if isinstance(new, str):
                yield Event("skipped", where, new)
                continue
            edit = Edit(model.graph, old=[node, *region.between, *region.layers], new=new)
            data = {"op": node.op, "layers": len(region.layers)}
            yield context.settle(model, edit, where, f"{node.op} folded", data, free=True)


def _operand(node: gs.Node) -> gs.Tensor | None:
    """Return what `node` does its arithmetic on; None if there is nothing constant about it."""
    if is_op(node, "BatchNormalization"):
        return node.inputs[0]
    if not is_op(node, *ARITHMETIC):
        return None
    open_ = [tensor for tensor in node.inputs if constant_value(tensor) is None]
    return open_[0] if len(open_) == 1 else None


@dataclass(slots=True)
class _Region:
    """What reads an affine's output: layers, what lies on the way to them, and who else."""

    layers: list[gs.Node] = field(default_factory=list)
    between: list[gs.Node] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Why the affine cannot go."""


class _Folder:
    """Finds the region behind an affine, and makes the nodes that take its place."""

    def __init__(self, model: Model) -> None:
        self._graph = model.graph
        self._names = Names(model)
        self._shapes = known_shapes(model)
        self._initializers = Initializers(self._graph, self._names)

    def explore(self, tensor: gs.Tensor, region: _Region) -> None:
        """Collect into `region` who reads `tensor`, through all that an affine can pass."""
        if is_output(self._graph, tensor):
            region.others.append("its output is an output of the model")
        for node in {id(node): node for node in tensor.outputs}.values():
            if any(other is tensor for other in node.inputs[1:]):
                region.others.append(f"{node.op} reads its output not as its first input")
            elif not any(other is node for other in self._graph.nodes):
                region.others.append("its output is read in a subgraph")
            elif self._is_layer(node):
                region.layers.append(node)
            elif self._is_passed(node):
                region.between.append(node)
                self.explore(node.outputs[0], region)
            else:
                region.others.append(f"{node.op} reads its output too")

    def _is_layer(self, node: gs.Node) -> bool:
        return is_op(node, "Conv", "Gemm") or (
            is_op(node, "MatMul") and len(self._shapes.get(node.inputs[0].name, ())) == 2
        )

    def _is_passed(self, node: gs.Node) -> bool:
        """Tell whether channels stay channels, or become columns side by side, through `node`."""
        if is_op(node, *MAXIMA, *MEANS):
            return is_one_output(self._graph, node)
        if is_op(node, "Flatten"):
            return bool(node.attrs.get("axis", 1) == 1)
        if is_op(node, "Reshape"):
            return self._makes_rows(node)
        return gives_on(self._graph, node)

    def _makes_rows(self, node: gs.Node) -> bool:
        """Tell whether a Reshape does what Flatten does: [N, C, …] → [N, C·…]."""
        target = constant_value(node.inputs[1]) if len(node.inputs) > 1 else None
        if target is None or list(target.shape) != [2]:
            return False
        rows, columns = target.values.tolist()
        if rows == 0:
            return not node.attrs.get("allowzero", 0)
        shape = self._shapes.get(node.inputs[0].name, ())
        sizes = [size for size in shape[1:] if size is not None]
        known = bool(sizes) and len(sizes) == len(shape) - 1
        return bool(shape) and (rows == shape[0] or (known and columns == prod(sizes)))

    @np.errstate(over="ignore", invalid="ignore")  # looked for in `_taken`
    def fold(self, node: gs.Node, tensor: gs.Tensor, region: _Region) -> list[gs.Node] | str:
        """Fold `node`, which reads `tensor`, into `region`; return why if that is not possible."""
        if region.others:
            return region.others[0]
        total = self._affine(node, tensor)
        if isinstance(total, str):
            return total
        for passed in region.between:
            obstacle = _obstacle(passed, total)
            if obstacle:
                return obstacle
        inputs = {}
        for layer in region.layers:
            taken = self._taken(layer, total)
            if isinstance(taken, str):
                return taken
            inputs[id(layer)] = taken

        region_ids = {id(n) for n in (*region.between, *region.layers)}
        source = {id(node.outputs[0]): tensor}
        new = []
        for old in [n for n in self._graph.nodes if id(n) in region_ids]:
            data, output = source[id(old.inputs[0])], old.outputs[0]
            if id(old) in inputs:
                new.append(folded(old, [data, *inputs[id(old)]], output))
                continue
            plain = gs.Variable(self._names.tensor(f"{output.name}.plain"), output.dtype)
            if output.name in self._shapes:
                self._shapes[plain.name] = self._shapes[output.name]
            source[id(output)] = plain
            new.append(like(old, [data, *old.inputs[1:]], plain))
        return new

    def _affine(self, node: gs.Node, tensor: gs.Tensor) -> Affine | str:
        if node.op != "BatchNormalization" and self._graph.opset < 7:
            return "before opset 7, operands are broadcast by other rules"
        shape = self._shapes.get(tensor.name, ())
        channels, rank = (shape[1] if len(shape) > 1 else None), len(shape)
        if node.op == "BatchNormalization":  # its channels are always axis 1
            scale = constant_value(node.inputs[1])
            channels, rank = (scale.shape[0] if scale else None), 2
            if scale is None:
                return "BatchNormalization's parameters are not constant"
        if channels is None:
            return "the channels of its input are not known"
        return affine(node, tensor, channels, trailing=rank - 2, rank=rank, opset=self._graph.opset)

    def _taken(self, layer: gs.Node, total: Affine) -> list[gs.Tensor] | str:
        """Return weight and bias of `layer` with `total` folded in, or why that cannot be."""
        weight = float_weight(layer, computed=True)
        if isinstance(weight, str):
            return weight
        if layer.attrs.get("transA", 0):
            return "the Gemm transposes its input"
        matrix = _as_rows(layer, weight.values)
        group, _, inner, _ = matrix.shape
        repeat, rest = divmod(group * inner, len(total.scale))
        if rest:
            return f"the {layer.op} reads {group * inner} channels, not {len(total.scale)}"
        scale, shift = (np.repeat(v, repeat).reshape(group, 1, inner, 1) for v in total)
        tensors: list[gs.Tensor] = list(layer.inputs[1:])
        if (scale != 1).any():
            values = (matrix * scale).astype(weight.dtype)
            if not np.isfinite(values).all():
                return f"the folded weight would not be finite in {weight.dtype.name}"
            values = _like_weight(layer, values, weight.shape)
            tensors[0] = self._initializers.make(layer, 1, values, "weight")
        if shift.any():
            if layer.op == "MatMul":
                return "MatMul has no bias to take the shift"
            if layer.op == "Conv" and _is_padded(layer, weight.shape):
                return "the Conv's padding would have to hold the shift"
            outputs = matrix.shape[0] * matrix.shape[1]
            bias = layer_bias(layer, outputs)
            if isinstance(bias, str):
                return bias
            added = layer.attrs.get("alpha", 1.0) * (matrix * shift).sum((2, 3)).reshape(-1)
            sums = (added if bias is None else bias + added).astype(weight.dtype)
            if not np.isfinite(sums).all():
                return f"the folded bias would not be finite in {weight.dtype.name}"
            tensors[1:] = [self._initializers.make(layer, 2, sums, "bias")]
        return tensors


def _obstacle(node: gs.Node, total: Affine) -> str | None:
    """Say why `total` cannot be done behind `node` as well as in front of it, if so."""
    padded = any(node.attrs.get("pads", ())) or is_same(node)
    if is_op(node, *MAXIMA):
        if not (total.scale >= 0).all():
            return f"{node.op} would take the minimum where the scale is negative"
        if padded and max(node.attrs.get("dilations", [1])) > 1:
            return "windows of a dilated and padded MaxPool may hold nothing but padding"
    if is_op(node, "AveragePool") and total.shift.any():
        if padded and node.attrs.get("count_include_pad", 0):
            return "AveragePool's padding counts, and would have to hold the shift"
        if node.attrs.get("ceil_mode", 0):
            return "AveragePool in ceil_mode may count what lies beyond its input"
    return None


def _is_padded(conv: gs.Node, weight: tuple[int, ...]) -> bool:
    if is_same(conv):
        return any(size > 1 for size in weight[2:])
    return auto_pad(conv) == "NOTSET" and any(conv.attrs.get("pads", ()))


def _as_rows(layer: gs.Node, weight: Array) -> Array:
    """View a weight as (groups, outputs per group, inputs per group, taps)."""
    if layer.op != "Conv":
        return (weight if layer.attrs.get("transB", 0) else weight.T)[None, :, :, None]
    group = layer.attrs.get("group", 1)
    return weight.reshape(group, -1, weight.shape[1], int(np.prod(weight.shape[2:])))


def _like_weight(layer: gs.Node, rows: Array, shape: tuple[int, ...]) -> Array:
    """Give what `_as_rows` made the shape of the weight again."""
    if layer.op != "Conv" and not layer.attrs.get("transB", 0):
        return np.ascontiguousarray(rows[0, :, :, 0].T)
    return rows.reshape(shape)
