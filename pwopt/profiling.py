"""The time of each of a model's own layers, from onnxruntime's profile of its kernels."""

import json
import re
import secrets
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pwopt import runtime
from pwopt.cost import COUNTED_OPS
from pwopt.model import Model
from pwopt.runtime import WARM_UP_RUNS, Feeds

QUANTILE = 0.1
"""Low, for what disturbs a run only adds to it: on a busy machine, most runs of a kernel of some
milliseconds are interrupted, and medians would tell of the scheduler."""

_FUSED_INTO_CONV = {
    "Add", "BatchNormalization", "Clip", "HardSigmoid", "Identity", "LeakyRelu", "Mul", "Relu",
    "Sigmoid", "Sum", "Tanh",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Where one run's time goes, in milliseconds, each the `QUANTILE` of all runs.

    `layers` is keyed by the first output of the model's own node. What runs inside a fused
    kernel is counted with the layer that the kernel mainly is: Conv + BatchNormalization + Relu
    with the Conv. Nodes that have no kernel of their own are absent, as are the kernels that
    onnxruntime added (reordering, casts). `kernels` is the sum of all kernels, these among them;
    `run` is the whole run with its overhead.
    """

    layers: dict[str, float]
    kernels: float
    run: float


class Profile:
    """A session whose kernels are timed, and the way from them back to the model's own nodes.

    onnxruntime names a kernel after the node it came from (``fused NAME``,
    ``NAME/MatMulAddFusion``) or, in the blocked layout, after the tensor that the last fused
    node writes (``TENSOR_nchwc``). So each node of a copy gets a unique name, and the way from
    that tensor back to the convolution is walked in the model's graph.

    Args:
        model: The model; stays as it is, and is not needed afterwards.
        folder: Where onnxruntime writes its events, until `times` has read them.
        threads: Threads within one operator.

    Raises:
        ModelError: onnxruntime cannot load the model.
    """

    def __init__(self, model: Model, folder: Path, *, threads: int = 1) -> None:
        named = model.copy()
        self._graph = onnx.GraphProto()  # no more than the wiring, for weights would stay with it
        for index, node in enumerate(named.proto.graph.node):
            node.name = f"<{index}>"
            self._graph.node.add(
                name=node.name, op_type=node.op_type, input=node.input, output=node.output
            )
        prefix = folder / f"profile-{secrets.token_hex(8)}"
        self.session = runtime.session(named, threads=threads, profile=prefix)

    def times(self) -> LayerTimes:
        """End the profile, of `WARM_UP_RUNS` runs that do not count and any number that do."""
        path = Path(self.session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        return _attribute(self._graph, events)


def layer_times(model: Model, feeds: Feeds, *, threads: int = 1, runs: int = 20) -> LayerTimes:
    """Profile a model at full optimisation and map the kernels back to its own nodes.

    Raises:
        ModelError: onnxruntime cannot load or run the model.
    """
    with tempfile.TemporaryDirectory(prefix="pwopt-") as folder:
        profile = Profile(model, Path(folder), threads=threads)
        for _ in range(WARM_UP_RUNS + runs):
            runtime.run(profile.session, feeds, name=model.name)
        return profile.times()


def _attribute(graph: onnx.GraphProto, events: Sequence[Mapping[str, Any]]) -> LayerTimes:
    durations = _kernel_durations(events)
    writers = {name: node for node in graph.node for name in node.output if name}
    named = {kernel: _named_node(kernel[0], graph, writers) for kernel in durations}
    taken = {node.name for node in named.values() if node}
    times = {kernel: _milliseconds(found) for kernel, found in durations.items()}
    layers: dict[str, float] = defaultdict(float)
    for kernel, node in named.items():
        if node:
            layers[_layer_of(node, writers, taken).output[0]] += times[kernel]
    runs = [event["dur"] for event in events if event["name"] == "model_run"]
    return LayerTimes(dict(layers), sum(times.values()), _milliseconds(runs))


def _milliseconds(microseconds: Sequence[float]) -> float:
    """Return the low quantile of the runs that count."""
    return float(np.quantile(microseconds[WARM_UP_RUNS:], QUANTILE)) / 1e3


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
    """Find the convolution that was fused with the nodes up to `last`, or return `last` itself."""
    return _fused(last, writers, taken - {last.name}) or last


def _fused(
    node: onnx.NodeProto, writers: Mapping[str, onnx.NodeProto], taken: set[str]
) -> onnx.NodeProto | None:
    """Walk back from `node` to a layer; what another kernel is named after runs on its own."""
    if node.name in taken:
        return None
    if node.op_type not in _FUSED_INTO_CONV:
        return node if node.op_type in COUNTED_OPS else None
    before = [_fused(writers[name], writers, taken) for name in node.input if name in writers]
    return next((layer for layer in before if layer), None)
