"""Seeded random inputs: enough to compare numbers, no measure of accuracy."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pwopt.data.samples import Array, Feeds, Samples, batched
from pwopt.errors import DataError
from pwopt.model import Model
from pwopt.shapes import InputShapes, bind, inputs

BATCHES = 4


def random_data(
    model: Model, shapes: InputShapes | None = None, *, batch: int = 1, seed: int = 0
) -> Samples:
    """Draw `BATCHES` feeds for every input of `model`, its open axes bound by `shapes`.

    Floating point is drawn from a normal distribution, 8-bit integers from 0..127 (pixels), wider
    ones from 0 and 1 (indices and lengths that any model can take), booleans evenly.

    Raises:
        SpecError: `shapes` does not fit the model.
        DataError: an input whose type cannot be drawn (strings, complex numbers).
    """
    declared = inputs(model)
    for i in declared:
        if i.dtype.kind in "Oc":
            kind = "strings" if i.dtype.kind == "O" else f"{i.dtype} numbers"
            raise DataError(
                f"{model.name}: input '{i.name}' takes {kind}, for which no random values make "
                "sense; give samples with --data"
            )
    binding = bind(model, shapes, batch=batch)

    def draw() -> Iterator[tuple[Feeds, None]]:
        rng = np.random.default_rng(seed)
        for _ in range(BATCHES):
            yield {i.name: _values(rng, i.dtype, binding.shapes[i.name]) for i in declared}, None

    rows = next((binding.shapes[name][0] for name in batched(declared)), 1)
    return Samples("random inputs", declared, draw, BATCHES * rows, binding.describe())


def _values(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    return rng.integers(128 if dtype.itemsize == 1 else 2, size=shape).astype(dtype)
