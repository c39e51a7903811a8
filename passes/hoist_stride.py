"""Hoist-stride: let the layers above a strided 1×1 convolution skip what it never reads.

Before → after, the last block of a stage of ResNet-50 v1 (s2: stride 2; s1 where nothing is said)::

    x ─┬ Conv 1×1 ─ Relu ─ Conv 3×3 ─ Relu ─ Conv 1×1 ─ Add ─ Relu ─┬ Conv 1×1 s2 → y
       └─────────────────────────────────────────────────┘          └ Conv 1×1 s2 → z
    ⇓
    x ─┬ Conv 1×1 ─ Relu ─ Conv 3×3 s2 ─ Relu ─ Conv 1×1 ─ Add ─ Relu ─┬ Conv 1×1 → y
       └ MaxPool 1×1 s2 ───────────────────────────────────┘           └ Conv 1×1 → z

Maths: let S_g take the positions 0, g, 2g, … along an axis of n, ⌈n/g⌉ of them.

- A kernel of 1 without padding reads S_s of its input, s its stride. So where all readers of a map
  read S_a, S_b, … of it, S_g is enough, g = gcd(a, b, …); a reader of S_a has a/g left to do.
- S_g commutes with what works position by position. An operand of size 1 along the axis stays.
- S_g of a convolution with stride t is the convolution with stride t·g, same pads and dilations:
  it reads the same inputs, and ⌈n/g⌉ outputs for n = ⌊m/t⌋ + 1 are ⌊m/(t·g)⌋ + 1, m being the
  padded size less the kernel's span. If its kernel is 1 it reads less itself, and so on upwards.
- A map that somebody needs whole stays whole; S_g of it is a MaxPool of kernel 1 and stride g.

One reverse sweep over the graph settles the step g of every map, so a site is the whole region of
maps that hang together, as far up as the stride can go.

Conditions: the step is above 1 only if every reader of the map is such a convolution or one of the
operators below, whose own output has a step; the map is no output of the model and no subgraph
reads it. Its producer is a Conv, an activation or other elementwise operator, arithmetic with
constants that do not vary along the strided axes, BatchNormalization or Dropout in inference mode.
Where auto_pad is SAME_*, the pads must not depend on the size: stride and dilation are 1, or the
kernel is 1 and the stride 2. Maps are float16, float32 or float64, and a Conv is among the
producers. Weights are not looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar, NamedTuple

import onnx_graphsurgeon as gs

from pwopt import shapes
from pwopt.editing import Edit
from pwopt.graph import Names, constant, is_op, is_output, like
from pwopt.model import Model
from pwopt.operators import (
    BROADCASTING,
    UNARY,
    auto_pad,
    contradicts_itself,
    is_same,
    is_training,
    shifts_by_size,
)
from pwopt.rewriting import Context, Event, Pass

Grid = tuple[int, ...]
"""The step at which a map is read along each spatial axis; empty if every position is read."""


@dataclass(frozen=True, kw_only=True)
class HoistStride(Pass):
    """Move strides of 1×1 convolutions up to the layers above.

    What those would skip is not computed in the first place.
    """

    name: ClassVar[str] = "hoist-stride"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Move strides region by region, as far up as each can go; regions share no node."""
        strided = [n for n in model.graph.nodes if is_op(n, "Conv") and _is_strided(n)]
        if not strided:
            return
        survey = _Survey(model)
        names = Names(model)
        for node, region in survey.regions(strided):
            where = node.outputs[0].name
            convs = [n for n in region if is_op(n, "Conv") and survey.grid(n.outputs[0])]
            if not convs:
                yield Event("skipped", where, survey.obstacle(region))
                continue
            new = _rebuilt(region, survey, names)
            edit = Edit(model.graph, old=region, new=new)
            data = {"convs": len(convs), "picks": len(new) - len(region)}
            yield context.settle(model, edit, where, "stride moved up", data)


class _Axis(NamedTuple):
    """A convolution along one spatial axis."""

    kernel: int
    stride: int
    dilation: int
    padded: bool

    @property
    def pointwise(self) -> bool:
        """Whether it reads no position but those of its own stride."""
        return self.kernel == 1 and not self.padded


class _Survey:
    """At which step every map of a graph is read, and what keeps it from being a larger one."""

    def __init__(self, model: Model) -> None:
        self._graph = model.graph
        self._types = shapes.infer_types(model, shapes.Binding({}, {}))  # true at every size
        self._order = {id(node): i for i, node in enumerate(model.graph.nodes)}
        self._grids: dict[int, Grid] = {}
        self._obstacles: dict[int, str] = {}
        for node in reversed(model.graph.nodes):
            self._settle(node)

    def grid(self, tensor: gs.Tensor) -> Grid:
        """Return the step at which `tensor` needs to be computed."""
        return self._grids.get(id(tensor), ())

    def need(self, node: gs.Node, index: int) -> Grid:
        """Return the step at which `node` reads its input number `index`."""
        return self._need(node, index, self.grid(node.outputs[0]) if node.outputs else ())

    def axes(self, conv: gs.Node) -> list[_Axis]:
        """Return the spatial axes of a convolution; none if its kernel is not known."""
        kernel = conv.attrs.get("kernel_shape") or (self._shape(conv.inputs[1]) or ())[2:]
        if not kernel or None in kernel:
            return []
        rank = len(kernel)
        strides = conv.attrs.get("strides") or [1] * rank
        dilations = conv.attrs.get("dilations") or [1] * rank
        pads = conv.attrs.get("pads") or [0, 0] * rank
        padded = [any(sides) for sides in zip(pads[:rank], pads[rank:], strict=True)]
        if not any(padded) and is_same(conv):
            padded = [shifts_by_size(*axis) for axis in zip(kernel, strides, strict=True)]
        sizes = zip(kernel, strides, dilations, padded, strict=True)
        return [_Axis(*axis) for axis in sizes]

    def regions(self, convs: Sequence[gs.Node]) -> list[tuple[gs.Node, list[gs.Node]]]:
        """Return each region that holds some of `convs` of kernel 1, with the first of them."""
        found: list[tuple[gs.Node, list[gs.Node]]] = []
        seen: set[int] = set()
        for conv in convs:
            if id(conv) in seen or not any(a.kernel == 1 < a.stride for a in self.axes(conv)):
                continue
            region = self._region(conv)
            seen.update(id(node) for node in region)
            found.append((conv, region))
        return found

    def obstacle(self, region: Sequence[gs.Node]) -> str:
        """Say what stops the stride at the upper end of `region`."""
        for node in region:
            for index, tensor in enumerate(node.inputs):
                if self.need(node, index) and not self.grid(tensor):
                    return self._obstacles.get(id(tensor), f"no layer computes '{tensor.name}'")
        return self._conv_refusal(region[0]) or "it is padded"

    def _region(self, node: gs.Node) -> list[gs.Node]:
        """Return `node` and all that hang together with it by maps that have a step, in order."""
        found = {id(node): node}
        queue = [node]
        while queue:
            node = queue.pop()
            for tensor in filter(self.grid, (*node.inputs, *node.outputs)):
                for other in (*tensor.inputs, *tensor.outputs):
                    if id(other) not in found:
                        found[id(other)] = other
                        queue.append(other)
        return sorted(found.values(), key=lambda other: self._order[id(other)])

    def _settle(self, node: gs.Node) -> None:
        """Settle the step of what `node` writes; all that reads it is settled already."""
        if not node.outputs:
            return
        tensor = node.outputs[0]
        uses = [
            (reader, self.need(reader, index) if id(reader) in self._order else ())
            for reader in tensor.outputs
            for index, read in enumerate(reader.inputs)
            if read is tensor
        ]
        if not any(need for _, need in uses):
            return
        whole = next((reader.op for reader, need in uses if not need), None)
        if is_output(self._graph, tensor):
            obstacle: str | None = f"'{tensor.name}' is an output of the model"
        elif whole is not None:
            obstacle = f"{whole} reads all of '{tensor.name}'"
        else:
            grid = tuple(gcd(*steps) for steps in zip(*(need for _, need in uses), strict=True))
            if max(grid) > 1:
                obstacle = self._refusal(node, grid)
            else:
                obstacle = f"the readers of '{tensor.name}' have strides without a common factor"
        if obstacle is None:
            self._grids[id(tensor)] = grid
        else:
            self._obstacles[id(tensor)] = obstacle

    def _need(self, node: gs.Node, index: int, grid: Grid) -> Grid:
        """Return the step at which `node` reads an input if its output is read at `grid`."""
        if index > 0 and not is_op(node, *BROADCASTING):
            return ()
        if is_op(node, "Conv"):
            axes = self.axes(node)
            steps = _product([axis.stride for axis in axes], grid)
            pairs = zip(axes, steps, strict=True)
            need = tuple(step if axis.pointwise else 1 for axis, step in pairs)
        elif is_op(node, *BROADCASTING):
            shape = (1,) * len(grid) + (self._shape(node.inputs[index]) or ())
            sizes = shape[len(shape) - len(grid) :]  # aligned from the right
            need = tuple(1 if size == 1 else s for size, s in zip(sizes, grid, strict=True))
        else:
            need = grid
        return need if max(need, default=1) > 1 else ()

    def _refusal(self, node: gs.Node, grid: Grid) -> str | None:
        """Say why `node` cannot compute its output at `grid` only; None if it can."""
        if len(grid) > 3:
            return "onnxruntime pools no maps of more than three spatial axes"
        if is_op(node, "Conv"):
            reason = self._conv_refusal(node)
        elif self._graph.opset < 7:
            reason = f"before opset 7, {node.op} has other rules"
        elif len(node.outputs) > 1:
            reason = f"{node.op} has a second output"
        elif is_op(node, *BROADCASTING):
            reason = self._arithmetic_refusal(node, grid)
        elif not node.attrs.get("spatial", 1):
            reason = f"{node.op} normalises every position on its own"
        elif is_op(node, "BatchNormalization", "Dropout"):
            is_free = not is_training(node, self._graph.opset)
            reason = None if is_free else f"{node.op} is in training mode"
        elif is_op(node, *UNARY):
            reason = None
        else:
            reason = f"{node.op} cannot skip positions"
        if reason:
            return reason
        maps = [t for i, t in enumerate(node.inputs) if self._need(node, i, grid) or i == 0]
        for tensor in (*maps, node.outputs[0]):
            known = self._types.get(tensor.name)
            if known is None or known.dtype is None or known.dtype.kind != "f":
                return f"'{tensor.name}' is not known to be float16, float32 or float64"
        return None

    def _conv_refusal(self, conv: gs.Node) -> str | None:
        axes = self.axes(conv)
        if not axes:
            return f"the kernel of the Conv that writes '{conv.outputs[0].name}' is not known"
        if contradicts_itself(conv):
            return "the Conv has both auto_pad and pads"
        if not is_same(conv):
            return None
        if any(axis.padded and (axis.stride > 1 or axis.dilation > 1) for axis in axes):
            return f"the pads of auto_pad={auto_pad(conv)} depend on the size"
        return None

    def _arithmetic_refusal(self, node: gs.Node, grid: Grid) -> str | None:
        for index, tensor in enumerate(node.inputs):
            shape = self._shape(tensor)
            if shape is None:
                return f"the shape of '{tensor.name}' is not known"
            if not self._need(node, index, grid):
                continue
            if constant(tensor) is not None:
                return f"the constant operand of {node.op} varies over space"
            if len(shape) != len(grid) + 2:
                return f"the operand '{tensor.name}' of {node.op} lacks the batch or channel axis"
        return None

    def _shape(self, tensor: gs.Tensor) -> shapes.Shape | None:
        known = self._types.get(tensor.name)
        return known.shape if known else None


def _rebuilt(region: Sequence[gs.Node], survey: _Survey, names: Names) -> list[gs.Node]:
    """Make the nodes of `region` anew, in order, such that its maps have the step they need."""
    nodes: list[gs.Node] = []
    maps: dict[tuple[int, Grid], gs.Tensor] = {}  # (id of the map before, step) → the one after

    def at(tensor: gs.Tensor, need: Grid) -> gs.Tensor:
        grid = survey.grid(tensor)
        source = maps[id(tensor), grid] if grid else tensor
        if need == grid:
            return source
        if (id(tensor), need) not in maps:
            maps[id(tensor), need] = pick = _variable(tensor, "pick", names)
            nodes.append(_pick(source, pick, _quotient(need, grid), names))
        return maps[id(tensor), need]

    for node in region:
        attrs, inputs, output = dict(node.attrs), list(node.inputs), node.outputs[0]
        grid = survey.grid(output)
        if is_op(node, "Conv"):
            axes = survey.axes(node)
            strides = _product([axis.stride for axis in axes], grid)
            attrs["strides"] = list(_quotient(strides, survey.grid(inputs[0])))
            if grid and is_same(node):
                attrs["pads"] = _pads(axes, attrs.pop("auto_pad"))
            inputs[0] = at(inputs[0], survey.grid(inputs[0]))
        else:
            inputs = [at(t, survey.need(node, i)) for i, t in enumerate(inputs)]
        if grid:
            maps[id(output), grid] = output = _variable(output, "strided", names)
        nodes.append(like(node, inputs, output, attrs))
    return nodes


def _pick(source: gs.Tensor, output: gs.Tensor, strides: Grid, names: Names) -> gs.Node:
    """Make the node that takes every `strides`-th position.

    In onnxruntime it costs what an AveragePool or a depthwise convolution does, and less than a
    Slice with steps, which would leave the blocked layout. In that layout −inf becomes the least
    finite number.
    """
    attrs = {"kernel_shape": [1] * len(strides), "strides": list(strides)}
    return gs.Node("MaxPool", names.node(output.name), attrs, [source], [output])


def _variable(tensor: gs.Tensor, part: str, names: Names) -> gs.Variable:
    return gs.Variable(names.tensor(f"{tensor.name}.{part}"), tensor.dtype)


def _product(steps: Sequence[int], grid: Grid) -> Grid:
    return tuple(a * b for a, b in zip(steps, grid or (1,) * len(steps), strict=True))


def _quotient(steps: Sequence[int], grid: Grid) -> Grid:
    return tuple(a // b for a, b in zip(steps, grid or (1,) * len(steps), strict=True))


def _pads(axes: Sequence[_Axis], auto_pad: str) -> list[int]:
    """Write SAME_UPPER or SAME_LOWER of stride and dilation 1 as pads: kernel − 1 in all."""
    less = [(axis.kernel - 1) // 2 for axis in axes]
    more = [axis.kernel // 2 for axis in axes]
    return less + more if auto_pad == "SAME_UPPER" else more + less


def _is_strided(conv: gs.Node) -> bool:
    return any(stride > 1 for stride in conv.attrs.get("strides", ()))
