"""Bottleneck: put 1×1 convolutions around an expensive k×k convolution.

Before → after, for y = Conv(x, W, b) with W of shape (Cout, Cin, k, k) and rank r::

    input    x → Conv 1×1 (Cin → r) → Conv k×k (r → Cout) + b → y
    output   x → Conv k×k (Cin → r) → Conv 1×1 (r → Cout) + b → y
    both     x → Conv 1×1 (Cin → r) → Conv k×k (r → r) → Conv 1×1 (r → Cout) + b → y

Maths: the factors are the truncated SVD of an unfolding of W (one side) or its sequentially
truncated Tucker-2 (both); see `pwopt.lowrank`. They minimise ‖W − Ŵ‖, need no data, and change
the numbers: `check` says by how much. With `init=calibrated` they minimise the error of the layers'
outputs on samples instead, layer by layer on what really comes in; see `pwopt.calibration.refit`.

Conditions: Conv of group 1 with k > 1 in any dimension (1-D, 2-D, 3-D), a constant floating-point
weight, at least `min_channels` input channels, a rank below the channels of the side in question,
and a split that is cheaper by MACs and by predicted time. The k×k keeps stride, pads, auto_pad
and dilations. A 1×1 in front of it has no bias, since a bias would leak into the padding; the
bias goes to the last convolution. A convolution that already stands directly behind or in front of
a 1×1 is left alone, which also makes a second run change nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from pwopt import lowrank, runtime, shapes
from pwopt.calibration import calibration_samples
from pwopt.calibration.augment import to_fit
from pwopt.calibration.refit import refit
from pwopt.candidates import MIN_CHANNELS, Candidate, Choice, candidate, check_rank
from pwopt.cost import Split
from pwopt.errors import SpecError
from pwopt.graph import Names, is_op, known_constant, replace
from pwopt.linear import Linear, initializers, linear, split
from pwopt.lowrank import Factors
from pwopt.model import Model
from pwopt.rewriting import Context, Event, Pass
from pwopt.shapes import Shape

Init = Literal["svd", "calibrated"]


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Pass):
    """Split wide k×k convolutions with 1×1 bottlenecks, by SVD or fitted to samples.

    Options:
        rank: channels of the bottleneck
        sides: where the 1×1 goes: input, output, both, or auto, which takes per layer the form
            that loses least of the weight's energy per MAC saved
        min_channels: input channels from which a convolution counts as wide
        init: where the weights come from: svd of the layer's own, or calibrated on samples
    """

    name: ClassVar[str] = "bottleneck"
    exact: ClassVar[bool] = False

    rank: int
    sides: Choice = "auto"
    min_channels: int = MIN_CHANNELS
    init: Init = "svd"

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
        nodes = [node for node in model.graph.nodes if is_op(node, "Conv")]
        found = [self._candidate(model, node, known) for node in nodes]
        fitted = self._fitted(model, nodes, found, known, context)
        names = Names(model)
        splits: dict[tuple[int, str], dict[str, gs.Constant]] = {}
        for node, proposed in zip(nodes, found, strict=True):
            where = node.outputs[0].name
            if isinstance(proposed, str):
                yield Event("skipped", where, proposed)
                continue
            weight = known_constant(node.inputs[1])
            key = (id(weight), where if fitted else proposed.sides)
            if key not in splits:  # shared weights stay shared
                factors = fitted.get(where) or lowrank.Splitter(weight.values).split(
                    proposed.sides, proposed.rank
                )
                splits[key] = initializers(node, factors, names)
            if not np.isfinite(splits[key]["core"].values).all():
                yield Event("skipped", where, f"the split would not be finite in {weight.dtype}")
                continue
            replace(model.graph, node, split(node, splits[key], names))
            yield _rewrote(where, proposed)

    def _candidate(
        self, model: Model, node: gs.Node, known: Mapping[str, Shape]
    ) -> Candidate | str:
        found = candidate(
            model, node, known, rank=self.rank, sides=self.sides, min_channels=self.min_channels
        )
        if isinstance(found, str) or self.init == "svd":
            return found
        layer = linear(node, known)  # what is calibrated may say no as well
        return layer if isinstance(layer, str) else found

    def _fitted(
        self,
        model: Model,
        nodes: Sequence[gs.Node],
        found: Sequence[Candidate | str],
        known: Mapping[str, Shape],
        context: Context,
    ) -> dict[str, Factors]:
        """Fit all splits to samples, if that is wanted: layer → factors."""
        if self.init == "svd":
            return {}
        if context.samples is None:
            raise SpecError(f"{self.name}: init=calibrated needs samples; add --data")
        layers, splits = [], {}
        for node, proposed in zip(nodes, found, strict=True):
            layer = linear(node, known)
            if isinstance(layer, Linear) and isinstance(proposed, Candidate):
                layers.append(layer)
                splits[layer.where] = Split(layer.size, proposed.sides, proposed.rank)
        samples = to_fit(calibration_samples(context.samples, context.most_samples), context.seed)
        return refit(
            model, layers, splits, samples, threads=runtime.cores(), progress=context.progress
        )


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
