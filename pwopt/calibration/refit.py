"""Split layers fitted to what really reaches them, from the first to the last.

A split changes what all later layers read. So each split layer is fitted in turn: to give the
*original* layer's outputs on the inputs that the network has once all earlier layers are split
(Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks", asymmetric reconstruction).

The 1×1 in front comes in closed form, from the moments of those inputs and from what neighbouring
positions have in common; what follows is regressed on it. Where a Relu follows, the error behind
the Relu counts; where the layer's output is added to a shortcut, the sum is what is reconstructed
(He et al. 2017, "Channel Pruning", section 3.3), so that the error that the shortcut brings is
mended as well.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod

import numpy as np
import onnx_graphsurgeon as gs

from pwopt.calibration.alone import Run, runner
from pwopt.calibration.samples import spread
from pwopt.calibration.walk import Stop, Walk
from pwopt.cost import Split
from pwopt.data import Batch
from pwopt.errors import ModelError
from pwopt.graph import is_op, is_output
from pwopt.linear import Linear
from pwopt.lowrank import Factors, regression
from pwopt.lowrank.calibrated import Splitter
from pwopt.lowrank.moments import Moments
from pwopt.model import Model
from pwopt.progress import Progress
from pwopt.runtime import Array

ROWS_PER_FEATURE = 10
"""Positions that a regression takes from all samples together, for each number it reads, …"""

LEAST_ROWS = 1 << 14
"""… but no fewer than so many, if there are so many, …"""

ROWS_BYTES = 256 << 20
"""… and no more than fit into these bytes."""

DAMPING = 0.01
"""Pull to the closed form: late layers of small maps have few rows for their features."""

TAP_ROWS = 4096
"""Positions at which it is estimated how alike neighbours are."""


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
        ModelError: onnxruntime cannot run a part of the model, or it puts out NaN.
    """
    chosen = [layer for layer in layers if layer.where in splits]
    fitted: dict[str, Factors] = {}
    for stop in Walk(model, chosen, batches, threads=threads):
        layer, split = stop.layer, splits[stop.layer.where]
        if progress:
            progress("fitting layers", len(fitted), len(chosen))
        behind = _behind(model.graph, stop)
        try:
            if split.sides == "output":
                factors = _fit_output_side(model, stop, split, behind, batches, threads)
            else:
                factors = _fit_reduced(stop, split, behind, batches)
        except ValueError as error:
            raise ModelError(
                f"{model.name}: '{layer.where}' cannot be fitted: {error}; look for NaN in the "
                "weights and in the samples"
            ) from error
        fitted[layer.where] = factors
        stop.replace(runner(model, layer, factors, threads))
    return fitted


@dataclass(frozen=True, slots=True)
class _Behind:
    """What comes behind a layer: a shortcut is added to its output, a Relu clips it."""

    shortcut: str | None
    relu: bool


def _fit_output_side(
    model: Model,
    stop: Stop,
    split: Split,
    behind: _Behind,
    batches: Sequence[Batch],
    threads: int,
) -> Factors:
    """Regress on the layer's own outputs, before the bias, at the rank of the split."""
    layer, channels = stop.layer, stop.layer.size.out_channels
    rows = _draw(stop, channels, behind.shortcut, batches)
    features = _own_outputs(stop, rows, runner(model, layer, None, threads))
    # From here on neither the session nor a copy of the weight is in memory: those of the first
    # Gemm of a VGG-16 are larger than all that the regression needs.
    identity = np.eye(channels, dtype=features.dtype)
    found = rows.regress(features, identity, relu=behind.relu, rank=split.rank)
    weight = layer.weight()
    kind = np.promote_types(weight.dtype, np.float32)
    core = np.tensordot(found.core.astype(kind), weight, axes=1)
    return Factors(core, expand=_pointwise(found.expand, core), bias=found.bias)


def _fit_reduced(stop: Stop, split: Split, behind: _Behind, batches: Sequence[Batch]) -> Factors:
    """Reduce the input in closed form, and regress on what the kernel sees of that."""
    layer = stop.layer
    rows = _draw(stop, split.rank * prod(layer.size.kernel), behind.shortcut, batches)
    inputs = _inputs(stop, batches)
    splitter = Splitter(
        layer.weight(),
        layer.bias(),
        inputs=inputs,
        outputs=Moments.of(rows.targets),
        taps=_taps(stop, rows.positions, inputs.mean),
    )
    prior = splitter.split(split.sides, split.rank)
    assert prior.reduce is not None
    matrix = prior.reduce.reshape(split.rank, -1)
    weight = prior.core.reshape(len(prior.core), -1)
    if prior.expand is not None:
        weight = prior.expand.reshape(-1, split.rank) @ weight

    def patches() -> Iterator[Array]:
        for (_, student), at in zip(stop.values(stop.input), rows.positions, strict=True):
            samples, channels, *size = student.shape
            reduced = matrix @ student.reshape(samples, channels, -1)
            maps = reduced.reshape(samples, split.rank, *size)
            yield regression.patches(maps, at, **asdict(layer.window(size)))

    features = _stacked(patches(), rows.targets, weight.shape[1])
    rank = None if prior.expand is None else split.rank
    found = rows.regress(features, weight, relu=behind.relu, rank=rank)
    core = found.core.reshape(prior.core.shape)
    return Factors(core, prior.reduce, _pointwise(found.expand, core), found.bias)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What a layer is to be fitted to, at positions drawn from all batches.

    Attributes:
        positions: Of each batch, flat indices over its samples and the axes of the output.
        targets: The teacher's outputs (n, Cout); where a shortcut is added, what the student's
            shortcut lacks of the teacher's sum.
        shift: The student's shortcut (n, Cout), if there is one.
    """

    positions: list[Array]
    targets: Array
    shift: Array | None

    def regress(
        self, features: Array, prior: Array, *, relu: bool, rank: int | None
    ) -> regression.Regression:
        return regression.regress(
            features,
            self.targets,
            prior,
            rank=rank,
            relu=relu,
            shift=self.shift,
            damping=DAMPING,
        )


def _draw(stop: Stop, width: int, shortcut: str | None, batches: Sequence[Batch]) -> _Rows:
    """Draw positions evenly from all samples, for a regression that reads `width` numbers."""
    layer, rng = stop.layer, np.random.default_rng(0)
    channels = layer.size.out_channels
    wanted = max(LEAST_ROWS, ROWS_PER_FEATURE * width)
    wanted = min(wanted, ROWS_BYTES // (4 * (width + 2 * channels)))
    shortcuts = stop.values(shortcut) if shortcut else None
    positions, targets, shifts = [], [], []
    for count, (_, _, output) in zip(_shares(wanted, batches), stop.pairs(), strict=True):
        at = spread(output.size // channels, count, rng)
        positions.append(at)
        targets.append(_at(layer, output, at))
        if shortcuts is not None:
            right, given = (
                _at(layer, np.broadcast_to(array, output.shape), at) for array in next(shortcuts)
            )
            shifts.append(given)
            targets[-1] += right - given
    shift = np.concatenate(shifts) if shifts else None
    return _Rows(positions, np.concatenate(targets), shift)


def _own_outputs(stop: Stop, rows: _Rows, as_it_is: Run) -> Array:
    """Return what the layer makes of the student's input, before the bias: (n, Cout)."""
    layer, bias = stop.layer, stop.layer.bias()

    def own() -> Iterator[Array]:
        for (teacher, student, output), at in zip(stop.pairs(), rows.positions, strict=True):
            yield _at(layer, output if student is teacher else as_it_is(student), at) - bias

    return _stacked(own(), rows.targets, layer.size.out_channels)


def _inputs(stop: Stop, batches: Sequence[Batch]) -> Moments:
    """Take the moments of the channels that the student reads."""
    layer, rng = stop.layer, np.random.default_rng(0)
    channels = layer.size.in_channels
    counts = _shares(max(LEAST_ROWS, ROWS_PER_FEATURE * channels), batches)
    rows = []
    for count, (_, student) in zip(counts, stop.values(stop.input), strict=True):
        at = spread(student.size // channels, count, rng)
        rows.append(_at(layer, student, at))
    return Moments.of(np.concatenate(rows))


def _shares(rows: int, batches: Sequence[Batch]) -> list[int]:
    """Divide rows among the batches by their samples, rounded up."""
    samples = sum(batch.samples for batch in batches)
    return [ceil(rows * batch.samples / samples) for batch in batches]


def _taps(stop: Stop, positions: Sequence[Array], mean: Array) -> Array | None:
    """Estimate what the input under one tap has in common with that under another: (T, T).

    None where the input does not vary.
    """
    layer = stop.layer
    taps = prod(layer.size.kernel)
    step = max(1, sum(map(len, positions)) // TAP_ROWS)
    products = np.zeros((taps, taps))
    for (_, student), at in zip(stop.values(stop.input), positions, strict=True):
        size = student.shape[2:]
        centred = student - mean.astype(student.dtype).reshape(-1, *[1] * len(size))
        seen = regression.patches(centred, at[::step], **asdict(layer.window(size)))
        seen = seen.reshape(-1, taps)
        products += seen.T @ seen
    return products / products.diagonal().max() if products.any() else None


def _at(layer: Linear, array: Array, positions: Array) -> Array:
    """Take channels at some positions of what a layer reads or writes: (n, C)."""
    rows = np.moveaxis(array, layer.channel_axis, -1)
    return rows[np.unravel_index(positions, rows.shape[:-1])]


def _stacked(parts: Iterable[Array], like_these: Array, width: int) -> Array:
    """Stack rows as many as others, with no more than one of the parts in memory beside them."""
    rows, start = np.empty((len(like_these), width), like_these.dtype), 0
    for part in parts:
        rows[start : start + len(part)] = part
        start += len(part)
    return rows


def _pointwise(matrix: Array | None, like_this: Array) -> Array | None:
    """Give a matrix the shape of a 1×1 kernel of as many axes as another kernel."""
    return None if matrix is None else matrix.reshape(*matrix.shape, *[1] * (like_this.ndim - 2))


def _behind(graph: gs.Graph, stop: Stop) -> _Behind:
    output = stop.layer.node.outputs[0]
    readers = output.outputs
    if is_output(graph, output) or len(readers) != 1 or not is_op(readers[0], "Add"):
        return _Behind(None, _is_clipped(graph, output))
    (add,) = readers
    others = [tensor.name for tensor in add.inputs if tensor is not output]
    if len(others) != 1 or others[0] not in stop.frontier or not _adds_to(stop, others[0]):
        return _Behind(None, relu=False)
    return _Behind(others[0], _is_clipped(graph, add.outputs[0]))


def _adds_to(stop: Stop, shortcut: str) -> bool:
    """Tell whether the sum of a layer's output and a shortcut has the shape of the output."""
    shape, (_, _, output) = next(stop.values(shortcut))[0].shape, next(stop.pairs())
    return np.broadcast_shapes(shape, output.shape) == output.shape


def _is_clipped(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    readers = tensor.outputs
    return bool(readers) and not is_output(graph, tensor) and all(is_op(r, "Relu") for r in readers)
