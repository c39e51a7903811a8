"""Fold-pad: let convolutions and pools do the padding that a Pad does in front of them.

Before → after::

    x → Pad(p) → Conv(pads=q) → y           ⇒   x → Conv(pads=p+q) → y
    x → Pad(p) → AveragePool(pads=q) → y    ⇒   x → AveragePool(pads=p+q, count_include_pad=1) → y
    x → Pad(p) → MaxPool(pads=q) → y        ⇒   x → MaxPool(pads=p+q) → y

Maths: a Conv pads with zeros, so zeros in front of it are more of the same. AveragePool sums the
zeros of Pad and counts them, which it does by itself with count_include_pad=1, as long as its own
padding is none or counts as well. MaxPool pads with what no maximum takes: so does a Pad with −∞,
or with at most 0 around what is never negative (behind Relu, Sigmoid, or Clip from 0 on), since
each window holds an element of x if padding is narrower than the window.

Conditions: Pad is constant in mode, amounts and fill, pads spatial axes only and crops none; only
such layers read it, and each takes it; their auto_pad is NOTSET or VALID. Pools have no ceil_mode,
whose last windows depend on whose padding they start in, and no dilations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.constants import constant_value
from pwopt.editing import Edit
from pwopt.graph import is_op, is_output, like, optional_input, producer
from pwopt.model import Model
from pwopt.operators import auto_pad, is_one_output, is_same
from pwopt.rewriting import Context, Event, Pass

TAKERS = ("Conv", "AveragePool", "MaxPool")

Pads = list[int]
"""Amounts in front of every spatial axis, then behind every one, as Conv has them."""

Attributes = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FoldPad(Pass):
    """Fold Pad into the padding of the Conv or pool behind it."""

    name: ClassVar[str] = "fold-pad"
    exact: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Fold against the order of the graph, so that a Pad behind a Pad goes first."""
        for node in reversed(list(model.graph.nodes)):
            readers = list(node.outputs[0].outputs) if is_op(node, "Pad") else []
            if not any(is_op(reader, *TAKERS) for reader in readers):
                continue
            where = node.outputs[0].name
            attrs = _fold(model.graph, node, readers)
            if isinstance(attrs, str):
                yield Event("skipped", where, attrs)
                continue
            readers = [other for other in model.graph.nodes if id(other) in attrs]  # in order
            new = [
                like(
                    reader,
                    [node.inputs[0], *reader.inputs[1:]],
                    reader.outputs[0],
                    attrs[id(reader)],
                )
                for reader in readers
            ]
            edit = Edit(model.graph, old=[node, *readers], new=new)
            yield context.settle(model, edit, where, "Pad folded", {"layers": len(new)}, free=True)


def _fold(graph: gs.Graph, pad: gs.Node, readers: Sequence[gs.Node]) -> dict[int, Attributes] | str:
    """Return each reader's id → its attributes with `pad` folded in, or why that cannot be."""
    if is_output(graph, pad.outputs[0]):
        return "its output is an output of the model"
    if pad.attrs.get("mode", "constant") != "constant":
        return f"Pad is in mode {pad.attrs['mode']}"
    fill = _fill(pad)
    if fill is None:
        return "Pad's fill is not a constant"
    attrs = {}
    for reader in readers:
        if not any(reader is node for node in graph.nodes):
            return "its output is read in a subgraph"
        if not is_op(reader, *TAKERS):
            return f"{reader.op} reads its output too"
        if any(tensor is pad.outputs[0] for tensor in reader.inputs[1:]):
            return f"{reader.op} reads its output as a weight"
        if is_same(reader):
            return f"the {reader.op} pads by itself ({auto_pad(reader)})"
        kernel = reader.attrs.get("kernel_shape") or (reader.inputs[1].shape or ())[2:]
        if not kernel:
            return f"the {reader.op}'s kernel size is not known"
        amounts = _amounts(pad, len(kernel))
        if isinstance(amounts, str):
            return amounts
        own = _own_pads(reader, len(kernel))
        total = [a + b for a, b in zip(amounts, own, strict=True)]
        reason = _reason(graph, reader, pad, fill, amounts, own)
        if reason:
            return reason
        attrs[id(reader)] = {k: v for k, v in reader.attrs.items() if k != "auto_pad"}
        attrs[id(reader)]["pads"] = total
        if reader.op == "AveragePool" and any(amounts):
            attrs[id(reader)]["count_include_pad"] = 1
    return attrs


def _reason(
    graph: gs.Graph, reader: gs.Node, pad: gs.Node, fill: float, amounts: Pads, own: Pads
) -> str | None:
    """Say why `reader` cannot pad by `amounts` more than its `own`, if it cannot."""
    if reader.op == "Conv":
        return None if fill == 0 else f"Pad fills with {fill:g}, but Conv with 0"
    if not is_one_output(graph, reader):
        return "MaxPool gives out indices, which count the padding"
    if reader.attrs.get("ceil_mode", 0):
        return f"the {reader.op} is in ceil_mode"
    if max(reader.attrs.get("dilations", [1])) > 1:
        return f"the {reader.op} is dilated"
    kernel = reader.attrs["kernel_shape"]
    if any(a + b >= size for a, b, size in zip(amounts, own, [*kernel, *kernel], strict=True)):
        return f"the padding would be as wide as the {reader.op}'s window"
    if reader.op == "MaxPool":
        if fill == -np.inf or (fill <= 0 and _is_never_negative(pad.inputs[0], graph.opset)):
            return None
        return f"Pad fills with {fill:g}, which a MaxPool could take for the maximum"
    if fill != 0:
        return f"Pad fills with {fill:g}, but AveragePool with 0"
    if any(own) and not reader.attrs.get("count_include_pad", 0):
        return "the AveragePool counts Pad's zeros, but not its own"
    return "before opset 7, AveragePool counts no padding" if graph.opset < 7 else None


def _fill(pad: gs.Node) -> float | None:
    """Return the value that `pad` fills with: an attribute, from opset 11 on an input."""
    given = optional_input(pad, 2)
    if given is None:
        return float(pad.attrs.get("value", 0))
    value = constant_value(given)
    return None if value is None else float(value.values.item())


def _amounts(pad: gs.Node, spatial: int) -> Pads | str:
    """Return what `pad` adds to the `spatial` axes behind the first two, or why not that."""
    amounts = pad.attrs.get("pads", pad.attrs.get("paddings"))
    axes: list[int] | None = None
    if len(pad.inputs) > 1:
        given = constant_value(pad.inputs[1])
        amounts = None if given is None else given.values.tolist()
    if (which := optional_input(pad, 3)) is not None:
        listed = constant_value(which)
        if listed is None:
            return "Pad's axes are not constant"
        axes = [axis % (spatial + 2) for axis in listed.values.tolist()]
    if amounts is None:
        return "Pad's amounts are not constant"
    half = len(amounts) // 2
    sides = [[0] * (spatial + 2), [0] * (spatial + 2)]
    for side, values in zip(sides, (amounts[:half], amounts[half:]), strict=True):
        for axis, value in zip(range(half) if axes is None else axes, values, strict=True):
            side[axis] = value
    if any(value for side in sides for value in side[:2]):
        return "Pad pads more than the spatial axes"
    if min(amounts) < 0:
        return "Pad crops"
    return sides[0][2:] + sides[1][2:]


def _own_pads(reader: gs.Node, spatial: int) -> Pads:
    if auto_pad(reader) == "VALID":
        return [0] * 2 * spatial
    return list(reader.attrs.get("pads", [0] * 2 * spatial))


def _is_never_negative(tensor: gs.Tensor, opset: int) -> bool:
    node = producer(tensor)
    if node is None or not is_op(node, "Relu", "Sigmoid", "Clip"):
        return False
    if node.op != "Clip":
        return True
    if opset < 11:
        return bool(node.attrs.get("min", -np.inf) >= 0)
    least = constant_value(node.inputs[1]) if len(node.inputs) > 1 else None
    return least is not None and bool(least.values.item() >= 0)
