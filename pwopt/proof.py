"""The proof of an exact rewrite: the whole model against the original, in onnxruntime."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pwopt import runtime
from pwopt.data import random_data
from pwopt.errors import ModelError
from pwopt.model import Model
from pwopt.shapes import bind, inputs

TOLERANCE = {"float16": 2e-2, "float32": 1e-4, "float64": 1e-9}
"""Largest difference allowed, over the output's largest value, by its type.

About a hundred roundings of the type: sums are taken in another order, and folded weights are
rounded once more. Outputs of other types must be equal.
"""

BATCHES = (1, 3)
_TINY = float(np.finfo(np.float32).tiny)

GROWTH = 32
"""Pixels by which open heights and widths are enlarged for the second size."""


def prove(
    original: Model, rewritten: Model, shapes: Mapping[str, Sequence[int]] | None = None
) -> float:
    """Run both models on random inputs, at two batches and two image sizes where those are open.

    Returns:
        The largest difference of any output, over that output's largest value.

    Raises:
        ModelError: an output differs by more than `TOLERANCE`, or in shape.
    """
    before, after = (runtime.session(m) for m in (original, rewritten))
    worst = 0.0
    for binding in _bindings(original, shapes):
        for batch in random_data(original, binding):
            a = runtime.run(before, batch.feeds, name=original.name)
            b = runtime.run(after, batch.feeds, name=f"{rewritten.name} (rewritten)")
            for name in a:
                worst = max(worst, difference(original.name, name, a[name], b[name]))
    return worst


def difference(model: str, name: str, before: runtime.Array, after: runtime.Array) -> float:
    """Return max |before − after| / max |before|; NaN and infinities must be the same.

    Raises:
        ModelError: it is more than `TOLERANCE` of the type, or the shapes differ.
    """
    if before.shape != after.shape:
        raise ModelError(
            f"{model}: output '{name}' has shape {list(after.shape)} after the rewrite, "
            f"{list(before.shape)} before it; this is a fault, please report it"
        )
    finite = np.isfinite(before)
    same = np.array_equal(before[~finite], after[~finite], equal_nan=before.dtype.kind == "f")
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


def _bindings(
    model: Model, shapes: Mapping[str, Sequence[int]] | None
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the input shapes to try; `shapes` as given, else what is open varied."""
    declared = {i.name: i.shape for i in inputs(model)}
    for batch, growth in zip(BATCHES, (0, GROWTH), strict=True):
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
