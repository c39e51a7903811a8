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

    def __call__(self, model: Model, edit: Edit, *, free: bool) -> Judgement:
        """Judge an edit that is in place, as `pwopt.rewriting.Judge` says."""
        before, after = self._forms(model, edit, hops=0)
        if fault := _fault(before, after):
            return Judgement(False, f"fault of the pass, please report it: {fault}", {"fault": 1})
        if free or self.gate == "always":
            return Judgement(True, "")
        if self.gate == "macs":
            return _fewer_macs(before, after)
        return self._faster(*self._forms(model, edit, hops=HOPS))

    def _forms(self, model: Model, edit: Edit, *, hops: int) -> tuple[Model, Model]:
        """Return the site before and after the edit, with its neighbours, as models."""
        after = self._site(model, edit.new, hops)
        edit.undo()
        before = self._site(model, edit.old, hops)
        edit.redo()
        return before, after

    def _site(self, model: Model, nodes: Sequence[gs.Node], hops: int) -> Model:
        types = infer_types(model, bind(model, self.shapes, batch=self.batch))
        return extract(model, neighbours(nodes, hops), types)

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
    if old.macs is None or new.macs is None:
        return Judgement(False, "its MACs are not known; give the input's shape with --shape")
    data = {"macs_before": old.macs, "macs_after": new.macs}
    if (new.macs, new.params) < (old.macs, old.params):
        return Judgement(True, "", data)
    return Judgement(False, f"not cheaper: {old.macs:,} MACs before, {new.macs:,} after", data)


def _fault(before: Model, after: Model) -> str | None:
    """Compare the two forms of a site on random inputs in float64; None if they agree.

    onnx's reference evaluator computes in float64. Where it does not compute what onnxruntime does
    (some old operator versions), onnxruntime's own results are compared instead.
    """
    feeds = next(iter(random_data(before))).feeds
    names = [output.name for output in before.graph.outputs]
    sites = {"before": before, "after": after}
    try:
        run = {key: runtime.run(runtime.session(s), feeds, name=key) for key, s in sites.items()}
        doubled = {name: _doubled(values) for name, values in feeds.items()}
        exact = {key: _in_float64(site, names, doubled) for key, site in sites.items()}
    except ModelError as error:
        return str(error)
    trusted = all(_difference(run["before"][n], exact["before"][n]) is None for n in names)
    results = exact if trusted else run
    faults = (_difference(results["before"][n], results["after"][n]) for n in names)
    return next((fault for fault in faults if fault), None)


def _in_float64(site: Model, names: list[str], feeds: runtime.Feeds) -> dict[str, runtime.Array]:
    try:
        values = ReferenceEvaluator(_in_doubles(site).to_proto()).run(names, dict(feeds))
    except Exception:  # whatever numpy raises; then there is nothing to trust
        return dict.fromkeys(names, np.array(np.nan))
    return dict(zip(names, map(np.asarray, values), strict=True))


def _difference(before: runtime.Array, after: runtime.Array) -> str | None:
    """Say how two results differ beyond the tolerance of float32, to which weights are rounded."""
    try:
        difference("the site", "y", before.astype(np.float32), after.astype(np.float32))
    except ModelError as error:
        return str(error)
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
