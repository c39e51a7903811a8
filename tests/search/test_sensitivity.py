"""The harm of one split is what the rewritten network does to the outputs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
from helpers import Array, parse, random_feeds, run

from pwopt import shapes
from pwopt.calibration import calibration_samples, gather
from pwopt.calibration.closed_forms import ClosedForms
from pwopt.cost import Sides
from pwopt.data import Batch, open_data
from pwopt.graph import Names, replace
from pwopt.linear import Linear, linear
from pwopt.lowrank import Factors
from pwopt.model import Model
from pwopt.models import BUILDERS, DEMO_CALIBRATION, DEMO_MODEL
from pwopt.search import sensitivity
from pwopt.search.latency import Option
from pwopt.search.sensitivity import Harm, interpolated, measure

CHAIN = """
    net (float[N,4,8,8] x) => (float[N,5] y)
    <float[8,4,3,3] w, float[8] b, float[8,8,1,1] v, float[6,8,3,3] u, float[6,8] m, float[8] c,
     float[8,5] n>
    {
        a = Conv<pads = [1,1,1,1], strides = [2,2]>(x, w, b)
        r = Relu(a)
        p = Conv(r, v)
        q = Conv(p, u)
        t = Relu(q)
        g = GlobalAveragePool(t)
        f = Flatten(g)
        h = Gemm<alpha = 0.5>(f, m, c)
        k = Relu(h)
        y = MatMul(k, n)
    }
"""
TWO = """
    net (float[N,4,6,6] x) => (float[N,5] early, float[N,4,6,6] map, float[N] single, int64[N] top)
    <float[5,4] m, float[6,4,3,3] w, float[6] b, float[4,6,3,3] v, int64[1] one = {1}>
    {
        z = GlobalAveragePool(x)
        f = Flatten(z)
        early = Gemm<transB = 1>(f, m)
        a = Conv<pads = [1,1,1,1]>(x, w, b)
        r = Relu(a)
        map = Conv<pads = [1,1,1,1]>(r, v)
        single = ReduceMean<axes = [1,2,3], keepdims = 0>(map)
        g = GlobalAveragePool(r)
        h = Flatten(g)
        top = ArgMax<axis = 1, keepdims = 0>(h)
    }
"""
SIZES = {
    "resnet_projection": {"size": 8, "in_channels": 16, "width": 8},
    "mlp_head": {"size": 3, "in_channels": 16, "hidden": 32},
}


def layers(model: Model) -> list[Linear]:
    known = shapes.infer(model, shapes.bind(model))
    found = (linear(node, known) for node in model.graph.nodes)
    return [layer for layer in found if isinstance(layer, Linear)]


def feed(model: Model, *sizes: int, seed: int = 0) -> list[Batch]:
    drawn = [random_feeds(model, batch=n, seed=seed + i) for i, n in enumerate(sizes)]
    return [Batch(feeds, None, n) for feeds, n in zip(drawn, sizes, strict=True)]


def forms_of(model: Model, *sizes: int) -> ClosedForms:
    batches = feed(model, *(sizes or (64, 64)), seed=100)
    known = shapes.infer(model, shapes.bind(model))
    return ClosedForms(gather(model, layers(model), batches), known)


def grid(layer: Linear, ranks: Sequence[int] = (1, 2, 3)) -> list[Option]:
    """List options at these ranks, where the layer has as many channels."""
    forms: tuple[Sides, ...] = ("output",) if layer.is_pointwise else ("input", "output", "both")
    least = min(layer.size.in_channels, layer.size.out_channels)
    return [Option(sides, rank) for sides in forms for rank in ranks if rank < least]


def rewritten(model: Model, where: str, factors: Factors) -> Model:
    after = model.copy()
    (layer,) = (layer for layer in layers(after) if layer.where == where)
    replace(after.graph, layer.node, layer.split(factors, Names(after)))
    return after


def kl(teacher: Array, student: Array) -> float:
    def log_softmax(rows: Array) -> Array:
        rows = rows.astype(np.float64)
        return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))

    p, q = log_softmax(teacher), log_softmax(student)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def relative(teacher: Array, student: Array, axes: tuple[int, ...]) -> float:
    error = ((teacher - student) ** 2).sum()
    return float(error / ((teacher - teacher.mean(axis=axes, keepdims=True)) ** 2).sum())


def whole(model: Model, batches: Sequence[Batch]) -> list[Array]:
    """Run a network on samples; every output of all of them."""
    runs = [[a[: batch.samples] for a in run(model, batch.feeds)] for batch in batches]
    return [np.concatenate(arrays) for arrays in zip(*runs, strict=True)]


def measured(
    model: Model, batches: Sequence[Batch], ranks: Sequence[int] = (1, 2, 3)
) -> tuple[dict[str, dict[Option, float]], dict[tuple[str, Option], Factors]]:
    """Measure all layers, and keep the factors of what was tried."""
    forms, tried = forms_of(model), {}

    def split(layer: Linear, option: Option) -> Factors:
        factors = forms.split(layer, option.sides, option.rank)
        tried[layer.where, option] = factors
        return factors

    found = layers(model)
    options = {layer.where: grid(layer, ranks) for layer in found}
    return measure(model, found, options, split, batches), tried


def text_or_builder(name: str) -> Model:
    return parse(CHAIN) if name == "chain" else Model(BUILDERS[name](**SIZES[name]))


@pytest.mark.parametrize("name", ["chain", "mlp_head"])
def test_harm_is_that_of_the_rewritten_network(name: str) -> None:
    model = text_or_builder(name)
    before = model.to_proto()
    batches = feed(model, 5, 5, 3)
    harms, tried = measured(model, batches)
    (teacher,) = whole(model, batches)
    assert [*harms] == [layer.where for layer in layers(model)]
    for (where, option), factors in tried.items():
        (student,) = whole(rewritten(model, where, factors), batches)
        assert harms[where][option] == pytest.approx(kl(teacher, student), rel=1e-3, abs=1e-9)
        assert harms[where][option] > 1e-7
    assert model.to_proto() == before


def test_harm_in_a_residual_network_with_an_output_that_is_no_scores() -> None:
    model = text_or_builder("resnet_projection")
    batches = feed(model, 5, 3)
    harms, tried = measured(model, batches)
    (teacher,) = whole(model, batches)
    for (where, option), factors in tried.items():
        (student,) = whole(rewritten(model, where, factors), batches)
        wanted = relative(teacher, student, (0, 2, 3))
        assert harms[where][option] == pytest.approx(wanted, rel=1e-3)


def test_harms_of_several_outputs_are_added() -> None:
    model = parse(TWO)
    batches = feed(model, 9, 7)
    harms, tried = measured(model, batches)
    early, image, single, top = whole(model, batches)
    assert {where for where, _ in tried} == {"early", "a", "map"}
    for (where, option), factors in tried.items():
        outputs = whole(rewritten(model, where, factors), batches)
        wanted = kl(early, outputs[0])
        wanted += relative(image, outputs[1], (0, 2, 3)) + relative(single, outputs[2], (0,))
        wanted += float((top != outputs[3]).mean())
        assert harms[where][option] == pytest.approx(wanted, rel=1e-3)


def test_behind_the_scores_no_other_output_passes_for_them() -> None:
    text = """net (float[N,4] x) => (float[N,5] scores, float[N,3] boxes)
        <float[4,5] m, float[4,3] n>
        { scores = MatMul(x, m)  boxes = MatMul(x, n) }"""
    model = parse(text)
    batches = feed(model, 9)
    harms, tried = measured(model, batches, (1, 2))
    _, teacher = whole(model, batches)
    for option, harm in harms["boxes"].items():
        _, student = whole(rewritten(model, "boxes", tried["boxes", option]), batches)
        assert harm == pytest.approx(relative(teacher, student, (0,)), rel=1e-3)


def test_a_split_that_loses_nothing_does_no_harm() -> None:
    model = parse(CHAIN)
    options = {layer.where: [Option("output", 1)] for layer in layers(model)}

    def split(layer: Linear, option: Option) -> Factors:
        channels = layer.size.out_channels
        eye = np.eye(channels, dtype=np.float32)
        ones = [1] * len(layer.size.kernel)
        return Factors(layer.weight(), None, eye.reshape(channels, channels, *ones))

    harms = measure(model, layers(model), options, split, feed(model, 6))
    assert [*harms] == [*options]
    for harm in harms.values():
        assert harm == {Option("output", 1): pytest.approx(0, abs=1e-12)}


def test_harm_falls_with_the_rank_in_a_trained_network() -> None:
    model = Model.load(DEMO_MODEL)
    samples = calibration_samples(open_data(DEMO_CALIBRATION, model, preprocess="unit"), 96)
    found = layers(model)
    known = shapes.infer(model, shapes.bind(model))
    forms = ClosedForms(gather(model, found, samples.fit), known)
    options = {layer.where: grid(layer, (2, 8, 24)) for layer in found}

    def split(layer: Linear, option: Option) -> Factors:
        return forms.split(layer, option.sides, option.rank)

    harms = measure(model, found, options, split, samples.held_out)
    assert len(harms) == 8
    for of_layer in harms.values():
        for sides in {option.sides for option in of_layer}:
            falling = [harm for option, harm in sorted(of_layer.items()) if option.sides == sides]
            assert all(low < high for high, low in pairwise(falling))


def test_only_three_ranks_of_each_form_are_tried() -> None:
    model = parse(CHAIN)
    harms, tried = measured(model, feed(model, 8), (1, 2, 4, 5))
    assert [option for where, option in tried if where == "q"] == [
        Option(sides, rank) for sides in ("both", "input", "output") for rank in (1, 4, 5)
    ]
    assert [*harms["q"]] == grid(next(o for o in layers(model) if o.where == "q"), (1, 2, 4, 5))
    assert [option.rank for where, option in tried if where == "a"] == [1, 2] * 3


def test_layers_without_options_are_left_out() -> None:
    model = parse(CHAIN)
    forms = forms_of(model)
    options = {"p": [Option("output", 2)], "a": []}
    told = []
    harms = measure(
        model,
        layers(model),
        options,
        lambda layer, option: forms.split(layer, option.sides, option.rank),
        feed(model, 4),
        progress=lambda *step: told.append(step),
    )
    assert [*harms] == ["p"]
    assert told[-1][1:] == (1, 1)
    assert measure(model, layers(model), {}, None, feed(model, 4)) == {}  # type: ignore[arg-type]


def test_rows_that_fill_up_a_batch_do_not_count() -> None:
    model = parse(CHAIN.replace("[N,", "[4,"))
    batches = feed(model, 4, 4)
    batches[1].feeds["x"][2:] = 1e3
    harms, tried = measured(model, [batches[0], Batch(batches[1].feeds, None, 2)])
    opened = parse(CHAIN)
    real = [batches[0], Batch({"x": batches[1].feeds["x"][:2]}, None, 2)]
    (teacher,) = whole(opened, real)
    for (where, option), factors in tried.items():
        (student,) = whole(rewritten(opened, where, factors), real)
        assert harms[where][option] == pytest.approx(kl(teacher, student), rel=1e-3, abs=1e-9)


def test_one_split_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = parse(CHAIN), feed(parse(CHAIN), 5, 5)
    at_once, _ = measured(model, batches)
    monkeypatch.setattr(sensitivity, "SIDE_BY_SIDE", 1)
    one_by_one, _ = measured(model, batches)
    assert one_by_one == at_once


def test_as_many_samples_as_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "SAMPLES", 8)
    model = parse(CHAIN)
    batches = feed(model, *[4] * 5)
    some, _ = measured(model, batches)
    assert some == measured(model, [batches[0], batches[4]])[0]
    assert some != measured(model, batches[:2])[0]
    assert measured(model, feed(model, 20))[0]  # one batch at least


def test_values_beyond_the_type_are_of_infinite_harm() -> None:
    model = parse(CHAIN)
    (layer,) = (layer for layer in layers(model) if layer.where == "h")

    def split(layer: Linear, option: Option) -> Factors:
        size = {1: 1e30, 2: np.inf, 3: 1.0}[option.rank]
        core = np.full((option.rank, 6), size, np.float32)
        return Factors(core, None, np.full((8, option.rank), size, np.float32))

    options = {"h": grid(layer)}
    harms = measure(model, [layer], options, split, feed(model, 4))["h"]
    assert [np.isinf(harm) for harm in harms.values()] == [True, True, False]


def divergence(teacher: Array, student: Array) -> float:
    harm = Harm("y")
    harm.add({"y": teacher}, {"y": student})
    return harm.value


def test_probabilities_are_taken_as_they_are() -> None:
    rng = np.random.default_rng(0)
    teacher, student = (rng.standard_normal((6, 5)).astype(np.float32) for _ in range(2))
    wanted = kl(teacher, student)

    def soft(rows: Array) -> Array:
        return np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)

    assert divergence(teacher, student) == pytest.approx(wanted, rel=1e-5)
    for ends in ((soft(teacher), soft(student)), (np.log(soft(teacher)), np.log(soft(student)))):
        both = (rows[:, :, None, None] for rows in ends)
        assert divergence(*both) == pytest.approx(wanted, rel=1e-5)


def test_probabilities_of_zero() -> None:
    teacher = np.array([[1, 0, 0], [0.5, 0.5, 0]], np.float32)
    student = np.array([[0.5, 0.5, 0], [0.5, 0, 0.5]], np.float32)
    wanted = (np.log(2) + 0.5 * np.log(0.5e12)) / 2
    assert divergence(teacher, student) == pytest.approx(wanted, rel=1e-6)
    assert divergence(teacher, teacher) == 0


def test_scores_of_minus_infinity() -> None:
    teacher = np.array([[1, 2, -np.inf]])
    assert divergence(teacher, teacher) == 0
    student = np.array([[2, 1, -np.inf]])
    wanted = kl(teacher[:, :2], student[:, :2])
    assert divergence(teacher, student) == pytest.approx(wanted)


def test_large_scores_do_not_overflow() -> None:
    teacher, student = np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]])
    assert divergence(teacher, student) == pytest.approx(1e4)


def harm_of(*batches: tuple[Array, Array]) -> float:
    harm = Harm(None)
    for teacher, student in batches:
        harm.add({"y": teacher}, {"y": student})
    return harm.value


def test_relative_error_leaves_the_mean_of_each_channel_out() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((40, 3, 2))
    teacher = noise + np.array([1e3, -5.0, 0])[:, None]
    wanted = relative(teacher, teacher + 0.1, (0, 2))
    assert harm_of((teacher, teacher + 0.1)) == pytest.approx(wanted, rel=1e-6)
    assert wanted == pytest.approx(0.01, rel=0.1)
    parts = [(part, part + 0.1) for part in (teacher[:10], teacher[10:])]
    assert harm_of(*parts) == pytest.approx(wanted, rel=1e-6)


def test_outputs_that_do_not_vary() -> None:
    constant = np.full((4, 3), 2.0)
    assert harm_of((constant, constant)) == 0
    assert harm_of((constant, constant + 0.2)) == pytest.approx(0.01)
    zeros = np.zeros((4, 3))
    assert harm_of((zeros, zeros)) == 0
    assert harm_of((zeros, zeros + 1)) == np.inf


def test_outputs_of_another_shape_are_lost() -> None:
    found = np.array([[1.0], [-1.0]])
    assert harm_of((found, found[:1])) == pytest.approx(1)


RANKS = (16, 32, 64, 96, 128)


def points(harms: Mapping[int, float]) -> dict[int, float]:
    measured = {Option("both", rank): harm for rank, harm in harms.items()}
    elsewhere = {Option("input", 16): 5.0, Option("input", 128): 5.0}
    options = [Option("both", rank) for rank in RANKS]
    found = interpolated(options, measured | elsewhere)
    assert [*found] == options
    return {option.rank: harm for option, harm in found.items()}


def test_interpolation() -> None:
    found = points({16: 1.0, 64: 0.01, 128: 0.0})
    assert (found[16], found[64], found[128]) == (1.0, 0.01, 0.0)
    assert found[32] == pytest.approx(0.1)  # halfway in both logarithms
    assert 1e-9 < found[96] < 0.01
    assert points({16: 1.0, 128: 1 / 64})[64] == pytest.approx(1 / 16)


def test_interpolation_next_to_infinite_harm() -> None:
    found = points({16: np.inf, 64: np.inf, 128: 0.5})
    assert [*found.values()] == [np.inf, np.inf, np.inf, np.inf, 0.5]
