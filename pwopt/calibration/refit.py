"""Split layers fitted to what really reaches them, from the first to the last.

A split changes what all later layers read. So each split layer is fitted in turn: to give the
*original* layer's outputs on the inputs that the network has once all earlier layers are split
(Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks", asymmetric reconstruction).

The 1×1 in front comes in closed form from the moments of those inputs; what follows is regressed on
it. Where a Relu follows, the error behind the Relu counts; where the layer's output is added to a
shortcut, the sum is what is reconstructed (He et al. 2017, "Channel Pruning", section 3.3), so that
the error that the shortcut brings is mended as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, prod

import numpy as np
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto

from pwopt import runtime
from pwopt.calibration.closed_forms import ClosedForms
from pwopt.calibration.samples import spread
from pwopt.calibration.statistics import Gathering, Statistics
from pwopt.calibration.walk import Stop, Walk
from pwopt.cost import Split
from pwopt.data import Batch
from pwopt.graph import Names, is_op, is_output, known_constant, like
from pwopt.linear import Linear
from pwopt.lowrank import Factors, regression
from pwopt.model import Model
from pwopt.runtime import Array

Progress = Callable[[str, int, int | None], None]
Run = Callable[[Array], Array]

ROWS_PER_FEATURE = 20
"""Positions that a regression takes from all samples together, for each number it reads, …"""

LEAST_ROWS = 8192
"""… but no fewer than so many, if there are so many, …"""

ROWS_BYTES = 256 << 20
"""… and no more than fit into these bytes."""


def refit(
    model: Model,
    layers: Sequence[Linear],
    splits: Mapping[str, Split],
    batches: Sequence[Batch],
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> dict[str, Factors]:
    """Fit the splits of some layers, one after the other, to samples.

    Args:
        model: The original; stays as it is.
        layers: Layers of its graph.
        splits: Those to be split, by `Linear.where`, and how.
        batches: Samples.
        threads: Threads within one operator.
        progress: Told how many layers are done.

    Raises:
        ModelError: onnxruntime cannot run a part of the model.
    """
    chosen = [layer for layer in layers if layer.where in splits]
    fitted: dict[str, Factors] = {}
    for stop in Walk(model, chosen, batches, threads=threads):
        layer = stop.layer
        if progress:
            progress("fitting layers", len(fitted), len(chosen))
        prior = _closed_form(stop, splits[layer.where])
        as_it_is = _runner(model, layer, None, threads)
        factors = _regressed(stop, prior, _behind(model.graph, stop), as_it_is)
        fitted[layer.where] = factors
        stop.replace(_runner(model, layer, factors, threads))
    return fitted


def _closed_form(stop: Stop, split: Split) -> Factors:
    """Split by the moments of what the student reads and of what the teacher writes."""
    layer = stop.layer
    samples = sum(len(x) for _, x, _ in stop.pairs())
    inputs, outputs = Gathering(samples), Gathering(samples)
    for _, x, y in stop.pairs():
        if split.sides != "output":
            inputs.add(np.moveaxis(x, layer.channel_axis, -1), len(x))
        outputs.add(np.moveaxis(y, layer.channel_axis, -1), len(x))
    known = Statistics(None if split.sides == "output" else inputs.moments(), outputs.moments())
    forms = ClosedForms({layer.where: known}, {stop.input: x.shape})
    return forms.split(layer, split.sides, split.rank)


def _regressed(stop: Stop, prior: Factors, behind: "_Behind", as_it_is: Run) -> Factors:
    """Regress what comes behind the first 1×1, or behind the original layer, on the samples.

    With a 1×1 in front, features are the patches of its output; else they are the original
    layer's outputs, before the bias, of which the leading combinations are kept.
    """
    layer, core = stop.layer, prior.core
    weight = layer.weight()
    if prior.reduce is None:
        before = np.eye(len(weight), dtype=weight.dtype)
    else:
        before = core.reshape(len(core), -1)
        if prior.expand is not None:
            before = prior.expand.reshape(len(weight), -1) @ before
    rank = None if prior.expand is None else prior.expand.shape[1]
    rows = _rows(stop, prior.reduce, behind.shortcut, as_it_is, before.shape[1])
    found = regression.regress(*rows[:2], before, rank=rank, relu=behind.relu, shift=rows[2])
    if prior.expand is None:
        return replace(prior, core=found.core.reshape(core.shape), bias=found.bias)
    kept = found.core
    if prior.reduce is None:
        kept = kept @ weight.reshape(len(weight), -1)
    expand = found.expand.reshape(prior.expand.shape)
    return replace(prior, core=kept.reshape(core.shape), expand=expand, bias=found.bias)


def _rows(
    stop: Stop, reduce: Array | None, shortcut: str | None, as_it_is: Run, width: int
) -> tuple[Array, Array, Array | None]:
    """Take positions from all batches: features (n, width), targets and shift (n, Cout).

    Targets are the teacher's outputs; where a shortcut is added, what is missing to the teacher's
    sum, and the shift is the student's shortcut.
    """
    layer, rng = stop.layer, np.random.default_rng(0)
    channels = layer.size.out_channels
    wanted = max(LEAST_ROWS, ROWS_PER_FEATURE * width)
    wanted = min(wanted, ROWS_BYTES // (4 * (width + 2 * channels)))
    samples = sum(len(x) for _, x, _ in stop.pairs())
    shortcuts = stop.values(shortcut) if shortcut else None
    features, targets, shifts = [], [], []
    for teacher, student, output in stop.pairs():
        y = np.moveaxis(output, layer.channel_axis, -1)
        positions = spread(prod(y.shape[:-1]), ceil(wanted * len(student) / samples), rng)
        places = np.unravel_index(positions, y.shape[:-1])
        if reduce is not None:
            features.append(_patches(layer, reduce, student, positions))
        else:
            own = output if student is teacher else as_it_is(student)
            features.append(np.moveaxis(own, layer.channel_axis, -1)[places] - layer.bias())
        targets.append(y[places])
        if shortcuts is not None:
            right, given = (np.moveaxis(a, layer.channel_axis, -1) for a in next(shortcuts))
            shifts.append(given[places])
            targets[-1] = targets[-1] + right[places] - shifts[-1]
    shift = np.concatenate(shifts) if shifts else None
    return np.concatenate(features), np.concatenate(targets), shift


def _patches(layer: Linear, reduce: Array, maps: Array, positions: Array) -> Array:
    """Return what the kernel sees of the reduced maps, at output positions: (n, r·T)."""
    samples, channels, *size = maps.shape
    matrix = reduce.reshape(len(reduce), channels)
    reduced = (matrix @ maps.reshape(samples, channels, -1)).reshape(samples, len(reduce), *size)
    window = layer.window(size)
    return regression.patches(reduced, positions, **asdict(window))


@dataclass(frozen=True, slots=True)
class _Behind:
    """What comes behind a layer: a shortcut is added to its output, a Relu clips it."""

    shortcut: str | None
    relu: bool


def _behind(graph: gs.Graph, stop: Stop) -> _Behind:
    output = stop.layer.node.outputs[0]
    readers = output.outputs
    if is_output(graph, output) or len(readers) != 1 or not is_op(readers[0], "Add"):
        return _Behind(None, _is_clipped(graph, output))
    (add,) = readers
    others = [tensor.name for tensor in add.inputs if tensor is not output]
    if len(others) != 1 or others[0] not in stop.frontier:
        return _Behind(None, relu=False)
    return _Behind(others[0], _is_clipped(graph, add.outputs[0]))


def _is_clipped(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    readers = tensor.outputs
    return bool(readers) and not is_output(graph, tensor) and all(is_op(r, "Relu") for r in readers)


def _runner(model: Model, layer: Linear, factors: Factors | None, threads: int) -> Run:
    """Load a layer, as it is or split, as a model of its own when it is first run."""
    session = None

    def run(x: Array) -> Array:
        nonlocal session
        if session is None:
            session = runtime.session(_alone(model, layer, factors, x), threads=threads)
        return runtime.run(session, {"x": x}, name=model.name)["y"]

    return run


def _alone(model: Model, layer: Linear, factors: Factors | None, like_this: Array) -> Model:
    proto = ModelProto(ir_version=max(model.proto.ir_version, 4), graph=GraphProto(name="layer"))
    proto.opset_import.extend(model.proto.opset_import)
    alone = Model(proto, path=model.path)
    axes = [f"axis{number}" for number in range(like_this.ndim)]
    x, y = (gs.Variable(name, like_this.dtype, axes) for name in ("x", "y"))
    tensors = [known_constant(t) for t in layer.node.inputs[1:] if not t.is_empty()]
    own = [gs.Constant(f"constant{number}", t._values) for number, t in enumerate(tensors)]
    node = like(layer.node, [x, *own], y)
    alone.graph.inputs.append(x)
    alone.graph.outputs.append(y)
    split = replace(layer, node=node).split(factors, Names(alone)) if factors else [node]
    alone.graph.nodes.extend(split)
    return alone
