"""Closed forms of layers are those of the maths, with the layer's padding taken into account."""

import numpy as np
import pytest
from helpers import Array, effective, parse, random_feeds, run

from pwopt import shapes
from pwopt.calibration import closed_forms
from pwopt.calibration.closed_forms import ClosedForms
from pwopt.calibration.statistics import Statistics, gather
from pwopt.cost import Sides
from pwopt.data import Batch
from pwopt.linear import Linear, linear
from pwopt.lowrank import Factors, calibrated
from pwopt.model import Model
from pwopt.shapes import Shape

NET = """
    net (float[N,4,7,6] x) => (float[N,5] y)
    <float[6,4,3,3] w, float[6] b, float[5,6,3,3] v, float[5,6,1,1] u, float[5,5] m, float[5] c>
    {
        a = Conv<pads = [1,2,0,1], strides = [2,1], dilations = [1,2]>(x, w, b)
        r = Relu(a)
        p = Conv<auto_pad = "SAME_UPPER">(r, v)
        q = Conv(r, u)
        s = Add(p, q)
        g = GlobalAveragePool(s)
        f = Flatten(g)
        y = Gemm(f, m, c)
    }
"""


def known(model: Model) -> dict[str, Shape]:
    return shapes.infer(model, shapes.bind(model))


def layers(model: Model) -> dict[str, Linear]:
    found = (linear(node, known(model)) for node in model.graph.nodes)
    return {layer.where: layer for layer in found if isinstance(layer, Linear)}


def statistics(model: Model) -> dict[str, Statistics]:
    batches = [Batch(random_feeds(model, batch=64, seed=seed), None, 64) for seed in range(2)]
    return gather(model, [*layers(model).values()], batches)


def factors(
    layer: Linear, found: Statistics, sides: Sides, rank: int, shape: Shape | None = None
) -> Factors:
    sizes = {} if shape is None else {layer.node.inputs[0].name: shape}
    return ClosedForms({layer.where: found}, sizes).split(layer, sides, rank)


def assert_same(ours: Factors, theirs: Factors) -> None:
    for part in ("core", "reduce", "expand", "bias"):
        a, b = getattr(ours, part), getattr(theirs, part)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)


def taps_seen(model: Model, layer: Linear) -> Array:
    """Find how often each tap sees the input: a layer of one tap and no bias, fed with ones."""
    model = model.copy()
    (found,) = (one for where, one in layers(model).items() if where == layer.where)
    name = found.node.inputs[0].name
    weight = found.node.inputs[1]
    shares = []
    for index in np.ndindex(*found.size.kernel):
        values = np.zeros(weight.shape, np.float32)
        values[(slice(None), 0, *index)] = 1
        weight.values = values
        if len(found.node.inputs) > 2:
            found.node.inputs[2].values = np.zeros(len(values), np.float32)
        proto = model.to_proto()
        nodes = [n for n in proto.graph.node if n.output[0] == layer.where]
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        shape = known(model)[name]
        proto.graph.input[0].name = name
        for dim, size in zip(proto.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size
        proto.graph.output[0].name = layer.where
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        (output,) = run(proto, {name: np.ones(shape, np.float32)})
        shares.append(output[:, 0].mean())
    return np.array(shares)


@pytest.mark.parametrize("where", ["a", "p"])
def test_padding_is_taken_into_account(where: str) -> None:
    model = parse(NET)
    layer, found = layers(model)[where], statistics(model)[where]
    assert found.inputs is not None
    taps = np.diag(taps_seen(model, layer))
    assert np.diag(taps).min() < 0.95
    shape = known(model)[layer.node.inputs[0].name]
    weight, bias = layer.weight(), layer.bias()
    ours = factors(layer, found, "input", 2, shape)
    theirs, unpadded = (
        calibrated.Splitter(weight, bias, inputs=found.inputs, taps=seen).input_side(2)
        for seen in (taps, None)
    )
    kept, wanted, blind = (effective(f, bias)[0] for f in (ours, theirs, unpadded))
    np.testing.assert_allclose(kept, wanted, atol=1e-5)
    assert np.abs(blind - wanted).max() > 1e-3
    assert_same(factors(layer, found, "input", 2), unpadded)
    open_shape = (None, shape[1], None, shape[3])
    assert_same(factors(layer, found, "input", 2, open_shape), unpadded)


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_layer_by_layer_is_one_by_one(sides: Sides) -> None:
    model = parse(NET)
    found, sizes = statistics(model), known(model)
    forms = ClosedForms(found, sizes)
    for where in ("a", "p", "a"):
        layer = layers(model)[where]
        shape = sizes[layer.node.inputs[0].name]
        for rank in (1, 3, 2):
            one = factors(layer, found[where], sides, rank, shape)
            assert_same(forms.split(layer, sides, rank), one)


@pytest.mark.parametrize("where", ["q", "y"])
def test_pointwise_layers(where: str) -> None:
    model = parse(NET)
    layer, found = layers(model)[where], statistics(model)[where]
    one = factors(layer, found, "output", 2, known(model)[layer.node.inputs[0].name])
    splitter = calibrated.Splitter(layer.weight(), layer.bias(), outputs=found.outputs)
    theirs = splitter.output_side(2)
    assert_same(one, theirs)
    with pytest.raises(ValueError, match="missing"):
        factors(layer, found, "input", 2)


def test_decompositions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = closed_forms.Splitter
    monkeypatch.setattr(
        closed_forms,
        "Splitter",
        lambda *args, **kwargs: made.append(1) or original(*args, **kwargs),
    )
    model = parse(NET)
    found, forms = layers(model), ClosedForms(statistics(model), known(model))
    for rank in (1, 2, 3):
        forms.split(found["a"], "output", rank)
        forms.split(found["a"], "both", rank)
    assert len(made) == 1
    forms.split(found["q"], "output", 1)
    assert len(made) == 2
