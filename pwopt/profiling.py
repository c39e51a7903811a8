"""The time of each of a model's own layers, from onnxruntime's profile of its kernels."""

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from pwopt import runtime
from pwopt.cost import COUNTED_OPS
from pwopt.model import Model
from pwopt.runtime import WARM_UP_RUNS, Feeds

_FUSED_INTO_CONV = {
    "Add", "BatchNormalization", "Clip", "HardSigmoid", "Identity", "LeakyRelu", "Mul", "Relu",
    "Sigmoid", "Sum", "Tanh",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Where one run's time goes, in median milliseconds.

    `layers` is keyed by the first output of the model's own node. What runs inside a fused
    kernel is counted with the layer that the kernel mainly is: Conv + BatchNormalization + Relu
    with the Conv. Nodes that have no kernel of their own are absent, as are the kernels that
    onnxruntime added (reordering, casts). `run` is the whole run with its overhead.
    """

    layers: dict[str, float]
    run: float


def layer_times(model: Model, feeds: Feeds, *, threads: int = 1, runs: int = 20) -> LayerTimes:
    """Profile a model at full optimisation and map the kernels back to its own nodes.

    onnxruntime names a kernel after the node it came from (``fused NAME``,
    ``NAME/MatMulAddFusion``) or, in the blocked layout, after the tensor that the last fused
    node writes (``TENSOR_nchwc``). So each node of a copy gets a unique name, and the way from
    that tensor back to the convolution is walked in the model's graph.

    Raises:
        ModelError: onnxruntime cannot load or run the model.
    """
    named = model.copy()
    for index, node in enumerate(named.proto.graph.node):
        node.name = f"<{index}>"
    with tempfile.TemporaryDirectory(prefix="pwopt-") as folder:
        session = runtime.session(named, threads=threads, profile=Path(folder) / "profile")
        for _ in range(WARM_UP_RUNS + runs):
            runtime.run(session, feeds, name=model.name)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _attribute(named.proto.graph, events)


def _attribute(graph: onnx.GraphProto, events: Sequence[Mapping[str, Any]]) -> LayerTimes:
    durations = _kernel_durations(events)
    writers = {name: node for node in graph.node for name in node.output if name}
    named = {kernel: _named_node(kernel[0], graph, writers) for kernel in durations}
    taken = {node.name for node in named.values() if node}
    layers: dict[str, float] = defaultdict(float)
    for kernel, node in named.items():
        if node:
            layer = _layer_of(node, writers, taken)
            layers[layer.output[0]] += _milliseconds(durations[kernel])
    runs = [event["dur"] for event in events if event["name"] == "model_run"]
    return LayerTimes(dict(layers), _milliseconds(runs))


def _milliseconds(microseconds: Sequence[float]) -> float:
    """Return the median of the runs that count."""
    return statistics.median(microseconds[WARM_UP_RUNS:]) / 1e3


def _kernel_durations(
    events: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], list[float]]:
    """Collect the microseconds of each run of each kernel, by its name and index.

    Kernels inside an If or a Loop are left out: the time of the If or Loop contains theirs.
    """
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    kernels = [event for event in events if event["cat"] == "Node" and "dur" in event]
    end = -1.0
    for event in sorted(kernels, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] + event["dur"] <= end:
            continue
        end = event["ts"] + event["dur"]
        name = event["name"].removesuffix("_kernel_time")
        durations[name, event["args"]["node_index"]].append(event["dur"])
    return durations


def _named_node(
    kernel: str, graph: onnx.GraphProto, writers: Mapping[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """Find the node that a kernel is named after; None for a kernel that onnxruntime added."""
    if number := re.search(r"<(\d+)>", kernel):
        node: onnx.NodeProto = graph.node[int(number[1])]
        return node
    if not kernel.endswith("_nchwc"):
        return None
    tensor = kernel.removesuffix("_nchwc")
    # A BatchNormalization that could not be fused runs as a depthwise convolution of that name.
    return writers.get(tensor) or writers.get(tensor.removesuffix("_bn"))


def _layer_of(
    last: onnx.NodeProto, writers: Mapping[str, onnx.NodeProto], taken: set[str]
) -> onnx.NodeProto:
    """Find the convolution that was fused with the nodes up to `last`, or return `last` itself.

    A node that another kernel is named after ends the way: it runs on its own.
    """
    node = last
    while node.op_type in _FUSED_INTO_CONV:
        before = [writers[name] for name in node.input if name in writers]
        computed = [writer for writer in before if writer.op_type != "Constant"]
        if not computed or computed[0].name in taken:
            return last
        node = computed[0]
    return node if node.op_type in COUNTED_OPS else last
