"""Where a model's time and weights go, and which convolutions a 1×1 bottleneck makes cheaper.

`analyze` and the bottleneck pass ask the same functions, `candidate` and `propose`, so that what
is proposed is what is done.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import prod
from pathlib import Path
from typing import Literal

import onnx_graphsurgeon as gs

from pwopt import cost, lowrank
from pwopt.cost import ConvSize, Sides, Split
from pwopt.errors import ModelError, SpecError
from pwopt.graph import constant, is_op, producer
from pwopt.model import Model
from pwopt.shapes import bind, infer

Choice = Literal["auto", "input", "output", "both"]
Shape = tuple[int | None, ...]
Energy = Callable[[Sides, int], float]

MIN_CHANNELS = 32
"""Input channels from which a convolution counts as wide."""

LEAST_SPEEDUP = 1.1
"""A split at a given rank must promise this much, or the layer stays as it is."""

ENOUGH = 1.5
"""Among the forms of a split, those that make the layer this much faster come first."""

AIM = 2.0
"""Where no rank is given, the largest rank that makes the layer this many times faster is it."""

_NOMINAL_SIZE = 28  # output positions along each axis that is not known


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


@dataclass(frozen=True, slots=True)
class Layer:
    """One Conv, ConvTranspose, Gemm or MatMul of the main graph.

    `name` is the node's name, or its first output where it has none; `output` is always its first
    output. None stands for what is not known, does not apply (the kernel of a Gemm) or was not
    measured. `params` counts the elements of the constants it reads. Either `candidate` or
    `why_not` is set.
    """

    name: str
    output: str
    op: str
    kernel: tuple[int, ...] | None
    stride: tuple[int, ...] | None
    groups: int
    in_channels: int | None
    out_channels: int | None
    input_shape: Shape | None
    output_shape: Shape | None
    params: int
    macs: int | None
    mac_share: float | None
    time_ms: float | None
    candidate: Candidate | None
    why_not: str | None

    @property
    def saved_macs(self) -> int:
        """MACs that the candidate saves; 0 without one, or where they are not known."""
        if self.candidate is None or self.macs is None:
            return 0
        return self.macs - self.candidate.macs

    @property
    def saved_ms(self) -> float:
        """Milliseconds that the candidate should save; 0 without one, or where not measured."""
        if self.candidate is None or self.time_ms is None:
            return 0.0
        return self.time_ms * (1 - 1 / self.candidate.predicted_speedup)


@dataclass(frozen=True, slots=True)
class Size:
    """Of the whole model, shared weights once.

    Parameters are the constants of floating point, and of 8 bits or fewer where quantized, that
    some node reads, the statistics of BatchNormalization among them; integers of 32 and 64 bits
    are shapes and indices and do not count. `weight_bytes` are the bytes of the same constants.
    MACs and nodes are those of the main graph.
    """

    params: int
    macs: int
    weight_bytes: int
    nodes: int


@dataclass(frozen=True, slots=True)
class Analysis:
    """What `analyze` found. Candidates come first, the one that saves most at the top.

    `bottleneck` is the rank that was asked for. `inputs` are the shapes all numbers hold for,
    `assumed` says which axes of them nobody had fixed. `uncounted` layers lie in subgraphs (If,
    Loop, Scan) and local functions: how often these run is not known. `run_ms` is the time of a
    whole run, None where not measured.
    """

    model: str
    bottleneck: int | None
    totals: Size
    layers: tuple[Layer, ...]
    inputs: Mapping[str, tuple[int, ...]]
    assumed: Mapping[str, int]
    uncounted: int
    run_ms: float | None


def analyze(
    model: Model | str | Path,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    bottleneck: int | None = None,
    measure: bool = False,
    threads: int = 1,
) -> Analysis:
    """List the layers of a model with their cost and the split that would make each cheaper.

    Only weights of convolutions that may be split are decoded.

    Args:
        model: The model, with the edits made so far, or its file.
        shapes: Shapes of inputs by name, needed where a dimension is symbolic and no default fits.
        bottleneck: Rank of the splits; None takes, per layer, the largest multiple of the kernel
            block that makes the layer twice as fast.
        measure: Run the model in onnxruntime on random inputs and time each layer.
        threads: Threads to measure with.

    Raises:
        SpecError: `shapes` does not fit the model's inputs, or `bottleneck` no convolution.
        ModelError: the file is no model, a weight holds NaN, or onnxruntime cannot run the model.
    """
    if not isinstance(model, Model):
        model = Model.load(model)
    binding = bind(model, shapes)
    known = infer(model, binding)
    if bottleneck is not None:
        check_rank(model, bottleneck)
    times, run_ms = _measure(model, shapes, threads) if measure else ({}, None)
    layers = [_layer(model, node, known, bottleneck, times) for node in _counted(model.graph)]
    totals = _size(model, known)
    shared = (_with_share(layer, totals.macs) for layer in layers)
    return Analysis(
        model=model.name,
        bottleneck=bottleneck,
        totals=totals,
        layers=tuple(sorted(shared, key=_order)),
        inputs=binding.shapes,
        assumed=binding.assumed,
        uncounted=_count_inner(model),
        run_ms=run_ms,
    )


def size(model: Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Size:
    """Count parameters, MACs, weight bytes and nodes of a model, as `analyze` does.

    Raises:
        SpecError: `shapes` does not fit the model's inputs.
    """
    return _size(model, infer(model, bind(model, shapes)))


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
    """Propose a split of one node of `model`, or say why there is none; see `propose`.

    Args:
        model: The model, named in errors.
        node: A node of it.
        shapes: Shapes of its tensors, from `pwopt.shapes.infer`.
        rank: As in `propose`.
        sides: As in `propose`.
        min_channels: As in `propose`.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    if node.op != "Conv":
        return "only Conv is split" if node.op == "ConvTranspose" else "no k×k kernel to split"
    weight = constant(node.inputs[1])
    if weight is None:
        return "weight is not a constant"
    if prod(weight.shape[2:]) > 1 and _has_bottleneck(node):
        return "has a 1×1 bottleneck already"
    if weight.dtype.kind != "f":
        return f"weight is {weight.dtype.name}: only float16, float32 and float64 are split"
    where = f"{model.name}: layer '{_name(node)}'"
    conv = _conv_size(node, weight, shapes)
    read = _shape(node.inputs[0], shapes)
    if read is not None and read[1] not in (None, conv.in_channels):
        raise ModelError(
            f"{where}: its weight is for {conv.in_channels} input channels, but its input has "
            f"{read[1]}; export the model again"
        )
    energy = _KeptEnergy(weight, where)
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
        sides: One form of split, or `auto`: of the splits that make the layer `ENOUGH` faster, or
            of all that pay if none does, the one that keeps most of the weight's energy.
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
    return max(options, key=_merit)


# -- the choice of a split --------------------------------------------------------------------


def _merit(option: Candidate) -> tuple[bool, float, int]:
    """Order the forms of a split: fast enough, then faithful (to six digits), then cheap.

    Compared with other orders on three trained networks at several ranks (docs/measured.md).
    """
    return option.predicted_speedup >= ENOUGH, round(option.kept_energy, 6), -option.macs


def _unsplittable(conv: ConvSize, min_channels: int) -> str | None:
    if conv.groups > 1:
        kind = "depthwise" if conv.groups == conv.in_channels else "grouped"
        return f"{kind}: {conv.groups} groups"
    if prod(conv.kernel) == 1:
        return f"{_times(conv.kernel)} already"
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


class _KeptEnergy:
    """The share of a weight's squared norm that a split keeps; the weight is decoded on demand."""

    def __init__(self, weight: gs.Constant, where: str) -> None:
        self._weight = weight
        self._where = where

    def __call__(self, sides: Sides, rank: int) -> float:
        return self._splitter.kept_energy(sides, rank)

    @cached_property
    def _splitter(self) -> lowrank.Splitter:
        try:
            return lowrank.Splitter(self._weight.values)
        except ValueError as error:
            raise ModelError(f"{self._where}: {error}; export the model again") from error


def _has_bottleneck(node: gs.Node) -> bool:
    """Whether a narrowing 1×1 stands directly before a Conv, or a widening one directly behind."""
    before, output = producer(node.inputs[0]), node.outputs[0]
    narrows = before is not None and _pointwise_widening(before) < 0
    return narrows or any(_pointwise_widening(reader) > 0 for reader in output.outputs)


def _pointwise_widening(node: gs.Node) -> int:
    """Output minus input channels of a 1×1 Conv; 0 for all else."""
    weight = constant(node.inputs[1]) if is_op(node, "Conv") else None
    if weight is None or prod(weight.shape[2:]) > 1 or node.attrs.get("group", 1) > 1:
        return 0
    return int(weight.shape[0] - weight.shape[1])


def _conv_size(node: gs.Node, weight: gs.Constant, shapes: Mapping[str, Shape]) -> ConvSize:
    """Describe a Conv; where its map's size is not known, as one of a common size."""
    out_channels, in_channels, *kernel = weight.shape
    groups = node.attrs.get("group", 1)
    strides = node.attrs.get("strides", [1] * len(kernel))
    nominal_input = (1, in_channels * groups, *(_NOMINAL_SIZE * stride for stride in strides))
    nominal_output = (1, out_channels, *(_NOMINAL_SIZE for _ in strides))
    before, after = (_shape(t, shapes) for t in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or None in before or None in after:
        before, after = nominal_input, nominal_output
    return ConvSize(
        in_channels=in_channels * groups,
        out_channels=out_channels,
        kernel=tuple(kernel),
        groups=groups,
        bias=len(node.inputs) > 2 and not node.inputs[2].is_empty(),
        input_positions=_positions(before),
        output_positions=_positions(after),
    )


def _positions(shape: Shape) -> int:
    batch, _, *spatial = shape
    return prod(size for size in (batch, *spatial) if size is not None)


# -- one layer --------------------------------------------------------------------------------


def _macs(node: gs.Node, shapes: Mapping[str, Shape]) -> int | None:
    inputs = [_shape(tensor, shapes) for tensor in node.inputs]
    return cost.node_macs(node.op, node.attrs, inputs, _shape(node.outputs[0], shapes))


def _layer(
    model: Model,
    node: gs.Node,
    shapes: Mapping[str, Shape],
    bottleneck: int | None,
    times: Mapping[str, float],
) -> Layer:
    inputs = [_shape(tensor, shapes) for tensor in node.inputs]
    output = _shape(node.outputs[0], shapes)
    constants = [c for c in map(constant, node.inputs) if c is not None]
    in_channels, out_channels, kernel = _channels(node, inputs, output)
    split = candidate(model, node, shapes, rank=bottleneck)
    strides = node.attrs.get("strides", [1] * len(kernel or ()))
    return Layer(
        name=_name(node),
        output=node.outputs[0].name,
        op=node.op,
        kernel=kernel,
        stride=tuple(strides) if kernel is not None else None,
        groups=node.attrs.get("group", 1),
        in_channels=in_channels,
        out_channels=out_channels,
        input_shape=inputs[0],
        output_shape=output,
        params=sum(prod(c.shape) for c in constants),
        macs=_macs(node, shapes),
        mac_share=None,
        time_ms=times.get(node.outputs[0].name),
        candidate=split if isinstance(split, Candidate) else None,
        why_not=split if isinstance(split, str) else None,
    )


def _channels(
    node: gs.Node, inputs: Sequence[Shape | None], output: Shape | None
) -> tuple[int | None, int | None, tuple[int, ...] | None]:
    """Input channels, output channels and kernel of a layer, as far as they are known."""
    first, second = inputs[:2]
    if node.op in ("Gemm", "MatMul"):
        axis = 0 if node.attrs.get("transA") else -1
        return first[axis] if first else None, output[-1] if output else None, None
    if second is None or None in second:
        return first[1] if first else None, output[1] if output else None, None
    ours, others, *kernel = (size for size in second if size is not None)
    groups = node.attrs.get("group", 1)
    if node.op == "Conv":  # (Cout, Cin/group, *kernel)
        return others * groups, ours, tuple(kernel)
    return ours, others * groups, tuple(kernel)  # (Cin, Cout/group, *kernel)


def _order(layer: Layer) -> tuple[bool, float, int]:
    """Sort key: candidates first, by milliseconds saved where measured, else by MACs."""
    return layer.candidate is None, -layer.saved_ms, -layer.saved_macs


def _with_share(layer: Layer, macs: int) -> Layer:
    return layer if layer.macs is None else replace(layer, mac_share=layer.macs / max(macs, 1))


def _shape(tensor: gs.Tensor, shapes: Mapping[str, Shape]) -> Shape | None:
    weight = constant(tensor)
    return shapes.get(tensor.name) if weight is None else tuple(weight.shape)


def _name(node: gs.Node) -> str:
    return str(node.name or node.outputs[0].name)


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


# -- the whole model --------------------------------------------------------------------------


def _size(model: Model, shapes: Mapping[str, Shape]) -> Size:
    weights = {id(weight): weight for weight in _weights(model.graph)}.values()
    return Size(
        params=sum(prod(weight.shape) for weight in weights),
        macs=sum(_macs(node, shapes) or 0 for node in _counted(model.graph)),
        weight_bytes=sum(cost.tensor_bytes(prod(w.shape), w.dtype) for w in weights),
        nodes=len(model.graph.nodes),
    )


def _counted(graph: gs.Graph) -> list[gs.Node]:
    return [node for node in graph.nodes if is_op(node, *cost.COUNTED_OPS)]


def _weights(graph: gs.Graph) -> Iterator[gs.Constant]:
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.attrs.values()):
            if isinstance(tensor, gs.Constant) and cost.is_parameter(tensor.dtype):
                yield tensor
        for subgraph in node.subgraphs():
            yield from _weights(subgraph)


def _count_inner(model: Model) -> int:
    """Count the layers inside subgraphs and local functions."""
    subgraphs = chain.from_iterable(node.subgraphs() for node in model.graph.nodes)
    functions = (node.op_type for function in model.proto.functions for node in function.node)
    return sum(_count_layers(graph) for graph in subgraphs) + sum(
        op in cost.COUNTED_OPS for op in functions
    )


def _count_layers(graph: gs.Graph) -> int:
    inner = chain.from_iterable(node.subgraphs() for node in graph.nodes)
    return len(_counted(graph)) + sum(map(_count_layers, inner))


def _measure(
    model: Model, shapes: Mapping[str, Sequence[int]] | None, threads: int
) -> tuple[Mapping[str, float], float]:
    """Time of each layer and of the whole run, in milliseconds, on random inputs."""
    from pwopt import data, runtime  # onnxruntime is loaded only where something is measured

    batch = next(iter(data.random_data(model, shapes)))
    times = runtime.layer_times(model, batch.feeds, threads=threads)
    return times.layers, times.run
