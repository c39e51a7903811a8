"""The time of every layer as it is and of every split of it, in place in the whole model.

A layer timed alone, in a loop, would find its weights in the processor's cache, and its input and
output in whatever layout it likes. So the whole model is built in variants, in each of which every
layer is split at one of its options, and each layer's kernels are read off onnxruntime's profile:
as many variants as one layer has options measure all options of all layers.
"""

import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import ModelProto, helper

from pwopt import analysis, cache, graph, runtime
from pwopt.cost import KERNEL_BLOCK, Sides, Split, is_parameter
from pwopt.data import random_data
from pwopt.errors import ModelError
from pwopt.linear import Linear
from pwopt.lowrank import Factors
from pwopt.model import Model
from pwopt.profiling import Profile
from pwopt.progress import Progress
from pwopt.shapes import InputShapes, bind, infer

Plan = Mapping[str, "Option"]
"""A variant of the model: layer → the option it is split at. The others stay as they are."""
_Times = dict[str, float]

LEAST_SPEEDUP = 1.05
"""Options that `Split.speedup` predicts less for are not measured."""

LEAST_GAIN = 1.1
"""An option pays if it makes its layer so many times faster, in place."""

MOST_RANKS = 9
"""Ranks measured for each form of split; wider layers have wider steps."""

MOST_SESSIONS = 8
"""Variants timed in turn with one another, and with the original."""

MOST_BYTES = 10**9
"""Weights that the sessions open at a time may hold, if more than one variant is among them."""

SECONDS = 0.5
"""How long each variant is timed,"""

MOST_ROUNDS = 30
"""but it runs at most so many times."""

_SCHEMA = 1  # raised whenever times measured before would no longer be comparable
_PARTS = {"input": ("reduce", "core"), "output": ("core", "expand")}


@dataclass(frozen=True, slots=True, order=True)
class Option:
    """One way to split a layer: with 1×1 convolutions on these sides, at this rank."""

    sides: Sides
    rank: int

    def __str__(self) -> str:
        return f"{self.sides} {self.rank}"


@dataclass(frozen=True, slots=True)
class Latencies:
    """What each layer takes as it is and at each option, in milliseconds of one run.

    Layers go by `Linear.where`. Layers and options whose kernels could not be told apart in the
    profile are missing; every layer in `options` is in `layers`. `run_ms` is a whole run of the
    model as it is, without profiling. Where `unit` is MACs, all these numbers are MACs instead.
    `key` stands for all that they were measured for.
    """

    run_ms: float
    layers: Mapping[str, float]
    options: Mapping[str, Mapping[Option, float]]
    unit: Literal["ms", "MACs"] = "ms"
    key: str = ""

    def recalled(self, conditions: Mapping[str, str], measure: Callable[[], float]) -> float:
        """Return the speed that was measured under these conditions before; else measure it.

        So the same wish leads to the same plans, although no two measurements are equal.
        """
        if not self.key:
            return measure()
        digest = hashlib.sha256(
            json.dumps([self.key, conditions], sort_keys=True).encode()
        ).hexdigest()
        file = f"latency/{digest[:32]}.json"
        speed = cache.load(file, lambda opened: float(json.load(opened)))
        if speed is None:
            speed = measure()
            cache.store(file, lambda opened: opened.write(json.dumps(speed).encode()))
        return speed

    def paying(self, where: str) -> list[Option]:
        """List the options that make a layer `LEAST_GAIN` times faster, or more."""
        limit = self.layers.get(where, 0.0) / LEAST_GAIN
        return [option for option, time in self.options.get(where, {}).items() if time <= limit]


def options(layer: Linear) -> list[Option]:
    """List the splits of a layer that may pay: ranks of whole kernel blocks, in growing steps.

    A pointwise layer (1×1 Conv, Gemm, MatMul) has one form of split, which is called `output`.
    """
    forms: tuple[Sides, ...] = ("output",) if layer.is_pointwise else ("input", "output", "both")
    return [
        Option(sides, rank)
        for sides in forms
        for rank in _thinned([r for r in _ranks(layer, sides) if _may_pay(layer, sides, r)])
    ]


def measure(
    model: Model,
    layers: Sequence[Linear],
    *,
    shapes: InputShapes | None = None,
    threads: int = 1,
    batch: int = 1,
    progress: Progress | None = None,
) -> Latencies:
    """Time each layer and each of its options in onnxruntime, or recall what was measured before.

    What is recalled was measured for a model of the same structure, whatever its weights, at the
    same input shapes and threads, with the same onnxruntime on the same kind of machine.

    Args:
        model: The model, with the edits made so far; stays as it is.
        layers: Layers of its graph, their sizes at `batch`.
        shapes: Shapes of inputs, where the model leaves them open.
        threads: Threads within one operator.
        batch: What an open first axis of the inputs becomes.
        progress: Told how many variants are measured.

    Raises:
        SpecError: `shapes` does not fit the model's inputs.
        DataError: an input that no random values can be drawn for.
        ModelError: onnxruntime cannot load or run the model.
    """
    grid = {layer.where: options(layer) for layer in layers}
    key = cache_key(model, grid, shapes=shapes, threads=threads, batch=batch)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = f"latency/{digest}.json"
    latencies = cache.load(file, lambda opened: _read(opened, key, grid))
    if latencies is None:
        feeds = next(iter(random_data(model, shapes, batch=batch))).feeds
        latencies = _measured(model, layers, grid, feeds, threads, progress or (lambda *_: None))
        cache.store(file, lambda opened: _write(opened, latencies, key, model.name))
    return replace(latencies, key=digest)


def in_place(
    model: Model, layers: Sequence[Linear], plan: Plan, feeds: runtime.Feeds, *, threads: int = 1
) -> dict[str, tuple[float, float]]:
    """Time the layers of a plan, as they are and split, in turn.

    Returns:
        Layer → both times, in units of all kernels of the model as it is. Layers whose kernels
        could not be told apart are missing.

    Raises:
        ModelError: onnxruntime cannot load or run the model.
    """
    unsplit = model.copy()
    before, after = _shares(unsplit, layers, [{}, plan], feeds, threads)
    return {w: (before[w], after[w]) for w in plan if w in before and w in after}


def by_macs(
    model: Model,
    layers: Sequence[Linear],
    *,
    shapes: InputShapes | None = None,
    batch: int = 1,
) -> Latencies:
    """Count MACs in the place of milliseconds, for hardware that is not at hand.

    Args:
        model: The model.
        layers: Layers of its graph, their sizes at `batch`.
        shapes: Shapes of inputs, where the model leaves them open.
        batch: What an open first axis of the inputs becomes.

    Raises:
        SpecError: `shapes` does not fit the model's inputs.
        ModelError: the MACs of some layer are not known.
    """
    total = analysis.size(model, bind(model, shapes, batch=batch).shapes).macs
    if total is None:
        raise ModelError(f"{model.name}: its MACs are not known; give the input's shape by --shape")
    return Latencies(
        run_ms=total,
        layers={layer.where: layer.size.macs for layer in layers},
        options={
            layer.where: {o: Split(layer.size, o.sides, o.rank).macs for o in options(layer)}
            for layer in layers
        },
        unit="MACs",
    )


# -- the grid ---------------------------------------------------------------------------------


def _ranks(layer: Linear, sides: Sides) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, 16, … kernel blocks, below the channels of the split sides."""
    widths = {"input": layer.size.in_channels, "output": layer.size.out_channels}
    limit = widths.get(sides, min(widths.values()))
    powers = [2**n for n in range(limit.bit_length())]
    blocks = sorted({*powers, *(3 * power for power in powers)})
    return [KERNEL_BLOCK * count for count in blocks if KERNEL_BLOCK * count < limit]


def _may_pay(layer: Linear, sides: Sides, rank: int) -> bool:
    split = Split(layer.size, sides, rank)
    return split.macs < layer.size.macs and split.speedup >= LEAST_SPEEDUP


def _thinned(ranks: Sequence[int]) -> list[int]:
    """Pick `MOST_RANKS` of the rising `ranks` evenly, first and last among them."""
    picked = np.linspace(0, len(ranks) - 1, min(len(ranks), MOST_RANKS))
    return [ranks[round(index)] for index in picked]


# -- measuring --------------------------------------------------------------------------------


def plans(grid: Mapping[str, Sequence[Option]]) -> list[Plan]:
    """List the variants that show every option of every layer once."""
    return [
        {where: found[index] for where, found in grid.items() if index < len(found)}
        for index in range(max(map(len, grid.values()), default=0))
    ]


def groups(sizes: Sequence[int], original: int) -> list[range]:
    """Divide variants, in order, into those whose sessions are open at the same time.

    Args:
        sizes: Bytes of each variant's weights.
        original: Bytes of the original's, which is open beside each group.
    """
    result: list[range] = []
    start, held = 0, original
    for index, size in enumerate(sizes):
        if index > start and (held + size > MOST_BYTES or index - start == MOST_SESSIONS):
            result.append(range(start, index))
            start, held = index, original
        held += size
    return [*result, range(start, len(sizes))] if sizes else []


def _measured(
    model: Model,
    layers: Sequence[Linear],
    grid: Mapping[str, Sequence[Option]],
    feeds: runtime.Feeds,
    threads: int,
    progress: Progress,
) -> Latencies:
    run_ms = _run_ms(model, feeds, threads)
    unsplit = model.copy()
    variants = plans(grid)
    weights = analysis.size(model).weight_bytes
    sizes = [weights + _growth(layers, plan) for plan in variants]
    as_is: list[_Times] = []
    split: list[_Times] = []
    for group in groups(sizes, weights) or [range(0)]:
        progress("measuring layers", len(split), len(variants))
        together: list[Plan] = [{}, *(variants[index] for index in group)]
        original, *others = _shares(unsplit, layers, together, feeds, threads)
        as_is.append(original)
        split += others
    progress("measuring layers", len(variants), len(variants))
    times = {w: run_ms * statistics.median(found[w] for found in as_is) for w in as_is[0]}
    options: dict[str, dict[Option, float]] = {where: {} for where in times}
    for plan, shares in zip(variants, split, strict=True):
        for where in plan.keys() & shares.keys() & times.keys():
            options[where][plan[where]] = run_ms * shares[where]
    return Latencies(run_ms, times, options)


def _run_ms(model: Model, feeds: runtime.Feeds, threads: int) -> float:
    session = runtime.session(model, threads=threads)
    runtime.run(session, feeds, name=model.name)
    return runtime.interleave([session], feeds, seconds=SECONDS).median_ms[0]


def _shares(
    model: Model,
    layers: Sequence[Linear],
    variants: Sequence[Plan],
    feeds: runtime.Feeds,
    threads: int,
) -> list[_Times]:
    """Run variants in turn; return what each layer takes, in units of the first one's kernels.

    On a busy machine every long run is disturbed, but of each kernel some runs are not, and those
    are what the profile goes by. So the sum of the original's kernels is a unit that one group of
    variants has in common with the others.
    """
    with tempfile.TemporaryDirectory(prefix="pwopt-") as place:
        opened = [_open(model, layers, plan, Path(place), threads) for plan in variants]
        sessions = [profile.session for profile, _ in opened]
        seconds = SECONDS * len(sessions)
        runtime.interleave(sessions, feeds, seconds=seconds, max_rounds=MOST_ROUNDS)
        found = [(profile.times(), parts) for profile, parts in opened]
    unit = found[0][0].kernels
    return [
        {
            where: sum(times.layers[name] for name in names) / unit
            for where, names in parts.items()
            if times.layers.keys() >= set(names)  # each part has a kernel of its own
        }
        for times, parts in found
    ]


def _open(
    model: Model, layers: Sequence[Linear], plan: Plan, place: Path, threads: int
) -> tuple[Profile, dict[str, list[str]]]:
    """Open a variant to be profiled; tell which tensors the parts of each layer write."""
    variant = model.beside(model.proto)
    nodes = {node.outputs[0].name: node for node in variant.graph.nodes if node.outputs}
    names = graph.Names(variant)
    parts = {}
    for layer in layers:
        where, option = layer.where, plan.get(layer.where)
        parts[where] = [where]
        if option:
            own = replace(layer, node=nodes[where])
            made = own.split(nominal_factors(Split(layer.size, option.sides, option.rank)), names)
            graph.replace(variant.graph, own.node, made)
            parts[where] = [node.outputs[0].name for node in made]
    _compute_weights(variant.graph, {name for written in parts.values() for name in written}, names)
    return Profile(variant, place, threads=threads), parts


def _compute_weights(nodes: gs.Graph, written: set[str], names: graph.Names) -> None:
    """Let onnxruntime fill the weights of the nodes that write `written`, when it loads the model.

    It folds them to constants before all else, so that kernels and times are the same, but none
    of them is copied, serialised and parsed again on the way. No two are filled with the same
    number: onnxruntime would make one of them, and the layers would find it in the cache.
    """
    readers = [n for n in nodes.nodes if n.outputs and n.outputs[0].name in written]
    for index, node in enumerate(readers):
        weight = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None or weight.dtype.kind != "f" or len(weight.shape) < 2:
            continue  # the Add of a bias
        before = node.inputs[1]
        shape = gs.Constant(names.tensor(f"{before.name}.shape"), np.array(weight.shape))
        filled = gs.Variable(names.tensor(f"{before.name}.filled"), weight.dtype)
        value = np.array([(1 + index / 1024) / _fan_in(weight.shape)], weight.dtype)
        attrs = {"value": gs.Constant(names.tensor(f"{before.name}.value"), value)}
        node.inputs[1] = filled
        nodes.nodes.insert(0, gs.Node("ConstantOfShape", filled.name, attrs, [shape], [filled]))
        graph.remove_if_unread(nodes, before)


def nominal_factors(split: Split) -> Factors:
    """Return factors of the shapes of a split that take averages, and take no memory.

    The values do not matter for the time, as long as what runs through them does not become so
    small as to be denormal.
    """
    names = _PARTS.get(split.sides, ("reduce", "core", "expand"))
    shapes = [(part.out_channels, part.in_channels, *part.kernel) for part in split.parts]
    averages = [np.broadcast_to(np.float32(1 / _fan_in(shape)), shape) for shape in shapes]
    return Factors(**dict(zip(names, averages, strict=True)))


def _fan_in(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _growth(layers: Sequence[Linear], plan: Plan) -> int:
    """Count the bytes by which splits make a model's weights larger; negative if smaller."""
    return sum(
        (Split(layer.size, option.sides, option.rank).params - layer.size.params)
        * graph.known_constant(layer.node.inputs[1]).dtype.itemsize
        for layer in layers
        if (option := plan.get(layer.where))
    )


# -- what is kept -----------------------------------------------------------------------------


def cache_key(
    model: Model,
    grid: Mapping[str, Sequence[Option]],
    *,
    shapes: InputShapes | None = None,
    threads: int = 1,
    batch: int = 1,
) -> dict[str, Any]:
    """Say all that the times depend on: no value of any weight is among it."""
    binding = bind(model, shapes, batch=batch)
    return {
        "schema": _SCHEMA,
        "structure": structure(model, infer(model, binding)),
        "inputs": {name: list(shape) for name, shape in binding.shapes.items()},
        "threads": threads,
        "batch": batch,
        "onnxruntime": onnxruntime.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "options": {where: list(map(str, found)) for where, found in grid.items()},
    }


def structure(model: Model, shapes: Mapping[str, Sequence[int | None]]) -> str:
    """Hash nodes, wiring and the shapes of all tensors, but not the values of weights."""
    skeleton = model.skeleton()
    proto = ModelProto(graph=skeleton.graph, opset_import=skeleton.opset_import)
    proto.functions.extend(skeleton.functions)
    proto.graph.ClearField("doc_string")
    attributes = (a for node in proto.graph.node for a in node.attribute if a.HasField("t"))
    for tensor in (*proto.graph.initializer, *(attribute.t for attribute in attributes)):
        if is_parameter(helper.tensor_dtype_to_np_dtype(tensor.data_type)):
            for values in ("raw_data", "float_data", "double_data", "int32_data"):
                tensor.ClearField(values)
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
    digest.update(repr(sorted(shapes.items())).encode())
    return digest.hexdigest()


def _processor() -> str:
    """Name the processor's model, which `platform` does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _write(file: IO[bytes], latencies: Latencies, key: Mapping[str, Any], model: str) -> None:
    """Write latencies as JSON, for people as well, with what they were measured for."""
    times = {
        where: {str(option): ms for option, ms in found.items()}
        for where, found in latencies.options.items()
    }
    content = {
        "about": f"Milliseconds that pwopt measured for {model}. May be deleted at any time.",
        "measured_for": key,
        "run_ms": latencies.run_ms,
        "layers": latencies.layers,
        "options": times,
    }
    file.write(json.dumps(content, indent=1).encode())


def _read(
    file: IO[bytes], key: Mapping[str, Any], grid: Mapping[str, Sequence[Option]]
) -> Latencies:
    """Read what `_write` wrote for `key`; a file that is not that raises one error or another."""
    content = json.load(file)
    options = {
        where: {option: times[str(option)] for option in grid[where] if str(option) in times}
        for where, times in content["options"].items()
    }
    layers = {where: content["layers"][where] for where in options}
    found = Latencies(content["run_ms"], layers, options)
    rows = [layers, *options.values()]
    numbers = [found.run_ms, *(ms for row in rows for ms in row.values())]
    if content["measured_for"] != key or not all(0 < ms < math.inf for ms in numbers):
        raise ValueError("was not measured for this")
    return found
