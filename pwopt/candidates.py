"""Which convolutions a 1×1 bottleneck makes cheaper, and in which form.

`analyze` and the bottleneck pass ask the same function, `candidate`, so that what is proposed is
what is done.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import onnx_graphsurgeon as gs

from pwopt import cost, lowrank
from pwopt.cost import ConvSize, Sides, Split
from pwopt.errors import ModelError, SpecError
from pwopt.graph import constant, is_op, label, producer, shape_of
from pwopt.linear import conv_size, grouped, wrong_type
from pwopt.model import Model
from pwopt.shapes import Shape

Choice = Literal["auto", "input", "output", "both"]
Energy = Callable[[Sides, int], float]

MIN_CHANNELS = 32
"""Input channels from which a convolution counts as wide."""

LEAST_SPEEDUP = 1.1
"""A split at a given rank must promise this much, or the layer stays as it is."""

RELU = ".bottleneck.relu"
"""What the name of a Relu within a bottleneck ends in, and that of what it writes; a number may
follow. Nothing else tells it from a network's own, whose neighbour may well be split."""

AIM = 2.0
"""Where no rank is given, the largest rank that makes the layer this many times faster is it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A split that makes a convolution cheaper.

    `macs` and `params` are those after it, the MACs for an output of 28 positions along each axis
    where the layer's own is not known. `kept_energy` is the share of the weight's squared
    Frobenius norm that the split keeps.
    """

    sides: Sides
    rank: int
    macs: int
    params: int
    predicted_speedup: float
    kept_energy: float


def check_rank(model: Model, rank: int) -> None:
    """Refuse a rank that fits no convolution of `model`.

    Raises:
        SpecError: it is below 1, or larger than the channels of every convolution.
    """
    if rank < 1:
        raise SpecError(f"the rank of a bottleneck must be at least 1, not {rank}")
    weights = (constant(node.inputs[1]) for node in model.graph.nodes if is_op(node, "Conv"))
    widest = max((max(w.shape[:2]) for w in weights if w is not None), default=rank)
    if rank > widest:
        raise SpecError(
            f"{model.name}: rank {rank} is larger than the channels of every convolution; "
            f"the widest has {widest}"
        )


def candidate(
    model: Model,
    node: gs.Node,
    shapes: Mapping[str, Shape],
    *,
    rank: int | None = None,
    sides: Choice = "auto",
    min_channels: int = MIN_CHANNELS,
) -> Candidate | str:
    """Propose a split of one node of `model`, or say why there is none.

    `shapes` are those of `pwopt.shapes.infer`; the options are those of `propose`.

    Raises:
        ModelError: the weight holds NaN or infinite values, or does not fit the node's input.
    """
    if node.op != "Conv":
        return "only Conv is split" if node.op == "ConvTranspose" else "no k×k kernel to split"
    weight = constant(node.inputs[1])
    if weight is None:
        return "weight is not a constant"
    if prod(weight.shape[2:]) > 1 and has_bottleneck(node):
        return "has a 1×1 bottleneck already"
    if weight.dtype.kind != "f":
        return wrong_type(weight)
    where = f"{model.name}: layer '{label(node)}'"
    conv = conv_size(node, weight, shapes)
    read = shape_of(node.inputs[0], shapes)
    if read is not None and read[1] not in (None, conv.in_channels):
        raise ModelError(
            f"{where}: its weight is for {conv.in_channels} input channels, but its input has "
            f"{read[1]}; export the model again"
        )
    energy = _kept_energy(weight, where)
    return propose(conv, energy, rank=rank, sides=sides, min_channels=min_channels)


def propose(
    conv: ConvSize,
    energy: Energy,
    *,
    rank: int | None = None,
    sides: Choice = "auto",
    min_channels: int = MIN_CHANNELS,
) -> Candidate | str:
    """Choose the split of a convolution, or say why it stays as it is.

    Args:
        conv: The convolution.
        energy: Share of the weight's squared norm that a split (sides, rank) keeps; asked only
            for splits that pay.
        rank: Rank of the split, which must make the layer `LEAST_SPEEDUP` faster; None takes, for
            each side, the largest multiple of the kernel block that makes it `AIM` faster.
        sides: One form of split, or `auto`: the one that loses least energy per MAC saved.
        min_channels: Input channels from which a convolution is worth a split.
    """
    reason = _unsplittable(conv, min_channels)
    if reason:
        return reason
    choices: tuple[Sides, ...] = ("input", "output", "both") if sides == "auto" else (sides,)
    tried = [split for choice in choices if (split := _split(conv, choice, rank))]
    options = [
        Candidate(s.sides, s.rank, s.macs, s.params, s.speedup, energy(s.sides, s.rank))
        for s in tried
        if _pays(s, rank)
    ]
    if not options:
        return _unprofitable(conv, tried, rank, sides)
    return min(options, key=lambda option: _price(conv, option))


def _price(conv: ConvSize, option: Candidate) -> tuple[float, int]:
    """Order the forms of a split: least energy lost per MAC saved, then fewest MACs.

    Compared with other orders on three trained networks at several ranks (docs/measured.md).
    """
    lost = 1 - round(option.kept_energy, 6)
    return lost / (conv.macs - option.macs), option.macs


def _unsplittable(conv: ConvSize, min_channels: int) -> str | None:
    if conv.groups > 1:
        return grouped(conv)
    if prod(conv.kernel) == 1:
        return f"{'×'.join(map(str, conv.kernel))} already"
    if conv.in_channels < min_channels:
        return f"only {conv.in_channels} input channels (fewer than {min_channels})"
    return None


def _split(conv: ConvSize, sides: Sides, rank: int | None) -> Split | None:
    """Return the split to consider, if any: at `rank`, or at the highest rank that pays."""
    widths = {"input": conv.in_channels, "output": conv.out_channels}
    limit = widths.get(sides, min(widths.values()))
    if rank is not None:
        return Split(conv, sides, rank) if rank < limit else None
    ranks = range(cost.KERNEL_BLOCK, limit, cost.KERNEL_BLOCK)
    if not ranks:
        return None
    paying = bisect_left(ranks, True, key=lambda r: not _pays(Split(conv, sides, r), rank))
    return Split(conv, sides, ranks[max(paying, 1) - 1])


def _pays(split: Split, rank: int | None) -> bool:
    least = AIM if rank is None else LEAST_SPEEDUP
    return split.macs < split.conv.macs and split.speedup >= least


def _unprofitable(conv: ConvSize, tried: Sequence[Split], rank: int | None, sides: Choice) -> str:
    if tried:
        best = max(tried, key=lambda split: split.speedup)
        gain = f"{best.speedup:.2f}×"
        if rank is None:
            return f"no rank makes it {AIM:.0f}× as fast: {gain} at rank {best.rank}"
        return f"a split at rank {rank} would not be cheaper: {gain}"
    widths = {
        "input": f"{conv.in_channels} input channels",
        "output": f"{conv.out_channels} output channels",
    }
    width = widths.get(sides, f"{conv.in_channels} → {conv.out_channels} channels")
    if rank is None:
        return f"no rank of a whole kernel block ({cost.KERNEL_BLOCK}) is below its {width}"
    return f"rank {rank} is not below its {width}"


def _kept_energy(weight: gs.Constant, where: str) -> Energy:
    """Measure what splits keep of a weight, which is decoded when first asked for."""

    @cache
    def splitter() -> lowrank.Splitter:
        try:
            return lowrank.Splitter(weight.values)
        except ValueError as error:
            raise ModelError(f"{where}: {error}; export the model again") from error

    return lambda sides, rank: splitter().kept_energy(sides, rank)


def has_bottleneck(node: gs.Node) -> bool:
    """Tell whether a narrowing 1×1 stands right before a Conv, or a widening one right behind.

    A Relu may stand between them if `relu-bottlenecks` has put it there.
    """
    before, output = producer(node.inputs[0]), node.outputs[0]
    if before is not None and _is_within_bottleneck(before):
        before = producer(before.inputs[0])
    behind = [
        other
        for reader in output.outputs
        for other in (reader.outputs[0].outputs if _is_within_bottleneck(reader) else [reader])
    ]
    narrows = before is not None and _pointwise_widening(before) < 0
    return narrows or any(_pointwise_widening(reader) > 0 for reader in behind)


def _is_within_bottleneck(node: gs.Node) -> bool:
    name = str(node.outputs[0].name) if is_op(node, "Relu") else ""
    return name.rstrip("_0123456789").endswith(RELU)


def _pointwise_widening(node: gs.Node) -> int:
    """Return output minus input channels of a 1×1 Conv; 0 for all else."""
    weight = constant(node.inputs[1]) if is_op(node, "Conv") else None
    if weight is None or prod(weight.shape[2:]) > 1 or node.attrs.get("group", 1) > 1:
        return 0
    return int(weight.shape[0] - weight.shape[1])
