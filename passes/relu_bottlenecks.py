"""Relu-bottlenecks: put a Relu into linear bottlenecks, to be learned from there.

Before → after, for convolutions with biases a and b, and a shift s for each channel between them::

    input    x → Conv 1×1, a → Conv k×k, b, pads p → y
          ⇒  x → Conv 1×1, a + s, pads p → Relu → Conv k×k, b', no pads → y
    output   x → Conv k×k, a, pads p → Conv 1×1, b → y
          ⇒  x → Conv k×k, a + s, pads p → Relu → Conv 1×1, b' → y
    both     x → Conv 1×1, pads p → Relu → Conv k×k, no pads → Relu → Conv 1×1 → y

A Relu stands behind each part but the last, as Network in Network (Lin, Chen, Yan 2013) and
Inception (Szegedy et al. 2014) have one behind every convolution. The last part has the place of
the layer that was split, and whatever follows that.

Maths: s = max(0, 3σ − μ), μ and σ being mean and deviation of the channel, so that nearly all of
it passes the Relu. b' = b − Σ_t W_t s, over the taps t of the second convolution, takes off again
what s added. μ and σ are those on samples; without samples those that inputs of mean 0 and
deviation 1, independent of each other, would give: a, and the norm of the channel's weights. So
the start is the linear bottleneck, but for what lies below μ − 3σ.

Padding: behind the Relu s stands for 0, and that is what the padding of the k×k would have to
hold. So the 1×1 pads, whose output is a + s there; a is 0 where a bottleneck was made. At a stride
of its own it pads so many times p. Padding left at the k×k would lack Σ W_t s over the padded taps:
on the demo network, input side at rank 16, top-1 would begin at 24.2 %, where it begins at 93.2 %
now (linear: 93.1 %). The price is a 1×1 on a larger map: 0 to 3 % of a bottleneck's time on maps
of 14×14 and more, 20 to 35 % on 7×7.

Conditions: two Conv of group 1 with constant weights and biases, one directly behind the other,
and nobody else reads what lies between. The first is a 1×1 that narrows, or the second one that
widens; linear bottlenecks that a network came with count as well. Where the second is padded, the
first is a 1×1 without a bias, and auto_pad=SAME, which depends on the size then, has no stride.
What a Relu was put into is no such pair any more, so a second run changes nothing; nor is it split
again, see `pwopt.candidates.has_bottleneck`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from pwopt import runtime
from pwopt.calibration import calibration_samples, gather
from pwopt.calibration.augment import to_fit
from pwopt.candidates import RELU
from pwopt.editing import Edit
from pwopt.graph import Names, is_only_reader, is_op, like, producer
from pwopt.linear import Linear, linear
from pwopt.model import Model
from pwopt.operators import is_same
from pwopt.rewriting import Context, Event, Pass

from ._folding import Initializers

Array = npt.NDArray[Any]

DEPTH = 3
"""Deviations below a channel's mean from which on the Relu cuts."""


@dataclass(frozen=True, kw_only=True)
class ReluBottlenecks(Pass):
    """Put a Relu into linear bottlenecks, which changes little, and lets them learn more."""

    name: ClassVar[str] = "relu-bottlenecks"
    exact: ClassVar[bool] = False

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Put a Relu between every two convolutions for which `_pair` finds no reason not to.

        Raises:
            ModelError: a weight or an activation holds NaN or infinite values.
            DataError: samples that are too few, or do not fit.
        """
        graph = model.graph
        found = [(node.outputs[0], pair) for node in graph.nodes if (pair := _pair(graph, node))]
        depths = _depths(model, [p.first for _, p in found if isinstance(p, _Pair)], context)
        names = Names(model)
        initializers = Initializers(graph, names)
        for output, pair in found:
            if isinstance(pair, str):
                yield Event("skipped", output.name, pair)
                continue
            # The nodes there are now: the second of a pair may be the first of the next.
            second = replace(pair.second, node=producer(output))
            first = replace(pair.first, node=producer(second.node.inputs[0]))
            yield _activate(graph, first, second, depths[first.where], names, initializers)


class _Pair(NamedTuple):
    """Two convolutions, the second right behind the first."""

    first: Linear
    second: Linear


def _pair(graph: gs.Graph, node: gs.Node) -> _Pair | str | None:
    """See `node` as the second of a pair, or say why it is none; None where it follows no layer."""
    if not is_op(node, "Conv", "Gemm", "MatMul"):
        return None
    between = node.inputs[0]
    before = producer(between)
    if before is None or not is_op(before, "Conv", "Gemm", "MatMul"):
        return None
    if node.op != "Conv" or before.op != "Conv":
        return f"only between two Conv, not {before.op} and {node.op}"
    if not is_only_reader(graph, node, between):
        return "what lies between is read elsewhere too"
    first, second = linear(before, {}), linear(node, {})
    if isinstance(first, str):
        return f"first Conv: {first}"
    if isinstance(second, str):
        return f"second Conv: {second}"
    narrows = first.is_pointwise and first.size.out_channels < first.size.in_channels
    widens = second.is_pointwise and second.size.out_channels > second.size.in_channels
    if not narrows and not widens:
        return "neither a narrowing 1×1 in front nor a widening one behind"
    return _Pair(first, second)


def _depths(model: Model, firsts: Sequence[Linear], context: Context) -> dict[str, Array]:
    """Return how far below 0 the channels that layers write reach: layer → (Cout,), float64."""
    if context.samples is None or not firsts:
        return {first.where: DEPTH * _norms(first) - first.bias() for first in firsts}
    samples = to_fit(calibration_samples(context.samples, context.most_samples), context.seed)
    gathered = gather(model, firsts, samples, threads=runtime.cores(), progress=context.progress)
    outputs = {where: statistics.outputs for where, statistics in gathered.items()}
    return {w: DEPTH * np.sqrt(o.covariance.diagonal()) - o.mean for w, o in outputs.items()}


def _norms(layer: Linear) -> Array:
    """Return the norm of the weights of each channel that a layer writes: (Cout,)."""
    weight = layer.weight().astype(np.float64)
    norms: Array = np.sqrt((weight**2).reshape(len(weight), -1).sum(axis=1))
    return norms


@np.errstate(over="ignore")  # looked for
def _activate(
    graph: gs.Graph,
    first: Linear,
    second: Linear,
    depth: Array,
    names: Names,
    initializers: Initializers,
) -> Event:
    """Put a Relu between two convolutions, the channels in between being raised by `depth`."""
    between, output = first.node.outputs[0], second.node.outputs[0]
    obstacle = _obstacle(first, second)
    if obstacle:
        return Event("skipped", output.name, obstacle)
    bias = first.bias()
    raised = (bias + np.maximum(depth, 0)).astype(bias.dtype)
    shift = raised.astype(np.float64) - bias  # what rounding has left of it
    weight = second.weight().astype(np.float64)
    added = weight.reshape(*weight.shape[:2], -1).sum(axis=2) @ shift
    lowered = (second.bias() - added).astype(bias.dtype)
    if not (np.isfinite(raised).all() and np.isfinite(lowered).all()):
        return Event("skipped", output.name, f"the biases would not be finite in {bias.dtype}")
    front, behind = dict(first.node.attrs), dict(second.node.attrs)
    pads = _pads(second)
    if any(pads):
        front = _repadded(front, _pads(first) + np.tile(_strides(first), 2) * pads)
        behind = _repadded(behind, np.zeros_like(pads))
    higher = gs.Variable(names.tensor(f"{between.name}.bottleneck"), between.dtype)
    cut = gs.Variable(names.tensor(f"{between.name}{RELU}"), between.dtype)
    first_bias = initializers.make(first.node, 2, raised, "bias")
    second_bias = initializers.make(second.node, 2, lowered, "bias")
    new = [
        like(first.node, [*first.node.inputs[:2], first_bias], higher, front),
        gs.Node("Relu", names.node(f"{first.name}{RELU}"), {}, [higher], [cut]),
        like(second.node, [cut, second.node.inputs[1], second_bias], output, behind),
    ]
    Edit(graph, [first.node, second.node], new).settle()
    return Event("rewrote", output.name, f"Relu on {len(shift)} channels", {"channels": len(shift)})


def _obstacle(first: Linear, second: Linear) -> str | None:
    """Say why the padding of the second convolution cannot move to the first, if so."""
    if not _pads(second).any() and (second.is_pointwise or not is_same(second.node)):
        return None
    if not first.is_pointwise:
        return "the second Conv is padded, and the first is not 1×1"
    if first.bias().any():
        return "the second Conv is padded, and the first has a bias"
    if any(is_same(layer.node) and _strides(layer).max() > 1 for layer in (first, second)):
        return "the padding of auto_pad depends on the size where there is a stride"
    return None


def _strides(layer: Linear) -> Array:
    return np.array(layer.window([1] * len(layer.size.kernel)).strides)


def _pads(layer: Linear) -> Array:
    """Return begins and ends; those of auto_pad, at a stride of 1, are the same for all sizes."""
    return np.array(layer.window([1] * len(layer.size.kernel)).pads)


def _repadded(attrs: dict[str, Any], pads: Array) -> dict[str, Any]:
    kept = {name: value for name, value in attrs.items() if name != "auto_pad"}
    return kept | {"pads": pads.tolist()}
