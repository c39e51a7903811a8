"""Whether an edit pays, and whether it is right at its own site."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from pwopt import runtime
from pwopt.analysis import size
from pwopt.data import random_data
from pwopt.editing import Edit
from pwopt.errors import ModelError, PwoptError
from pwopt.model import Model
from pwopt.proof import difference
from pwopt.rewriting import Judgement
from pwopt.shapes import InputShapes, bind, infer_types
from pwopt.site import extract, neighbours

Gate = Literal["measured", "macs", "always"]
_Results = dict[str, runtime.Array]

HOPS = 2
"""Neighbours timed along with a site: kernels fuse with them and share their memory layout."""

SECONDS = 1.0
"""How long the two forms of one site are timed."""

LARGEST_POOLED = 2**16
"""Elements up to which a site with a pool is checked in float64; beyond, that takes seconds."""

LARGEST_WEIGHTS = 64 << 20
"""Bytes of constants up to which a site is checked in float64, which takes a multiple of them."""

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
        shapes: InputShapes | None = None,
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
        try:
            fault = _fault(before, after)
        except PwoptError as error:
            return Judgement(False, f"cannot be checked: {error}")
        if fault:
            return Judgement(False, f"fault of the pass, please report it: {fault}", {"fault": 1})
        if free or self.gate == "always":
            return Judgement(True, "")
        if self.gate == "macs":
            return _fewer_macs(before, after)
        try:
            return self._faster(*self._forms(model, edit, hops=HOPS))
        except PwoptError as error:
            return Judgement(False, f"cannot be measured: {error}")

    def _forms(self, model: Model, edit: Edit, *, hops: int) -> tuple[Model, Model]:
        """Return the site before and after the edit, with its neighbours, as models."""
        around = neighbours(edit.new, hops)
        edit.undo()
        try:
            around += neighbours(edit.old, hops)
            edited = {id(node) for node in (*edit.old, *edit.new)}
            context = {id(node): node for node in around if id(node) not in edited}.values()
            # Both forms stand between the same tensors, so the types from before serve both.
            types = infer_types(model, bind(model, self.shapes, batch=self.batch))
            before = extract(model, [*edit.old, *context], types)
        finally:
            edit.redo()
        after = extract(model, [*edit.new, *context], types)
        _share_inputs(before, after)
        return before, after

    def _faster(self, before: Model, after: Model) -> Judgement:
        feeds = next(iter(random_data(before))).feeds
        sessions = [runtime.session(site, threads=self.threads) for site in (before, after)]
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


def _share_inputs(before: Model, after: Model) -> None:
    """Give both forms the inputs of either, since both run on the same feeds."""
    inputs = {info.name: info for site in (after, before) for info in site.proto.graph.input}
    for site in (before, after):
        known = {info.name for info in site.proto.graph.input}
        site.proto.graph.input.extend(i for name, i in inputs.items() if name not in known)


def _fault(before: Model, after: Model) -> str | None:
    """Compare the two forms of a site on random inputs in float64; None if they agree.

    onnx's reference evaluator computes in float64. Where it does not compute what onnxruntime does
    (some old operator versions), onnxruntime's own results are compared instead; where onnxruntime
    has no kernel (a Conv of doubles), the evaluator is asked alone.

    Raises:
        PwoptError: no random inputs can be drawn, or neither of the two can run the site.
    """
    feeds = next(iter(random_data(before))).feeds
    dtypes = {output.name: output.dtype for output in before.graph.outputs}

    def differ(a: _Results, b: _Results) -> str | None:
        return _disagreement(a, b, dtypes)

    run, exact = (_attempt(how, before, feeds) for how in (_in_onnxruntime, _in_float64))
    if run is None and exact is None:
        raise ModelError("neither onnxruntime nor onnx's reference can run the site")
    try:
        if run is None:
            assert exact is not None
            return differ(exact, _in_float64(after, feeds))
        run_after = _in_onnxruntime(after, feeds)
    except ModelError as error:
        return str(error)
    exact_after = _attempt(_in_float64, after, feeds)
    if exact is None or exact_after is None:
        return differ(run, run_after)
    trusted = differ(run, exact) is None and differ(run_after, exact_after) is None
    return differ(exact, exact_after) if trusted else differ(run, run_after)


def _attempt(
    how: Callable[[Model, runtime.Feeds], _Results], site: Model, feeds: runtime.Feeds
) -> _Results | None:
    try:
        return how(site, feeds)
    except ModelError:
        return None


def _in_onnxruntime(site: Model, feeds: runtime.Feeds) -> _Results:
    return runtime.run(runtime.session(site), feeds, name="the site")


def _in_float64(site: Model, feeds: runtime.Feeds) -> _Results:
    pools = any(node.op.endswith("Pool") for node in site.graph.nodes)
    if pools and sum(values.size for values in feeds.values()) > LARGEST_POOLED:
        raise ModelError("onnx's reference pools element by element, which takes too long")
    if size(site).weight_bytes > LARGEST_WEIGHTS:
        raise ModelError("its weights take too much memory in float64")
    names = [output.name for output in site.graph.outputs]
    doubled = {name: _doubled(values) for name, values in feeds.items()}
    try:
        results = ReferenceEvaluator(_in_doubles(site)).run(names, doubled)
    except Exception as error:  # whatever numpy raises
        raise ModelError(f"onnx's reference cannot run the site: {error}") from error
    return dict(zip(names, map(np.asarray, results), strict=True))


def _disagreement(
    before: _Results, after: _Results, dtypes: Mapping[str, np.dtype[Any]]
) -> str | None:
    """Say how results differ by more than is allowed for their type, to which weights are rounded.

    Only what `dtypes` names is compared.
    """
    try:
        with np.errstate(over="ignore"):  # becomes infinite, in both
            for name, dtype in dtypes.items():
                a, b = (results[name].astype(dtype) for results in (before, after))
                difference("the site", name, a, b)
    except KeyError as error:
        return f"output {error} is missing"
    except ModelError as error:
        return str(error)
    return None


def _doubled(values: runtime.Array) -> runtime.Array:
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _in_doubles(site: Model) -> ModelProto:
    """Write a site with every floating-point tensor in float64."""
    site = site.copy()
    for node in site.graph.nodes:
        attributes = [value for value in node.attrs.values() if isinstance(value, gs.Constant)]
        for tensor in (*node.inputs, *node.outputs, *attributes):
            if isinstance(tensor, gs.Constant):
                tensor.values = _doubled(tensor.values)
            elif tensor.dtype is not None and np.dtype(tensor.dtype).kind == "f":
                tensor.dtype = np.dtype(np.float64)
    return site.to_proto()
