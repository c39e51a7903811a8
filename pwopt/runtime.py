"""onnxruntime: sessions, interleaved latency, and the time of each of a model's own layers."""

import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from pwopt.errors import ModelError
from pwopt.model import Model, serialized

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_FUSED_INTO_CONV = {
    "Add", "BatchNormalization", "Clip", "HardSigmoid", "Identity", "LeakyRelu", "Mul", "Relu",
    "Sigmoid", "Sum", "Tanh",
}  # fmt: skip
_WARM_UP_RUNS = 3


def session(model: Model | str | Path, *, threads: int = 1) -> ort.InferenceSession:
    """A CPU session with every graph optimisation.

    Args:
        model: A Model with its edits, or a file. Weights may be external, and exceed 2 GB.
        threads: Threads within one operator; operators run one after the other.

    Raises:
        ModelError: onnxruntime cannot load it; the message is the first line of its own.
    """
    if isinstance(model, Model):
        return _load_proto(model.to_proto(), _options(threads), model)
    return _load(str(model), _options(threads), str(model))


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    # Idle threads of one session would otherwise spin on the cores that the next one runs on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _load(source: str | bytes, options: ort.SessionOptions, name: str) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ModelError(f"{name}: onnxruntime cannot load it: {_first_line(error)}") from error


def _load_proto(
    proto: onnx.ModelProto, options: ort.SessionOptions, model: Model
) -> ort.InferenceSession:
    data = serialized(proto)
    if data is not None:
        if model.folder:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", model.folder
            )
        return _load(data, options, model.name)
    with tempfile.TemporaryDirectory(prefix="pwopt-") as folder:
        path = Path(folder) / "model.onnx"
        Model(proto, path=model.path).save(path)
        return _load(str(path), options, model.name)


def _first_line(error: Exception) -> str:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__


def run(session: ort.InferenceSession, feeds: Feeds, *, name: str) -> dict[str, Array]:
    """All outputs for one feed, by name.

    Raises:
        ModelError: onnxruntime failed, or an output is not a tensor of numbers; the message
            starts with `name`.
    """
    names = [output.name for output in session.get_outputs()]
    try:
        values = session.run(names, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ModelError(f"{name}: onnxruntime cannot run it: {_first_line(error)}") from error
    for output, value in zip(names, values, strict=True):
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            raise ModelError(f"{name}: output '{output}' is not a tensor of numbers")
    return dict(zip(names, values, strict=True))


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster one session ran than another: ratio of medians, 95 % interval."""

    ratio: float
    ci95: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Timing:
    """Latencies of several sessions, measured in turn. `samples_ms` is (rounds, sessions)."""

    samples_ms: npt.NDArray[np.float64]

    @property
    def median_ms(self) -> tuple[float, ...]:
        """Median milliseconds of each session."""
        return tuple(float(median) for median in np.median(self.samples_ms, axis=0))

    def speedup(self, base: int, other: int, *, seed: int = 0, resamples: int = 2000) -> Speedup:
        """How many times faster session `other` is than session `base`.

        The interval is a percentile bootstrap over rounds: both latencies of a round are drawn
        together, so that a disturbance that hit both counts once (Efron & Tibshirani 1993).
        """
        pair = self.samples_ms[:, [base, other]]
        rounds = np.random.default_rng(seed).integers(len(pair), size=(resamples, len(pair)))
        medians = np.median(pair[rounds], axis=1)
        low, high = np.percentile(medians[:, 0] / medians[:, 1], [2.5, 97.5])
        before, after = np.median(pair, axis=0)
        return Speedup(float(before / after), (float(low), float(high)))


def interleave(
    sessions: Sequence[ort.InferenceSession],
    feeds: Feeds,
    *,
    seconds: float = 5.0,
    min_rounds: int = 7,
    max_rounds: int = 1000,
) -> Timing:
    """Time sessions in turn, run by run, so that what disturbs the machine hits all alike.

    Every other round goes backwards, so that no session always runs after the same neighbour.
    A few runs of each come first and are not counted.

    Args:
        sessions: What to time, all on the same feeds.
        feeds: One array for each input.
        seconds: Start rounds for so long,
        min_rounds: but do as many as this however slow they are,
        max_rounds: and as many as this at most.
    """
    feeds = dict(feeds)
    for timed in [*sessions] * _WARM_UP_RUNS:
        timed.run(None, feeds)
    samples: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(samples) < min_rounds or (len(samples) < max_rounds and time.perf_counter() < end):
        order = list(range(len(sessions)))[:: -1 if len(samples) % 2 else 1]
        row = [0.0] * len(sessions)
        for index in order:
            begin = time.perf_counter()
            sessions[index].run(None, feeds)
            row[index] = (time.perf_counter() - begin) * 1e3
        samples.append(row)
    return Timing(np.array(samples))


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Where one run's time goes, in median milliseconds.

    `layers` is keyed by the first output of the model's own node. What runs inside a fused
    kernel is counted with the layer that the kernel mainly is: Conv + BatchNormalization + Relu
    with the Conv. Nodes that have no kernel of their own are absent. `other` is the time of
    kernels that onnxruntime added (reordering, casts), `run` the whole run with its overhead.
    """

    layers: dict[str, float]
    other: float
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
    proto = model.to_proto()
    for index, node in enumerate(proto.graph.node):
        node.name = f"<{index}>"
    with tempfile.TemporaryDirectory(prefix="pwopt-") as folder:
        options = _options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        profiled = _load_proto(proto, options, model)
        for _ in range(_WARM_UP_RUNS + runs):
            run(profiled, feeds, name=model.name)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    return _attribute(proto.graph, events)


def _attribute(graph: onnx.GraphProto, events: Sequence[Mapping[str, Any]]) -> LayerTimes:
    durations = _kernel_durations(events)
    writers = {name: node for node in graph.node for name in node.output if name}
    named = {kernel: _named_node(kernel[0], graph, writers) for kernel in durations}
    taken = {node.name for node in named.values() if node}
    layers: dict[str, float] = defaultdict(float)
    other = 0.0
    for kernel, microseconds in durations.items():
        milliseconds = statistics.median(microseconds[_WARM_UP_RUNS:]) / 1e3
        if node := named[kernel]:
            layers[_layer_of(node, writers, taken).output[0]] += milliseconds
        else:
            other += milliseconds
    runs = [event["dur"] for event in events if event["name"] == "model_run"]
    return LayerTimes(dict(layers), other, statistics.median(runs[_WARM_UP_RUNS:]) / 1e3)


def _kernel_durations(
    events: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], list[float]]:
    """Microseconds of each run of each kernel, by its name and index.

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
    """The node that a kernel is named after, or None for a kernel that onnxruntime added."""
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
    """The convolution that was fused with the nodes up to `last`, or `last` itself.

    A node that another kernel is named after ends the way: it runs on its own.
    """
    node = last
    while node.op_type in _FUSED_INTO_CONV:
        before = [writers[name] for name in node.input if name in writers]
        computed = [writer for writer in before if writer.op_type != "Constant"]
        if not computed or computed[0].name in taken:
            return last
        node = computed[0]
    return node if node.op_type in _LAYERS else last
