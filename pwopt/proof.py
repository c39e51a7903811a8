"""The proof of an exact rewrite: the whole model against the original, in onnxruntime."""

from collections.abc import Iterator

import numpy as np
import onnxruntime as ort

from pwopt import runtime
from pwopt.data import random_data
from pwopt.errors import ModelError
from pwopt.model import Model
from pwopt.shapes import InputShapes, bind, inputs

TOLERANCE = {"float16": 2e-2, "float32": 1e-4, "float64": 1e-9}
"""Largest difference allowed, over the output's largest value, by its type.

About a hundred roundings of the type: sums are taken in another order, and folded weights are
rounded once more. Outputs of other types must be equal.
"""

SIZES = ((1, 0), (3, 32), (1, 33))
"""Batches, and pixels by which open heights and widths grow; the last makes even ones odd."""

_TINY = float(np.finfo(np.float32).tiny)


def prove(original: Model, rewritten: Model, shapes: InputShapes | None = None) -> float:
    """Run both models on random inputs, at the `SIZES` that the original leaves open.

    Sizes beyond the first are left out where the original itself does not take them.

    Returns:
        The largest difference of any output, over that output's largest value.

    Raises:
        ModelError: an output differs by more than `TOLERANCE`, in shape or in type; or
            onnxruntime cannot run a model, so that there is no proof.
        DataError: an input takes strings or complex numbers.
    """
    before = _session(original, f"{original.name}: cannot be proven unchanged")
    after = _session(rewritten, f"{original.name}: the rewrite is a fault, please report it")
    worst = 0.0
    tried: list[InputShapes] = []
    for binding in _bindings(original, shapes):
        if binding in tried:
            continue
        for batch in random_data(original, binding):
            try:
                a = runtime.run(before, batch.feeds, name=original.name)
            except ModelError:
                if tried:
                    break
                raise
            b = runtime.run(after, batch.feeds, name=f"{rewritten.name} (rewritten)")
            for name in a:
                worst = max(worst, difference(original.name, name, a[name], b[name]))
        tried.append(binding)
    return worst


def _session(model: Model, meaning: str) -> ort.InferenceSession:
    try:
        return runtime.session(model)
    except ModelError as error:
        raise ModelError(f"{meaning} ({error})") from error


def difference(model: str, name: str, before: runtime.Array, after: runtime.Array) -> float:
    """Return max |before − after| / max |before|; NaN and infinities must be the same.

    Raises:
        ModelError: it is more than `TOLERANCE` of the type, or the shapes or types differ.
    """
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        raise ModelError(
            f"{model}: output '{name}' is {after.dtype}{list(after.shape)} after the rewrite, "
            f"{before.dtype}{list(before.shape)} before it; this is a fault, please report it"
        )
    is_float = before.dtype.kind == "f"
    finite = np.isfinite(before) & is_float  # all others must be the same
    same = np.array_equal(before[~finite], after[~finite], equal_nan=is_float)
    a, b = (values[finite].astype(np.float64) for values in (before, after))
    error = float(np.abs(a - b).max(initial=0)) if same else float("inf")
    largest = float(np.abs(a).max(initial=0))
    relative = error / max(largest, _TINY) if error else 0.0
    if not relative <= TOLERANCE.get(before.dtype.name, 0.0):
        raise ModelError(
            f"{model}: output '{name}' differs by {relative:.1e} of its largest value after the "
            "rewrite; this is a fault, please report it"
        )
    return relative


def _bindings(model: Model, shapes: InputShapes | None) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the input shapes to try; `shapes` as given, else what is open varied."""
    declared = {i.name: i.shape for i in inputs(model)}
    for batch, growth in SIZES:
        bound = bind(model, shapes, batch=batch).shapes
        yield {
            name: tuple(
                size + growth
                if _grows(declared[name][axis], axis) and name not in (shapes or {})
                else size
                for axis, size in enumerate(sizes)
            )
            for name, sizes in bound.items()
        }


def _grows(declared: int | str | None, axis: int) -> bool:
    return axis > 1 and not isinstance(declared, int)
