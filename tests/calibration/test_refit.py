"""Splits fitted to samples give more of what the network wants than closed forms do."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from helpers import Array, parse, random_feeds, run, values

from pwopt import shapes
from pwopt.calibration import gather
from pwopt.calibration import refit as refitting
from pwopt.calibration.closed_forms import ClosedForms
from pwopt.calibration.refit import refit
from pwopt.cost import Sides, Split
from pwopt.data import Batch
from pwopt.errors import ModelError
from pwopt.linear import Linear, linear
from pwopt.lowrank import Factors
from pwopt.model import Model
from pwopt.search.search import split_model

CHAIN = """
    net (float[N,6,8,8] x) => (float[N,5] y)
    <float[12,6,3,3] w, float[12] b, float[10,12,3,3] v, float[10] c, float[10,5] m>
    {
        p = Conv<pads = [1,1,1,1]>(x, w, b)
        r = Relu(p)
        q = Conv<pads = [1,1,1,1]>(r, v, c)
        s = Relu(q)
        g = GlobalAveragePool(s)
        f = Flatten(g)
        y = MatMul(f, m)
    }
"""
BLOCK = """
    net (float[N,6,6,6] x) => (float[N,8,6,6] y)
    <float[8,6,3,3] u, float[8] a, float[8,8,3,3] v, float[8] b, float[8,8,3,3] w, float[8] c>
    {
        i = Conv<pads = [1,1,1,1]>(x, u, a)
        j = Relu(i)
        p = Conv<pads = [1,1,1,1]>(j, v, b)
        r = Relu(p)
        q = Conv<pads = [1,1,1,1]>(r, w, c)
        sum = Add(q, j)
        y = Relu(sum)
    }
"""
# Layers of all kinds, with a Relu behind; `p` is what is split.
KINDS = {
    "padded": """net (float[N,6,7,7] x) => (float[N,8,7,7] y) <float[8,6,3,3] w, float[8] b>
        { p = Conv<pads = [1,1,1,1]>(x, w, b)  y = Relu(p) }""",
    "strided": """net (float[N,6,9,9] x) => (float[N,8,5,4] y) <float[8,6,3,3] w, float[8] b>
        { p = Conv<pads = [1,0,1,0], strides = [2,2]>(x, w, b)  y = Relu(p) }""",
    "dilated": """net (float[N,6,9,9] x) => (float[N,8,7,7] y) <float[8,6,3,3] w>
        { p = Conv<pads = [1,1,1,1], dilations = [2,2]>(x, w)  y = Relu(p) }""",
    "same": """net (float[N,6,8,8] x) => (float[N,8,4,4] y) <float[8,6,3,3] w>
        { p = Conv<auto_pad = "SAME_UPPER", strides = [2,2]>(x, w)  y = Relu(p) }""",
    "one axis": """net (float[N,6,40] x) => (float[N,8,40] y) <float[8,6,5] w, float[8] b>
        { p = Conv<pads = [2,2]>(x, w, b)  y = Relu(p) }""",
}
POINTWISE = {
    "1x1": """net (float[N,6,7,7] x) => (float[N,8,4,4] y) <float[8,6,1,1] w, float[8] b>
        { p = Conv<strides = [2,2]>(x, w, b)  y = Relu(p) }""",
    "gemm": """net (float[N,9] x) => (float[N,8] y) <float[8,9] w, float[8] b>
        { p = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, b)  y = Relu(p) }""",
    "matmul": """net (float[N,4,9] x) => (float[N,4,8] y) <float[9,8] w>
        { p = MatMul(x, w)  y = Relu(p) }""",
}
CASES: list[tuple[str, Sides]] = [
    *((kind, side) for kind in KINDS for side in ("input", "output", "both")),
    *((kind, "output") for kind in POINTWISE),
]


def layers(model: Model) -> list[Linear]:
    known = shapes.infer(model, shapes.bind(model))
    found = (linear(node, known) for node in model.graph.nodes)
    return [layer for layer in found if isinstance(layer, Linear)]


def samples(model: Model, count: int = 8) -> list[Batch]:
    """Make batches of smooth inputs: neighbours have much in common, channels too."""
    drawn = [random_feeds(model, batch=16, seed=seed) for seed in range(count)]
    return [Batch({name: _smooth(a) for name, a in feeds.items()}, None, 16) for feeds in drawn]


def _smooth(array: Array) -> Array:
    for axis in range(1, array.ndim):
        array = array + np.roll(array, 1, axis) + 0.3
    return np.asarray(array / 2, np.float32)


def splits(model: Model, plan: Mapping[str, tuple[Sides, int]]) -> dict[str, Split]:
    sizes = {layer.where: layer.size for layer in layers(model)}
    return {where: Split(sizes[where], *form) for where, form in plan.items()}


def fitted(model: Model, plan: Mapping[str, tuple[Sides, int]]) -> Model:
    return split_model(model, layers(model), factors(model, plan))


def factors(
    model: Model, plan: Mapping[str, tuple[Sides, int]], data: Sequence[Batch] | None = None
) -> dict[str, Factors]:
    return refit(model, layers(model), splits(model, plan), data or samples(model))


def in_closed_form(model: Model, plan: Mapping[str, tuple[Sides, int]]) -> Model:
    data, known = samples(model), shapes.infer(model, shapes.bind(model))
    forms = ClosedForms(gather(model, layers(model), data), known)
    chosen = [layer for layer in layers(model) if layer.where in plan]
    return split_model(model, chosen, {c.where: forms.split(c, *plan[c.where]) for c in chosen})


def tap(model: Model, where: str) -> Model:
    """Return the model with one tensor as its only output."""
    result = model.copy()
    result.graph.outputs = [t for t in result.graph.tensors().values() if t.name == where]
    return Model(result.to_proto())


def error(model: Model, other: Model, data: Sequence[Batch] | None = None) -> float:
    """Return the mean squared difference of the first outputs."""
    batches = samples(model) if data is None else data
    pairs = [(run(model, b.feeds)[0], run(other, b.feeds)[0]) for b in batches]
    return float(np.mean([((one - two) ** 2).mean() for one, two in pairs]))


# -- better than what it starts from ----------------------------------------------------------


@pytest.mark.parametrize(("kind", "side"), CASES, ids=lambda case: case)
def test_fits_better_than_the_closed_form_behind_a_relu(kind: str, side: Sides) -> None:
    model = parse({**KINDS, **POINTWISE}[kind], seed=1)
    plan = {"p": (side, 4)}
    ours, theirs = fitted(model, plan), in_closed_form(model, plan)
    assert 0 < error(model, ours) < 0.996 * error(model, theirs)


@pytest.mark.parametrize("kind", ["padded", "strided", "same"])
def test_neighbours_in_common_are_made_use_of(kind: str) -> None:
    """Even without a Relu and undisturbed: what is kept hangs on what neighbours share."""
    text = KINDS[kind].replace("y = Relu(p)", "y = Abs(p)")
    model, plan = parse(text), {"p": ("input", 4)}
    ours, theirs = (tap(split(model, plan), "p") for split in (fitted, in_closed_form))
    assert error(tap(model, "p"), ours) < 0.94 * error(tap(model, "p"), theirs)


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_later_layers_make_up_for_earlier_ones(sides: Sides) -> None:
    """On samples that were not fitted to, as well."""
    model = parse(CHAIN)
    plan: dict[str, tuple[Sides, int]] = {"p": (sides, 3), "q": (sides, 4), "y": ("output", 3)}
    ours, theirs = fitted(model, plan), in_closed_form(model, plan)
    unseen = samples(model, 12)[8:]
    assert error(model, ours) < 0.8 * error(model, theirs)
    assert error(model, ours, unseen) < 0.95 * error(model, theirs, unseen)


def test_full_rank_of_an_undisturbed_layer_changes_nothing() -> None:
    """A layer whose outputs have the rank of the split anyway."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 3)) @ rng.standard_normal((3, 6 * 9))
    model = parse(KINDS["padded"], {"w": w.reshape(8, 6, 3, 3).astype(np.float32)})
    assert error(model, fitted(model, {"p": ("output", 3)})) < 1e-7


@pytest.mark.parametrize("where", ["p", "y"])
def test_without_a_relu_the_output_side_is_the_closed_form(where: str) -> None:
    """Of an undisturbed layer nothing is better than the principal components of its outputs."""
    text = KINDS["padded"].replace("y = Relu(p)", "y = Abs(p)")
    model = parse(text if where == "p" else CHAIN)
    plan: dict[str, tuple[Sides, int]] = {where: ("output", 4)}
    ours, theirs = (split(model, plan) for split in (fitted, in_closed_form))
    assert error(tap(model, where), tap(ours, where)) == pytest.approx(
        error(tap(model, where), tap(theirs, where)), rel=1e-3
    )


# -- what comes behind ------------------------------------------------------------------------


def test_where_a_shortcut_is_added_the_sum_is_fitted() -> None:
    """The last layer of a block makes up for what earlier splits did to the shortcut."""
    plan: dict[str, tuple[Sides, int]] = {"i": ("output", 4), "q": ("input", 5)}
    model = parse(BLOCK)
    # The same numbers, but what is added is out of sight when `q` is fitted.
    branch = parse(BLOCK.replace("sum = Add(q, j)", "sum = Sum(q, j)"))
    assert error(model, fitted(model, plan)) < 0.9 * error(model, fitted(branch, plan))


@pytest.mark.parametrize("size", [1, 7])
def test_what_is_added_may_be_of_another_size(size: int) -> None:
    """A gate is added to a map, or the map of one position to a larger one."""
    model = parse(f"""
        net (float[N,6,{size},{size}] x, float[N,8,{8 - size},{8 - size}] gate)
            => (float[N,8,7,7] y)
        <float[8,6,3,3] w, float[8] b>
        {{
            s = Abs(gate)
            p = Conv<pads = [1,1,1,1]>(x, w, b)
            sum = Add(p, s)
            y = Relu(sum)
        }}
    """)
    plan: dict[str, tuple[Sides, int]] = {"p": ("output", 4)}
    ours, theirs = fitted(model, plan), in_closed_form(model, plan)
    assert error(model, ours) < 1.001 * error(model, theirs)


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_an_output_of_the_network_is_not_clipped(sides: Sides) -> None:
    seen = parse(KINDS["padded"].replace("[N,8,7,7] y)", "[N,8,7,7] y, float[N,8,7,7] p)"))
    plain = parse(KINDS["padded"].replace("Relu(p)", "Abs(p)"))
    clipped = parse(KINDS["padded"])
    one, two, three = (factors(model, {"p": (sides, 4)})["p"] for model in (seen, plain, clipped))
    np.testing.assert_array_equal(one.core, two.core)
    assert not np.allclose(one.core, three.core)


# -- what stays -------------------------------------------------------------------------------


def test_what_is_not_split_stays() -> None:
    model = parse(CHAIN)
    before = model.to_proto()
    result = fitted(model, {"q": ("both", 4)})
    assert model.to_proto() == before
    kept = {t.name: t for t in result.to_proto().graph.initializer}
    for tensor in before.graph.initializer:
        if tensor.name in ("w", "b", "m"):
            assert kept[tensor.name] == tensor


def test_no_splits_no_factors() -> None:
    model = parse(CHAIN)
    assert refit(model, layers(model), {}, samples(model)) == {}


def test_the_same_samples_give_the_same_factors() -> None:
    model = parse(CHAIN)
    plan: dict[str, tuple[Sides, int]] = {"p": ("both", 4), "q": ("input", 4), "y": ("output", 3)}
    one, two = factors(model, plan), factors(model, plan)
    assert list(one) == list(two) == ["p", "q", "y"]
    for where in plan:
        for part in ("reduce", "core", "expand", "bias"):
            np.testing.assert_array_equal(getattr(one[where], part), getattr(two[where], part))


def test_rows_that_fill_up_a_batch_do_not_count() -> None:
    model = parse(CHAIN)
    plan: dict[str, tuple[Sides, int]] = {"p": ("input", 4), "q": ("output", 4), "y": ("output", 3)}
    filled = [
        Batch({n: np.concatenate([a, 1000 * a[:4]]) for n, a in b.feeds.items()}, None, b.samples)
        for b in samples(model)
    ]
    wanted, found = factors(model, plan), factors(model, plan, filled)
    for where in plan:
        np.testing.assert_allclose(found[where].core, wanted[where].core, rtol=1e-3, atol=1e-4)


def test_few_rows_of_many_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitting, "LEAST_ROWS", 1000)
    model = parse(CHAIN)
    plan: dict[str, tuple[Sides, int]] = {"p": ("both", 4), "q": ("both", 4)}
    fewer = fitted(model, plan)
    monkeypatch.undo()
    assert error(model, fewer) < 1.3 * error(model, fitted(model, plan))


@pytest.mark.parametrize("form", [("output", 4), ("input", 4)])
def test_weights_that_are_nan_are_no_fault_of_the_pass(form: tuple[Sides, int]) -> None:
    model = parse(CHAIN, {"w": np.full(values(parse(CHAIN).to_proto())["w"].shape, np.nan)})
    with pytest.raises(ModelError, match=r"net: 'q' cannot be fitted: .*look for NaN"):
        factors(model, {"q": form})
