"""Where a model's time and weights go: its layers, and the split that would make each cheaper."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_graphsurgeon as gs
from onnx import ModelProto

from pwopt import cost
from pwopt.candidates import Candidate, candidate, check_rank
from pwopt.errors import ModelError
from pwopt.graph import all_nodes, constant, is_op, label, shape_of
from pwopt.model import Model
from pwopt.shapes import InputShapes, Shape, bind, infer


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
    MACs and nodes are those of the main graph; None where the shape of a layer is not known.
    """

    params: int
    macs: int | None
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
    model: Model | ModelProto | str | Path,
    *,
    shapes: InputShapes | None = None,
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
    model = Model.open(model)
    binding = bind(model, shapes)
    known = infer(model, binding)
    if bottleneck is not None:
        check_rank(model, bottleneck)
    times, run_ms = _measure(model, shapes, threads) if measure else ({}, None)
    totals = _size(model, known)
    layers = [
        _layer(node, candidate(model, node, known, rank=bottleneck), known, totals.macs, times)
        for node in _layer_nodes(model.graph.nodes)
    ]
    return Analysis(
        model=model.name,
        bottleneck=bottleneck,
        totals=totals,
        layers=tuple(sorted(layers, key=_order)),
        inputs=binding.shapes,
        assumed=binding.assumed,
        uncounted=_count_inner(model),
        run_ms=run_ms,
    )


def size(model: Model, shapes: InputShapes | None = None) -> Size:
    """Count parameters, MACs, weight bytes and nodes of a model, as `analyze` does.

    Where the input shapes must be given and are not, the MACs are not known.

    Raises:
        SpecError: `shapes` does not fit the model's inputs.
    """
    try:
        known = infer(model, bind(model, shapes))
    except ModelError:
        known = {}
    return _size(model, known)


def _layer(
    node: gs.Node,
    split: Candidate | str,
    shapes: Mapping[str, Shape],
    total_macs: int | None,
    times: Mapping[str, float],
) -> Layer:
    inputs = [shape_of(tensor, shapes) for tensor in node.inputs]
    output = shape_of(node.outputs[0], shapes)
    constants = [c for c in map(constant, node.inputs) if c is not None]
    in_channels, out_channels, kernel = _channels(node, inputs, output)
    strides = node.attrs.get("strides", [1] * len(kernel or ()))
    macs = _macs(node, shapes)
    return Layer(
        name=label(node),
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
        macs=macs,
        mac_share=None if macs is None or total_macs is None else macs / max(total_macs, 1),
        time_ms=times.get(node.outputs[0].name),
        candidate=split if isinstance(split, Candidate) else None,
        why_not=split if isinstance(split, str) else None,
    )


def _channels(
    node: gs.Node, inputs: Sequence[Shape | None], output: Shape | None
) -> tuple[int | None, int | None, tuple[int, ...] | None]:
    """Return a layer's input channels, output channels and kernel, as far as they are known."""
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
    """Order candidates first, by milliseconds saved where measured, else by MACs."""
    return layer.candidate is None, -layer.saved_ms, -layer.saved_macs


def _size(model: Model, shapes: Mapping[str, Shape]) -> Size:
    weights = {
        id(tensor): tensor
        for node in all_nodes(model.graph)
        for tensor in (*node.inputs, *node.attrs.values())
        if isinstance(tensor, gs.Constant) and cost.is_parameter(tensor.dtype)
    }.values()
    macs = [_macs(node, shapes) for node in _layer_nodes(model.graph.nodes)]
    known = [count for count in macs if count is not None]
    return Size(
        params=sum(prod(weight.shape) for weight in weights),
        macs=sum(known) if len(known) == len(macs) else None,
        weight_bytes=sum(cost.tensor_bytes(prod(w.shape), w.dtype) for w in weights),
        nodes=len(model.graph.nodes),
    )


def _macs(node: gs.Node, shapes: Mapping[str, Shape]) -> int | None:
    inputs = [shape_of(tensor, shapes) for tensor in node.inputs]
    return cost.node_macs(node.op, node.attrs, inputs, shape_of(node.outputs[0], shapes))


def _layer_nodes(nodes: Iterable[gs.Node]) -> list[gs.Node]:
    return [node for node in nodes if is_op(node, *cost.COUNTED_OPS)]


def _count_inner(model: Model) -> int:
    """Count the layers inside subgraphs and local functions."""
    everywhere, outside = _layer_nodes(all_nodes(model.graph)), _layer_nodes(model.graph.nodes)
    functions = (node.op_type for function in model.proto.functions for node in function.node)
    return len(everywhere) - len(outside) + sum(op in cost.COUNTED_OPS for op in functions)


def _measure(
    model: Model, shapes: InputShapes | None, threads: int
) -> tuple[Mapping[str, float], float]:
    """Time each layer and the whole run on random inputs, in milliseconds."""
    from pwopt import data, profiling  # onnxruntime is loaded only where something is measured

    batch = next(iter(data.random_data(model, shapes)))
    times = profiling.layer_times(model, batch.feeds, threads=threads)
    return times.layers, times.run
