"""A network like a trained one, and times that follow from MACs: the same on every machine."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from helpers import Array, parse, run

from pwopt import analysis
from pwopt.cost import Split
from pwopt.linear import Linear, linear
from pwopt.model import Model
from pwopt.runtime import Timing
from pwopt.search import latency
from pwopt.search.latency import Latencies
from pwopt.search.yardstick import Yardstick
from pwopt.shapes import bind, infer

NET = """
    net (float[N,3,16,16] x) => (float[N,8] y)
    <float[64,3,4,4] w1, float[64] b1, float[64,64,3,3] w2, float[64] b2, float[96,64,3,3] w3,
     float[96] b3, float[8,96] w4, float[8] b4>
    {
        a = Conv<strides = [4,4]>(x, w1, b1)
        ra = Relu(a)
        b = Conv<pads = [1,1,1,1]>(ra, w2, b2)
        rb = Relu(b)
        c = Conv<pads = [1,1,1,1]>(rb, w3, b3)
        rc = Relu(c)
        g = GlobalAveragePool(rc)
        f = Flatten(g)
        y = Gemm<transB = 1>(f, w4, b4)
    }
"""
"""The convolutions b and c can be split; a and the Gemm are too narrow."""


def images(count: int, *, seed: int = 1) -> tuple[Array, Array]:
    """Draw images (count, 3, 16, 16) of eight classes, and their classes."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(8, size=count)
    patterns = np.random.default_rng(0).standard_normal((8, 3, 16, 16))
    noisy = patterns[classes] + rng.standard_normal((count, 3, 16, 16))
    return noisy.astype(np.float32), classes


def network(*, ranks: tuple[int, int] = (12, 12), noise: float = 0.02) -> Model:
    """Make a network whose wide layers are of almost low rank, and whose head fits the classes."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((64, 3, 4, 4)) / 7,
        "w2": _of_rank(ranks[0], (64, 64, 3, 3), noise, rng),
        "w3": _of_rank(ranks[1], (96, 64, 3, 3), noise, rng),
        **{f"b{n}": 0.1 * rng.standard_normal(size) for n, size in ((1, 64), (2, 64), (3, 96))},
    }
    x, classes = images(512)
    body = NET.replace("float[N,8] y", "float[N,96] f").replace("y = Gemm", "unread = Gemm")
    features = run(parse(body, {**weights, "w4": np.eye(8, 96), "b4": np.zeros(8)}), {"x": x})[0]
    known = np.concatenate([features, np.ones((512, 1))], axis=1).astype(np.float64)
    ridge = 1e-3 * np.trace(known.T @ known) / len(known.T) * np.eye(97)
    ridge[-1, -1] = 0
    head = np.linalg.solve(known.T @ known + ridge, known.T @ (12 * np.eye(8)[classes]))
    return parse(NET, {**weights, "w4": head[:-1].T, "b4": head[-1]})


def _of_rank(rank: int, shape: tuple[int, ...], noise: float, rng: np.random.Generator) -> Array:
    """Draw a kernel of this many independent outputs, with some noise on top."""
    out, inner = shape[0], int(np.prod(shape[1:]))
    weight = rng.standard_normal((out, rank)) @ rng.standard_normal((rank, inner)) / rank**0.5
    weight += noise * rng.standard_normal((out, inner))
    return np.asarray((weight * (2 / inner) ** 0.5).reshape(shape))


def layers_of(model: Model) -> list[Linear]:
    """List the layers that can be split, wide or not."""
    shapes = infer(model, bind(model))
    found = (linear(node, shapes) for node in model.graph.nodes)
    return [layer for layer in found if isinstance(layer, Linear)]


def macs_as_ms(model: Model, layers: list[Linear], **_: Any) -> Latencies:
    """Stand in for `latency.measure`: a million MACs take a millisecond."""
    found = latency.by_macs(model, layers)
    return Latencies(
        found.run_ms / 1e6,
        {where: macs / 1e6 for where, macs in found.layers.items()},
        {w: {o: macs / 1e6 for o, macs in row.items()} for w, row in found.options.items()},
    )


def time_by_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let times be what `macs_as_ms` says, in the table, of layers in place and of models."""

    def timed(self: Yardstick, models: Sequence[Model]) -> Timing:
        macs = [analysis.size(model).macs or 0 for model in (self._original, *models)]
        return Timing(np.array([macs]) / 1e6)

    def in_place(
        self: Yardstick, model: Model, layers: list[Linear], plan: Mapping[str, latency.Option]
    ) -> dict[str, tuple[float, float]]:
        return {
            layer.where: (layer.size.macs, Split(layer.size, option.sides, option.rank).macs)
            for layer in layers
            if (option := plan.get(layer.where))
        }

    monkeypatch.setattr(latency, "measure", macs_as_ms)
    monkeypatch.setattr(Yardstick, "_timed", timed)
    monkeypatch.setattr(Yardstick, "in_place", in_place)
