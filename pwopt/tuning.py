"""Bottlenecks chosen by measured time and by what they do to the outputs: `--bottleneck auto`."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pwopt import runtime
from pwopt.analysis import size
from pwopt.calibration import LIMIT, gather
from pwopt.calibration.augment import prepare
from pwopt.calibration.closed_forms import ClosedForms
from pwopt.candidates import has_bottleneck
from pwopt.cost import COUNTED_OPS, Split
from pwopt.data import Samples, random_data
from pwopt.errors import BoundError, ModelError
from pwopt.graph import is_op
from pwopt.linear import Linear, linear
from pwopt.model import Model
from pwopt.progress import Progress
from pwopt.rewriting import Event
from pwopt.search import latency, sensitivity
from pwopt.search.front import Front
from pwopt.search.latency import Latencies
from pwopt.search.search import WORST_HARM, Bounds, Search, Trial
from pwopt.search.yardstick import Yardstick
from pwopt.shapes import InputShapes, Shape, bind, infer

CURVE = 8
"""Models that are built for the curve of speed against accuracy."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning found.

    Attributes:
        model: The model with layers split, or as it was given where nothing was worth it.
        events: What became of each layer with a weight.
        front: All models that were built, measured and judged; the one chosen among them.
    """

    model: Model
    events: tuple[Event, ...]
    front: Front


def tune(
    original: Model,
    model: Model,
    samples: Samples,
    bounds: Bounds,
    *,
    by_macs: bool = False,
    curve: bool = False,
    limit: int = LIMIT,
    shapes: InputShapes | None = None,
    threads: int = 1,
    batch: int = 1,
    seed: int = 0,
    worst_harm: float = WORST_HARM,
    progress: Progress | None = None,
) -> Tuned:
    """Split layers of `model` so that the bounds hold.

    Args:
        original: What speed and accuracy are measured against.
        model: The same network with exact rewrites made; stays as it is.
        samples: To calibrate on, and to judge by.
        bounds: What is wanted.
        by_macs: Go by MACs instead of measured time, for hardware that is not at hand.
        curve: Build models all along the curve of speed against accuracy as well.
        limit: Samples to use at most.
        shapes: Open axes of the inputs.
        threads: Threads to measure with.
        batch: Batch to measure at.
        seed: Of the images' shifts and of bootstraps.
        worst_harm: What is foretold to do more harm (nats, or relative error) is not built.
        progress: Told how far it is.

    Raises:
        BoundError: no model within the bounds was found.
        DataError: too few samples, or some that do not fit.
        ModelError: onnxruntime cannot run the model.
    """
    cores = runtime.cores()
    if bounds.max_macs is not None and size(model, shapes).macs is None:
        raise ModelError(f"{model.name}: its MACs are not known; give the input's shape by --shape")
    ready = prepare(samples, limit, seed=seed)
    known = infer(model, bind(model, shapes, batch=batch))
    nodes = [node for node in model.graph.nodes if is_op(node, *COUNTED_OPS)]
    seen = {node.outputs[0].name: _layer(node, known) for node in nodes}
    layers = [layer for layer in seen.values() if isinstance(layer, Linear)]
    if by_macs:
        table = latency.by_macs(model, layers, shapes=shapes, batch=batch)
    else:
        table = latency.measure(
            model, layers, shapes=shapes, threads=threads, batch=batch, progress=progress
        )
    layers = [layer for layer in layers if table.paying(layer.where)]
    forms = ClosedForms(gather(model, layers, ready.fit, threads=cores, progress=progress), known)
    harms = sensitivity.measure(
        model,
        layers,
        {layer.where: table.paying(layer.where) for layer in layers},
        lambda layer, option: forms.split(layer, option.sides, option.rank),
        ready.tried,
        threads=cores,
        progress=progress,
    )
    feeds = next(iter(random_data(original, shapes, batch=batch))).feeds
    yardstick = Yardstick(
        original,
        ready.judged,
        feeds,
        shapes=shapes,
        threads=threads,
        cores=cores,
        seed=seed,
        source=samples.name,
    )
    search = Search(
        model,
        layers,
        table,
        harms,
        ready.fit,
        yardstick,
        shapes=shapes,
        batch=batch,
        cores=cores,
        worst_harm=worst_harm,
        progress=progress,
    )
    best = search.find(bounds)
    if best is None:
        raise BoundError(f"{original.name}: {_unreached(bounds, search)}")
    if curve:
        search.curve(CURVE)
    front = Front(
        model=original.name,
        original=yardstick.original(),
        points=tuple(trial.point for trial in search.trials),
        chosen=search.trials.index(best),
        threads=threads,
        batch=batch,
        samples=yardstick.samples,
        caution=yardstick.caution,
    )
    events = tuple(_event(where, layer, best, table, search) for where, layer in seen.items())
    return Tuned(search.model(best), events, front)


def _layer(node: gs.Node, known: Mapping[str, Shape]) -> Linear | str:
    if node.op == "Conv" and has_bottleneck(node):
        return "has a 1×1 bottleneck already"
    return linear(node, known)


def _unreached(bounds: Bounds, search: Search) -> str:
    """Say what could not be had, and what comes nearest."""
    wanted = []
    if bounds.speedup is not None:
        wanted.append(f"{bounds.speedup:g} times as fast")
    if bounds.max_drop is not None:
        wanted.append(f"at most {bounds.max_drop:g} points lost")
    if bounds.max_macs is not None:
        wanted.append(f"at most {bounds.max_macs:,} MACs")
    if bounds.max_params is not None:
        wanted.append(f"at most {bounds.max_params:,} parameters")
    text = f"no allocation found that is {' with '.join(wanted)}"
    if not search.trials:
        if bounds.speedup is None:
            return f"{text}; nothing so small is worth building"
        return f"{text}; nothing faster than {search.limit:.2f}× is worth building"
    fastest = max((trial.point for trial in search.trials), key=lambda point: point.speedup)
    unit = "points" if fastest.measure != "error" else "% error"
    return f"{text}; {fastest.speedup:.2f}× loses {fastest.loss:.3g} {unit}"


def _event(where: str, layer: Linear | str, best: Trial, table: Latencies, search: Search) -> Event:
    """Say what became of a layer, and why."""
    if isinstance(layer, str):
        return Event("skipped", where, layer)
    option = best.plan.get(where)
    if option is None:
        return Event("skipped", where, _why_not(layer, table, search))
    split = Split(layer.size, option.sides, option.rank)
    before, after = table.layers[where], table.options[where][option]
    data = {
        "sides": option.sides,
        "rank": option.rank,
        "macs": split.macs,
        "params": split.params,
        "predicted_speedup": round(before / after, 3),
        "before": round(before, 6),
        "after": round(after, 6),
        "unit": table.unit,
        "harm": search.harm(where, option),
    }
    return Event("rewrote", where, f"split on {option.sides} at rank {option.rank}", data)


def _why_not(layer: Linear, table: Latencies, search: Search) -> str:
    where, times = layer.where, table.options.get(layer.where, {})
    if where in search.put_back:
        return search.put_back[where]
    if where not in table.options:
        return "its kernels could not be told apart in onnxruntime's profile"
    if not times:
        return "too narrow: no split is foretold to save time"
    if not table.paying(where):
        best = min(times, key=lambda option: times[option])
        return f"no split pays in place: {table.layers[where] / times[best]:.2f}× at {best}"
    return "its splits cost more accuracy than their time is worth"
