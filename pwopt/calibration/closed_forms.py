"""Splits of layers in closed form, from their statistics; see `pwopt.lowrank.calibrated`."""

from collections.abc import Mapping
from dataclasses import asdict

from pwopt.calibration.statistics import Statistics
from pwopt.cost import Sides
from pwopt.linear import Linear
from pwopt.lowrank import Factors
from pwopt.lowrank.calibrated import Splitter, padded_taps
from pwopt.runtime import Array
from pwopt.shapes import Shape


class ClosedForms:
    """Splits layers by their statistics.

    The decompositions of one layer are kept until another one is asked for, so that its second
    split takes a fraction of the time of the first. They take some multiples of the weight.
    """

    def __init__(self, statistics: Mapping[str, Statistics], shapes: Mapping[str, Shape]) -> None:
        """Take what was gathered.

        Args:
            statistics: Those of each layer, by `Linear.where`.
            shapes: Tensors' shapes on the samples, from `pwopt.shapes.infer`. Where that of a
                layer's input is not known, its padding is not taken into account.
        """
        self._statistics = statistics
        self._shapes = shapes
        self._last: tuple[Linear, Splitter] | None = None

    def split(self, layer: Linear, sides: Sides, rank: int) -> Factors:
        """Split a layer; a pointwise one has only the side `output`.

        Raises:
            ModelError: its weight or bias holds NaN or infinite values.
            ValueError: the rank is not below the channels of a split side, or there are no moments
                of that side.
        """
        if self._last is None or self._last[0] is not layer:
            shape = self._shapes.get(layer.node.inputs[0].name)
            self._last = layer, _splitter(layer, self._statistics[layer.where], shape)
        return self._last[1].split(sides, rank)


def _splitter(layer: Linear, known: Statistics, shape: Shape | None) -> Splitter:
    return Splitter(
        layer.weight(),
        layer.bias(),
        inputs=known.inputs,
        outputs=known.outputs,
        taps=_taps(layer, shape),
    )


def _taps(layer: Linear, shape: Shape | None) -> Array | None:
    """Return how often each tap of the kernel sees the input; None if that cannot be known."""
    size = [] if shape is None else [length for length in shape[2:] if length is not None]
    if layer.is_pointwise or len(size) != len(layer.size.kernel):
        return None
    return padded_taps(size, **asdict(layer.window(size)))
