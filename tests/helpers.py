"""What the tests share: models from ONNX text, running them, one call to test a pass.

Models are written as `onnx.parser` reads them, without the header if opset 17 will do::

    conv (float[N,4,8,8] x) => (float[N,8,6,6] y)
    <float[8,4,3,3] w, float[8] b = {1, 2, 3, 4, 5, 6, 7, 8}>
    { y = Conv(x, w, b) }

Tensors in angle brackets that no node writes are initialisers; those without values get random
ones, the same for the same seed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pwopt.lowrank import Factors
from pwopt.model import Model
from pwopt.rewriting import Context, Event, Pass

Array = npt.NDArray[Any]

REPOSITORY = Path(__file__).resolve().parents[1]

RANDOM_GRAPHS = 2000 if os.environ.get("CI") else 150
"""How many random graphs are drawn around each exact pass."""

SMALL: dict[str, dict[str, int]] = {
    "project_features": {"size": 16, "width": 32},
    "decrease_features": {"size": 16, "width": 32, "projection": 4},
    "increase_features": {"size": 16, "width": 32, "projection": 64},
    "seven_by_seven": {"size": 8, "in_channels": 32, "channels": 4},
    "seven_by_seven_reduced": {"size": 8, "in_channels": 32, "bottleneck": 4, "channels": 4},
    "twenty_filters": {"size": 20},
    "network_in_network": {"width": 24},
    "googlenet": {"size": 64, "classes": 10},
    "resnet50": {"size": 64, "width": 8, "classes": 10},
    "squeezenet": {"size": 64, "classes": 10},
    "densenet121": {"size": 64, "growth": 8, "classes": 10},
    "vgg16": {"size": 32, "width": 8, "classes": 10},
}
"""Small variants of the networks in BUILDERS; who is not named is small enough as it is."""

ASSETS = Path(os.environ.get("PWOPT_ASSETS") or REPOSITORY.parent / "shared" / "assets")
"""Pretrained networks with their data; too large for the repository."""

needs_assets = pytest.mark.skipif(
    not ASSETS.is_dir(),
    reason="the pretrained networks are not here; set PWOPT_ASSETS to their folder",
)

# -- making models ----------------------------------------------------------------------------


def parse(text: str, weights: Mapping[str, Array] | None = None, *, seed: int = 0) -> Model:
    """Make a model from ONNX text; `weights` replaces random values, shape and all."""
    proto = parse_proto(text)
    given = dict(weights or {})
    rng = np.random.default_rng(seed)
    written = {name for node in proto.graph.node for name in node.output}
    declared = list(proto.graph.value_info)
    del proto.graph.value_info[:]
    for info in declared:
        if info.name in written:
            proto.graph.value_info.append(info)
            continue
        tensor = info.type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        values = given.pop(info.name, None)
        if values is None:
            values = random_weight(rng, info.name, shape)
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), info.name))
    assert not given, f"no such weights: {given.keys()}"
    return checked(proto)


def checked(proto: ModelProto) -> Model:
    """Give outputs without a shape, `float[] y`, the one they have, and check the model."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    for output, known in zip(proto.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
    onnx.checker.check_model(proto, full_check=True)
    return Model(proto)


def parse_proto(text: str) -> ModelProto:
    """Read ONNX text; the header may be left out, and names with dots need no quotes."""
    if not text.lstrip().startswith("<"):
        text = f'<ir_version: 8, opset_import: ["" : 17]>\n{text}'
    return onnx.parser.parse_model(re.sub(r'(?<![\w."])([a-z]\w*(?:\.\w+)+)', r'"\1"', text))


def random_weight(rng: np.random.Generator, name: str, shape: Sequence[int]) -> Array:
    """Draw values that keep activations near 1; `var…` are variances, hence positive."""
    if name.startswith("var"):
        return rng.uniform(0.5, 2.0, shape)
    fan_in = np.prod(shape[1:]) if len(shape) > 1 else 1
    return np.asarray(rng.standard_normal(shape) / np.sqrt(fan_in))


# -- running models ---------------------------------------------------------------------------


def random_feeds(model: Model, *, batch: int = 1, side: int = 9, seed: int = 1) -> dict[str, Array]:
    """Draw an input: open first axes become `batch`, other open ones `side`."""
    rng = np.random.default_rng(seed)
    feeds = {}
    initializers = {tensor.name for tensor in model.proto.graph.initializer}
    for info in model.proto.graph.input:
        if info.name in initializers:
            continue
        tensor = info.type.tensor_type
        shape = [
            dim.dim_value or (side if axis else batch) for axis, dim in enumerate(tensor.shape.dim)
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        values = rng.standard_normal(shape)
        feeds[info.name] = values > 0 if dtype == np.bool_ else values.astype(dtype)
    return feeds


def run(model: Model | ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Run in onnxruntime, unoptimised; in onnx's reference where onnxruntime has no kernel."""
    proto = model.to_proto() if isinstance(model, Model) else model
    kinds = {info.type.tensor_type.elem_type for info in proto.graph.input}
    if onnx.TensorProto.DOUBLE in kinds:  # onnxruntime has no Conv of doubles
        return list(ReferenceEvaluator(proto).run(None, dict(feeds)))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(feeds)))


def assert_close(actual: Sequence[Array], expected: Sequence[Array], rtol: float = 1e-4) -> None:
    """Compare outputs: within `rtol`, or a tenth of it relative to the largest element."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        largest = float(np.abs(theirs.astype(np.float64)).max(initial=0))
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol / 10 * largest)


def assert_same_numbers(
    actual: Model | ModelProto, expected: Model, rtol: float = 1e-4, **sizes: int
) -> None:
    """Compare two models on random inputs, at two batch sizes where the batch is open."""
    for batch in (1, 3):
        feeds = random_feeds(expected, batch=batch, **sizes)
        assert_close(run(actual, feeds), run(expected, feeds), rtol)


# -- testing passes ---------------------------------------------------------------------------


class Outcome(NamedTuple):
    """A rewritten model and what the pass said about it."""

    model: Model
    events: list[Event]

    @property
    def proto(self) -> ModelProto:
        """The model as it would be saved."""
        return self.model.to_proto()

    @property
    def reasons(self) -> dict[str, str]:
        """Where → reason of what was skipped."""
        return {event.where: event.reason for event in self.events if event.kind == "skipped"}

    @property
    def rewrote(self) -> list[str]:
        """Where it rewrote."""
        return [event.where for event in self.events if event.kind == "rewrote"]


def apply(model: Model, step: Pass, **options: Any) -> Outcome:
    """Apply a pass to a copy of `model`, and assert what holds for every pass.

    The result passes the full check and keeps inputs, outputs and metadata; it differs from the
    model before exactly if an event says so; a second run changes nothing.
    """
    context = Context(**options)
    before = model.to_proto()
    after = model.copy()
    events = list(step.apply(after, context))
    proto = after.to_proto()

    onnx.checker.check_model(proto, full_check=True)
    changed = proto.SerializeToString(deterministic=True) != before.SerializeToString(
        deterministic=True
    )
    assert changed == any(event.kind == "rewrote" for event in events), events
    outputs = {name for node in before.graph.node for name in node.output}
    assert {event.where for event in events} <= outputs
    assert _callers_inputs(proto) == _callers_inputs(before)
    assert proto.graph.output == before.graph.output
    assert proto.metadata_props == before.metadata_props
    assert proto.graph.doc_string == before.graph.doc_string
    _assert_untouched_survive(before.graph, proto.graph)

    for again in (after.copy(), Model(ModelProto.FromString(proto.SerializeToString()))):
        second = list(step.apply(again, context))
        assert not any(event.kind == "rewrote" for event in second), second
        assert again.to_proto() == proto
    return Outcome(after, events)


def assert_pass(
    before: str,
    step: Pass,
    after: str,
    *,
    weights: Mapping[str, Array] | None = None,
    **options: Any,
) -> Outcome:
    """Assert that `step` turns one graph into the other, given as ONNX text.

    Compared are nodes (their names left aside), and the initialisers' names, types and shapes; an
    exact pass must also give the same numbers.
    """
    model = parse(before, weights)
    outcome = apply(model, step, **options)
    wanted = parse(after).proto.graph
    graph = outcome.proto.graph
    assert [_describe(node) for node in graph.node] == [_describe(node) for node in wanted.node]
    assert _initializers(graph) == _initializers(wanted)
    if step.exact:
        assert_same_numbers(outcome.model, model)
    return outcome


def assert_skipped(
    model: Model | str, step: Pass, reason: str, where: str = "y", **options: Any
) -> None:
    """Assert that `step` declines the one site it finds, for this very reason."""
    outcome = apply(parse(model) if isinstance(model, str) else model, step, **options)
    assert [(e.kind, e.where, e.reason) for e in outcome.events] == [("skipped", where, reason)]


def values(proto: ModelProto) -> dict[str, Array]:
    """Initialiser name → values."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def _callers_inputs(proto: ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that a caller must or may feed; before IR 4 initialisers are not among them."""
    fixed = {tensor.name for tensor in proto.graph.initializer} if proto.ir_version < 4 else set()
    return [info for info in proto.graph.input if info.name not in fixed]


def _assert_untouched_survive(before: GraphProto, after: GraphProto) -> None:
    """Nodes that write the same by the same operator from the same inputs are the same nodes."""

    def key(node: NodeProto) -> tuple[str, ...]:
        return (node.op_type, *node.input, "→", *node.output)

    old = {key(node): node for node in before.node}
    for node in after.node:
        assert node == old.get(key(node), node)


def _describe(node: NodeProto) -> tuple[Any, ...]:
    attributes = {attribute.name: _value(attribute) for attribute in node.attribute}
    return node.domain, node.op_type, list(node.input), list(node.output), attributes


def _value(attribute: AttributeProto) -> Any:
    if attribute.type == AttributeProto.GRAPH:
        return [_describe(node) for node in attribute.g.node]
    if attribute.type == AttributeProto.TENSOR:
        return list(attribute.t.dims)
    value = helper.get_attribute_value(attribute)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, bytes) else value


def _initializers(graph: GraphProto) -> dict[str, tuple[int, list[int]]]:
    return {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in graph.initializer}


def effective(factors: Factors, bias: Array) -> tuple[Array, Array]:
    """Return weight (Cout, Cin, *kernel) and bias of the one layer that the factors amount to."""
    weight = factors.core.astype(np.float64)
    if factors.reduce is not None:
        reduce = factors.reduce.reshape(factors.reduce.shape[:2])
        weight = np.moveaxis(np.tensordot(weight, reduce, axes=(1, 0)), -1, 1)
    if factors.expand is not None:
        expand = factors.expand.reshape(factors.expand.shape[:2])
        weight = np.tensordot(expand, weight, axes=1)
    return weight, bias if factors.bias is None else factors.bias
