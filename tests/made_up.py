"""Latencies that follow from MACs, so that searches come out the same on every machine."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from helpers import Array, parse

from pwopt import analysis
from pwopt.cost import Split
from pwopt.linear import Linear, linear
from pwopt.model import Model
from pwopt.search import latency
from pwopt.search.latency import Latencies, Plan
from pwopt.search.yardstick import Speed, Yardstick
from pwopt.shapes import bind, infer

MACS_PER_MS = 1e6

NET = """
    net (float[N,3,16,16] x) => (float[N,8] y)
    <float[64,3,3,3] w1, float[64] b1, float[64,64,3,3] w2, float[64] b2, float[96,64,3,3] w3,
     float[96] b3, float[8,96] w4, float[8] b4>
    {
        a = Conv<strides = [2,2], pads = [1,1,1,1]>(x, w1, b1)
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


def network(seed: int = 0, *, ranks: tuple[int, int] = (12, 12), noise: float = 0.01) -> Model:
    """Make a network like a trained one: two wide layers of almost low rank, and sure classes."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((64, 3, 3, 3)) / 4,
        "w2": low_rank(rng, 64, 64, ranks[0], noise),
        "w3": low_rank(rng, 96, 64, ranks[1], noise),
        "w4": rng.standard_normal((8, 96)),
    }
    model = parse(NET, weights, seed=seed)
    x = images(64, seed=seed + 1)
    logits = latency.runtime.run(latency.runtime.session(model), {"x": x}, name="net")["y"]
    spread = 3 / logits.std(axis=0)  # of each class over the images
    weights["w4"] = weights["w4"] * spread[:, None]
    centred = {**weights, "b4": -(logits * spread).mean(axis=0)}
    return parse(NET, {**centred, "b1": np.zeros(64)}, seed=seed) if False else _again(centred, seed)


def _again(weights: Mapping[str, Array], seed: int) -> Model:
    return parse(NET, weights, seed=seed)
