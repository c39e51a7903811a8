"""Pool-before-pointwise: average over space first, then run the 1×1 convolution.

Before → after, for a 1×1 convolution with weight W and bias b::

    x → Conv 1×1 (W, b) → AveragePool → y          ⇒   x → AveragePool → Conv 1×1 (W, b) → y
    x → Conv 1×1 (W, b) → GlobalAveragePool → y    ⇒   x → GlobalAveragePool → Conv 1×1 → y
    x → Conv 1×1 (W, b) → ReduceMean → y           ⇒   x → ReduceMean → Conv 1×1 [→ Squeeze] → y

Maths: a pool takes the same weighted sum Σ_q a_pq x(q) in every channel, a 1×1 convolution the same
combination of channels at every position, and the two sums may be swapped::

    Σ_q a_pq (W x(q) + b) = W (Σ_q a_pq x(q)) + b Σ_q a_pq

The convolution then runs on the pooled positions only. Without a bias this always holds. With one
it holds where the weights a_pq of every window sum to 1, that is, where an average counts only
positions of the map, and at least one of them.

Conditions: Conv with a kernel and strides of 1, no pads, any groups, and a constant weight; nobody
else sees its output; the pool leaves fewer positions than it reads. ReduceMean goes over all
spatial axes and no other; where it drops them, a Squeeze does so behind the convolution. Before an
AveragePool (ONNX operators, versions 1 to 22), a bias other than zero needs more:

- with count_include_pad, neither padding nor ceil_mode, whose windows count positions without bias;
- else no window that misses the map: no dilations where there is padding, and with ceil_mode
  stride + end pad ≤ extent of the kernel.

MaxPool is not linear and never moves. A BatchNormalization in between is left to fold-affine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.constants import Array
from pwopt.editing import Edit
from pwopt.graph import (
    Names,
    constant,
    is_only_reader,
    is_op,
    known_constant,
    like,
    optional_input,
    producer,
)
from pwopt.model import Model
from pwopt.operators import float_weight, is_over_space, is_pointwise, is_same, reduced_axes
from pwopt.rewriting import Context, Event, Pass


@dataclass(frozen=True, kw_only=True)
class PoolBeforePointwise(Pass):
    """Average over space before a 1×1 Conv instead of after it."""

    name: ClassVar[str] = "pool-before-pointwise"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Move every pool up as far as it goes, in the order of the graph."""
        names = Names(model)
        for node in list(model.graph.nodes):
            if is_op(node, "AveragePool", "GlobalAveragePool", "ReduceMean"):
                yield from _move_up(model, context, node, names)


def _move_up(model: Model, context: Context, pool: gs.Node, names: Names) -> Iterator[Event]:
    """Move `pool` in front of one 1×1 Conv after the other."""
    output = pool.outputs[0]
    while (conv := _pointwise_above(pool)) is not None:
        reason = _obstacle(model.graph, conv, pool)
        if reason:
            yield Event("skipped", output.name, reason)
            return
        new = _swapped(conv, pool, model.graph.opset, names)
        edit = Edit(model.graph, old=[conv, pool], new=new)
        reason = f"{pool.op} moved in front of the 1×1 Conv"
        event = context.settle(model, edit, output.name, reason, {"op": pool.op})
        yield event
        if event.kind == "skipped":
            return
        pool = new[0]


def _pointwise_above(pool: gs.Node) -> gs.Node | None:
    """Return the 1×1 Conv that `pool` reads, directly or with one node in between."""
    above = producer(pool.inputs[0])
    if above is not None and not is_pointwise(above) and above.inputs:
        above = producer(above.inputs[0])
    return above if above is not None and is_pointwise(above) else None


def _obstacle(graph: gs.Graph, conv: gs.Node, pool: gs.Node) -> str | None:
    """Say why `pool` cannot move in front of `conv`; None if it can."""
    between = pool.inputs[0].inputs[0]
    if between is not conv:
        remedy = "; fold-affine removes it" if is_op(between, "BatchNormalization") else ""
        return f"{between.op} stands between the Conv and the pool{remedy}"
    if not is_only_reader(graph, pool, conv.outputs[0]):
        return "the Conv's output is read elsewhere too"
    weight = float_weight(conv)
    if isinstance(weight, str):
        return weight
    if any(stride != 1 for stride in conv.attrs.get("strides", ())):
        return "the Conv has a stride"
    if any(conv.attrs.get("pads", ())):  # auto_pad adds none to a kernel of 1
        return "the Conv pads its input"
    if pool.op == "ReduceMean":
        return _reduction_obstacle(pool, len(weight.shape))
    if pool.op == "AveragePool":
        return _window_obstacle(_Windows(pool), biased=_is_biased(conv))
    return None


def _reduction_obstacle(reduction: gs.Node, rank: int) -> str | None:
    """Say why a ReduceMean of a tensor with `rank` axes is no pool over space."""
    if reduced_axes(reduction) is None:
        return "the axes of ReduceMean are not constant"
    if not is_over_space(reduction, rank):
        return "ReduceMean does not go over exactly the spatial axes"
    return None


class _Windows:
    """The windows of an AveragePool, axis by axis."""

    def __init__(self, pool: gs.Node) -> None:
        kernel = pool.attrs["kernel_shape"]
        ones = [1] * len(kernel)
        dilations = pool.attrs.get("dilations", ones)
        pads = pool.attrs.get("pads", [0] * 2 * len(kernel))
        self.strides = pool.attrs.get("strides", ones)
        self.extents = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        self.end_pads = pads[len(kernel) :]
        self.pads = [a + b for a, b in zip(pads[: len(kernel)], self.end_pads, strict=True)]
        # There are then ⌈size / stride⌉ windows, and padding as they need it.
        self.same = is_same(pool)
        self.padded = self.same or any(pads)
        self.dilated = dilations != ones
        self.ceil = bool(pool.attrs.get("ceil_mode", 0))
        self.counts_padding = bool(pool.attrs.get("count_include_pad", 0))

    @property
    def fewer_than_positions(self) -> bool:
        """Whether there are fewer windows than positions, whatever the size of the map.

        There are (size + pads − extent) / stride + 1 of them along an axis.
        """
        spare = [
            0 if self.same else extent - 1 - pads
            for extent, pads in zip(self.extents, self.pads, strict=True)
        ]
        return min(spare) >= 0 and max(*spare, *(stride - 1 for stride in self.strides)) > 0

    @property
    def all_meet_the_map(self) -> bool:
        """Whether every window holds at least one position of the map.

        The last one starts at most stride − 1 (with ceil_mode) behind size + end pad − extent.
        """
        if self.dilated and self.padded:
            return False
        reach = zip(self.strides, self.end_pads, self.extents, strict=True)
        return not self.ceil or all(stride + pad <= extent for stride, pad, extent in reach)


def _window_obstacle(windows: _Windows, *, biased: bool) -> str | None:
    if not windows.fewer_than_positions:
        return "AveragePool leaves as many positions as before"
    if not biased:
        return None
    if windows.counts_padding and (windows.padded or windows.ceil):
        return "AveragePool counts padding, which has none of the Conv's bias"
    if not windows.all_meet_the_map:
        return "a window of AveragePool may miss the map, where there is none of the Conv's bias"
    return None


def _is_biased(conv: gs.Node) -> bool:
    given = optional_input(conv, 2)
    bias = None if given is None else constant(given)
    return given is not None and (bias is None or bool(np.any(bias.values)))


def _swapped(conv: gs.Node, pool: gs.Node, opset: int, names: Names) -> list[gs.Node]:
    """Make the pool, the Conv behind it, and a Squeeze where the pool drops its axes."""
    output = pool.outputs[0]
    weight = known_constant(conv.inputs[1])

    def inner(part: str) -> gs.Variable:
        return gs.Variable(names.tensor(f"{output.name}.{part}"), weight.dtype)

    drops = pool.op == "ReduceMean" and not pool.attrs.get("keepdims", 1)
    pool_attrs = {**pool.attrs, "keepdims": 1} if drops else pool.attrs
    pooled, mixed = inner("pool"), inner("conv") if drops else output
    new = [
        like(pool, [conv.inputs[0], *pool.inputs[1:]], pooled, pool_attrs),
        like(conv, [pooled, *conv.inputs[1:]], mixed),
    ]
    if drops:
        axes = np.arange(2, len(weight.shape))
        new.append(_squeeze(mixed, output, axes, opset, names))
    return new


def _squeeze(read: gs.Tensor, write: gs.Tensor, axes: Array, opset: int, names: Names) -> gs.Node:
    """Make a Squeeze; its axes are an input from opset 13 on."""
    name = names.node(f"{write.name}.squeeze")
    if opset < 13:
        return gs.Node("Squeeze", name, {"axes": axes.tolist()}, [read], [write])
    initializer = gs.Constant(names.tensor(f"{write.name}.axes"), axes.astype(np.int64))
    return gs.Node("Squeeze", name, {}, [read, initializer], [write])
