"""Bottleneck: put 1×1 convolutions around an expensive k×k convolution.

Before → after, for y = Conv(x, W, b) with W of shape (Cout, Cin, k, k) and rank r::

    input    x → Conv 1×1 (Cin → r) → Conv k×k (r → Cout) + b → y
    output   x → Conv k×k (Cin → r) → Conv 1×1 (r → Cout) + b → y
    both     x → Conv 1×1 (Cin → r) → Conv k×k (r → r) → Conv 1×1 (r → Cout) + b → y

Maths: the factors are the truncated SVD of an unfolding of W (one side) or its sequentially
truncated Tucker-2 (both); see `pwopt.lowrank`. They minimise ‖W − Ŵ‖, need no data, and change
the numbers: `check` says by how much.

Conditions: Conv of group 1 with k > 1 in any dimension (1-D, 2-D, 3-D), a constant floating-point
weight, at least `min_channels` input channels, a rank below the channels of the side in question,
and a split that is cheaper by MACs and by predicted time. The k×k keeps stride, pads, auto_pad
and dilations. A 1×1 in front of it has no bias, since a bias would leak into the padding; the
bias goes to the last convolution. A convolution that already stands directly behind or in front of
a 1×1 is left alone, which also makes a second run change nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from pwopt import lowrank, shapes
from pwopt.candidates import MIN_CHANNELS, Candidate, Choice, candidate, check_rank
from pwopt.errors import SpecError
from pwopt.graph import Names, is_op, known_constant, replace
from pwopt.linear import initializers, split
from pwopt.model import Model
from pwopt.rewriting import Context, Event, Pass


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Pass):
    """Split wide k×k convolutions with 1×1 bottlenecks, by SVD.

    Options:
        rank: channels of the bottleneck
        sides: where the 1×1 goes: input, output, both, or auto, which takes per layer the form
            that loses least of the weight's energy per MAC saved
        min_channels: input channels from which a convolution counts as wide
    """

    name: ClassVar[str] = "bottleneck"
    exact: ClassVar[bool] = False

    rank: int
    sides: Choice = "auto"
    min_channels: int = MIN_CHANNELS

    def __post_init__(self) -> None:
        for option in ("rank", "min_channels"):
            value = getattr(self, option)
            if value < 1:
                raise SpecError(f"{self.name}: {option} must be at least 1, not {value}")

    def apply(self, model: Model, context: Context) -> Iterator[Event]:
        """Split every convolution for which `candidate` proposes it.

        Raises:
            SpecError: the rank is larger than the channels of every convolution.
            ModelError: a weight holds NaN or infinite values.
        """
        check_rank(model, self.rank)
        known = shapes.infer(model, shapes.bind(model, context.shapes))
        names = Names(model)
        splits: dict[tuple[int, str], dict[str, gs.Constant]] = {}
        for node in [node for node in model.graph.nodes if is_op(node, "Conv")]:
            where = node.outputs[0].name
            found = candidate(
                model,
                node,
                known,
                rank=self.rank,
                sides=self.sides,
                min_channels=self.min_channels,
            )
            if isinstance(found, str):
                yield Event("skipped", where, found)
                continue
            weight = known_constant(node.inputs[1])
            key = (id(weight), found.sides)
            if key not in splits:  # shared weights stay shared
                factors = lowrank.Splitter(weight.values).split(found.sides, found.rank)
                splits[key] = initializers(node, factors, names)
            if not np.isfinite(splits[key]["core"].values).all():
                yield Event("skipped", where, f"the split would not be finite in {weight.dtype}")
                continue
            replace(model.graph, node, split(node, splits[key], names))
            yield _rewrote(where, found)


def _rewrote(where: str, found: Candidate) -> Event:
    reason = f"split on {found.sides} at rank {found.rank}"
    data = {
        "sides": found.sides,
        "rank": found.rank,
        "macs": found.macs,
        "params": found.params,
        "predicted_speedup": round(found.predicted_speedup, 3),
        "kept_energy": round(found.kept_energy, 4),
    }
    return Event("rewrote", where, reason, data)
