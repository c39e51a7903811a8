"""Whether an edit pays, and whether it is right at its own site."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from pwopt import runtime
from pwopt.analysis import size
from pwopt.data import random_data
from pwopt.editing import Edit
from pwopt.errors import ModelError
from pwopt.model import Model
from pwopt.proof import difference
from pwopt.rewriting import Judgement
from pwopt.shapes import bind, infer_types
from pwopt.site import extract, neighbours

Gate = Literal["measured", "macs", "always"]

HOPS = 2
"""Neighbours timed along with a site: kernels fuse with them and share their memory layout."""

SECONDS = 1.0
"""How long the two forms of one site are timed."""

LEAST_GAIN = 1.01
"""Ties are left alone: the lower end of the measured ratio's interval must reach this."""


class SiteJudge:
    """Accepts an edit that pays by `gate` and gives the same numbers in float64.

    measured: the site with its neighbours, before and after, is timed in onnxruntime in turn, at
    `threads` and `batch`. macs: there are fewer MACs, or as many and fewer parameters. always:
    whatever is legal, for hardware that onnxruntime cannot speak for.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        shapes: Mapping[str, Sequence[int]] | None = None,
        threads: int = 1,
        batch: int = 1,
    ) -> None:
        self.gate = gate
        self.shapes = shapes
        self.threads = threads
        self.batch = batch

    def __call__(self, model: Model, edit: Edit) -> Judgement:
        after = self._sites(model, edit.new)
        edit.undo()
        before = self._sites(model, edit.old)
        edit.redo()
        if fault := _fault(before[0], after[0]):
            return Judgement(False, f"fault of the pass, please report it: {fault}", {"fault": 1})
        if self.gate == "always":
            return Judgement(True, "")
        if self.gate == "macs":
            return _fewer_macs(before[0], after[0])
        return self._faster(before[1], after[1])

    def _sites(self, model: Model, nodes: Sequence[gs.Node]) -> tuple[Model, Model]:
        """Return the nodes as a model, and the nodes with their neighbours."""
        types = infer_types(model, bind(model, self.shapes, batch=self.batch))
        around = neighbours(nodes, HOPS)
        return extract(model, nodes, types), extract(model, around, types)

    def _faster(self, before: Model, after: Model) -> Judgement:
        sessions = [runtime.session(site, threads=self.threads) for site in (before, after)]
        feeds = next(iter(random_data(before))).feeds
        speedup = runtime.interleave(sessions, feeds, seconds=SECONDS).speedup(0, 1)
        low, high = speedup.ci95
        data = {"speedup": round(speedup.ratio, 3), "low": round(low, 3), "high": round(high, 3)}
        measured = f"measured {speedup.ratio:.2f}× [{low:.2f}, {high:.2f}]"
        if low < LEAST_GAIN:
            return Judgement(False, f"not faster: {measured}", data)
        return Judgement(True, measured, data)


def _fewer_macs(before: Model, after: Model) -> Judgement:
    old, new = size(before), size(after)
    data = {"macs_before": old.macs, "macs_after": new.macs}
    if (new.macs, new.params) < (old.macs, old.params):
        return Judgement(True, "", data)
    return Judgement(False, f"not cheaper: {old.macs:,} MACs before, {new.macs:,} after", data)


def _fault(before: Model, after: Model) -> str | None:
    """Compare the two forms of a site on random inputs in float64; None if they agree."""
    feeds = next(iter(random_data(before))).feeds
    feeds = {name: _doubled(values) for name, values in feeds.items()}
    names = [output.name for output in before.graph.outputs]
    try:
        forms = [
            ReferenceEvaluator(_in_doubles(site).to_proto()).run(names, feeds)
            for site in (before, after)
        ]
        for name, a, b in zip(names, *forms, strict=True):
            # Weights were rounded to their type, so its tolerance holds.
            difference("the site", name, a.astype(np.float32), b.astype(np.float32))
    except ModelError as error:
        return str(error)
    except Exception as error:  # the reference raises whatever numpy raises
        return f"{type(error).__name__}: {error}"
    return None


def _doubled(values: runtime.Array) -> runtime.Array:
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _in_doubles(site: Model) -> Model:
    """Turn every floating-point tensor of a site into float64."""
    for node in site.graph.nodes:
        attributes = [value for value in node.attrs.values() if isinstance(value, gs.Constant)]
        for tensor in (*node.inputs, *node.outputs, *attributes):
            if isinstance(tensor, gs.Constant):
                tensor.values = _doubled(tensor.values)
            elif tensor.dtype is not None and np.dtype(tensor.dtype).kind == "f":
                tensor.dtype = np.dtype(np.float64)
    return site
