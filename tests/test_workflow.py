"""`pwopt.rewrite` from Python, on every network of the literature."""

import dataclasses
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import SMALL, parse, random_feeds, run

import pwopt
from pwopt.errors import BoundError, ModelError, PwoptError, SpecError
from pwopt.models import BUILDERS
from pwopt.observers import Timing
from pwopt.passes.bottleneck import Bottleneck
from pwopt.passes.fold_affine import FoldAffine
from pwopt.search.search import Bounds
from pwopt.workflow import AUTO, BEHIND, EXACT

SQUARE = """
    net (float[N,64,8,8] x) => (float[N,64,8,8] y)
    <float[64,64,3,3] w, float[64] scale, float[64] shift, float[64] mean, float[64] var>
    { c = Conv<pads=[1,1,1,1]>(x, w)  y = BatchNormalization(c, scale, shift, mean, var) }
"""


def test_the_input_stays_as_it_is() -> None:
    model = parse(SQUARE)
    before = model.to_proto().SerializeToString(deterministic=True)
    result = pwopt.rewrite(model, bottleneck=16)
    assert result.changed
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert not model.metadata()
    assert result.model is not model


def test_edits_made_before_count() -> None:
    model = parse(SQUARE)
    [*FoldAffine().apply(model, pwopt.Context())]
    result = pwopt.rewrite(model, bottleneck=16)
    assert [report.rewrote for report in result.reports] == [0, 1]


def test_a_file_or_a_model(tmp_path: Path) -> None:
    model = parse(SQUARE)
    path = tmp_path / "net.onnx"
    model.save(path)
    protos = [
        pwopt.rewrite(source, bottleneck=16).model.to_proto()
        for source in (model, path, str(path), pwopt.Model.load(path))
    ]
    assert all(proto == protos[0] for proto in protos[1:])
    with pytest.raises(ModelError, match="no such file"):
        pwopt.rewrite(tmp_path / "missing.onnx", bottleneck=16)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bottleneck": 8, "pipeline": "fold-affine"},
        {"exact": True, "pipeline": "fold-affine"},
    ],
)
def test_a_wish_or_a_pipeline(options: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="say what to do"):
        pwopt.rewrite(parse(SQUARE), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": "auto"}, "calibrated on samples; add --data"),
        ({"bottleneck": 8, "init": "calibrated"}, "calibrated on samples; add --data"),
        ({"bottleneck": "auto", "data": list, "init": "svd"}, "leave --init svd out"),
        ({"pipeline": "bottleneck{rank=8,init=calibrated}"}, "needs samples; add --data"),
    ],
)
def test_calibration_needs_samples(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        pwopt.rewrite(parse(SQUARE), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, -1, 65])
def test_a_rank_that_fits_nothing(rank: int) -> None:
    with pytest.raises(SpecError, match="rank"):
        pwopt.rewrite(parse(SQUARE), bottleneck=rank)


def test_a_pipeline_as_text_or_object() -> None:
    model = parse(SQUARE)
    steps = pwopt.Pipeline((FoldAffine(), Bottleneck(rank=16, sides="both")))
    results = [
        pwopt.rewrite(model, pipeline=steps),
        pwopt.rewrite(model, pipeline=str(steps)),
        pwopt.rewrite(model, bottleneck=16, sides="both"),
    ]
    assert {result.pipeline for result in results} == {str(steps)}
    assert all(r.model.to_proto() == results[0].model.to_proto() for r in results)
    assert results[0].reports == results[1].reports == results[2].reports


def test_an_empty_pipeline_changes_nothing() -> None:
    model = parse(SQUARE)
    result = pwopt.rewrite(model, pipeline=pwopt.Pipeline(()))
    assert not result.changed
    assert result.reports == ()
    assert result.model.to_proto() == model.to_proto()


def test_observers_watch_every_pass() -> None:
    class Notes(pwopt.Observer):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def before(self, step: pwopt.Pass, model: pwopt.Model) -> None:
            self.notes.append(f"before {step.name}: {len(model.graph.nodes)}")

        def after(self, step: pwopt.Pass, model: pwopt.Model, report: pwopt.PassReport) -> None:
            self.notes.append(f"after {report.name}: {len(model.graph.nodes)}")

    watching, timing = Notes(), Timing()
    pwopt.rewrite(parse(SQUARE), bottleneck=16, sides="input", observers=[watching, timing])
    assert watching.notes == [
        "before fold-affine: 2",
        "after fold-affine: 1",
        "before bottleneck: 1",
        "after bottleneck: 2",
    ]
    assert [name for name, _ in timing.seconds] == ["fold-affine", "bottleneck"]


def test_a_pass_that_breaks_the_model_is_named() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Breaker(pwopt.Pass):
        name = "breaker"
        exact = True

        def apply(self, model, context):  # type: ignore[no-untyped-def]
            model.graph.nodes[0].op = "Frobnicate"
            yield pwopt.Event("rewrote", "c", "broken")

    with pytest.raises(PwoptError, match="after pass 'breaker'"):
        pwopt.rewrite(parse(SQUARE), pipeline=pwopt.Pipeline((FoldAffine(), Breaker())))


def test_shapes_decide_the_counts() -> None:
    text = SQUARE.replace("N,64,8,8", "N,64,H,W")
    for side in (8, 16):
        result = pwopt.rewrite(parse(text), bottleneck=16, shapes={"x": (1, 64, side, side)})
        assert result.before.macs == side**2 * 9 * 64 * 64
        assert (
            result.after.macs
            == pwopt.analyze(result.model, shapes={"x": (1, 64, side, side)}).totals.macs
        )
    with pytest.raises(SpecError, match="no input 'z'"):
        pwopt.rewrite(parse(text), bottleneck=16, shapes={"z": (1, 64, 8, 8)})


def test_before_and_after_are_the_sizes_of_the_two_models() -> None:
    model = parse(SQUARE)
    result = pwopt.rewrite(model, bottleneck=16, sides="input")
    assert result.before == pwopt.analyze(model).totals
    assert result.after == pwopt.analyze(result.model).totals
    # The batch normalization becomes a bias.
    assert result.after.params == 64 * 16 + 16 * 64 * 9 + 64
    assert result.after.macs == 64 * (64 * 16 + 16 * 64 * 9)
    assert (result.before.nodes, result.after.nodes) == (2, 2)


# -- bottlenecks of chosen ranks --------------------------------------------------------------

PLAIN = """
    net (float[N,3,16,16] x) => (float[N,10] y)
    <float[64,3,4,4] w1, float[64] b1, float[64] scale, float[64] shift, float[64] mean,
     float[64] var, float[96,64,3,3] w2, float[10,96] w3>
    {
        a = Conv<strides = [4,4]>(x, w1, b1)
        n = BatchNormalization(a, scale, shift, mean, var)
        r = Relu(n)
        b = Conv<pads = [1,1,1,1]>(r, w2)
        s = Relu(b)
        g = GlobalAveragePool(s)
        f = Flatten(g)
        y = Gemm<transB = 1>(f, w3)
    }
"""
WIDENED = (
    PLAIN.replace("s = Relu(b)", "c = Conv(b, w4)  s = Relu(c)")
    .replace("float[10,96] w3", "float[10,192] w3, float[192,96,1,1] w4")
)  # fmt: skip
"""A 3×3, and a 1×1 of low rank that widens, so that one for both would be slower."""


def low_rank(out: int, inner: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    weight: np.ndarray = rng.standard_normal((out, 12)) @ rng.standard_normal((12, inner))
    return weight / (3 * inner**0.5)


def plain() -> pwopt.Model:
    return parse(PLAIN, {"w2": low_rank(96, 576).reshape(96, 64, 3, 3)})


def widened() -> pwopt.Model:
    return parse(WIDENED, {"w4": low_rank(192, 96).reshape(192, 96, 1, 1)})


def samples() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    for _ in range(4):
        yield {"x": rng.standard_normal((16, 3, 16, 16)).astype(np.float32)}


def test_auto_between_exact_rewrites() -> None:
    model = widened()
    before = model.to_proto()
    said: list[str] = []
    timing = Timing()
    result = pwopt.rewrite(
        model,
        bottleneck="auto",
        data=samples,
        bounds=Bounds(speedup=1.1),
        cost="macs",
        observers=[timing],
        progress=lambda what, *_: said.append(what),
    )
    assert model.to_proto() == before
    rewrote = [
        (report.name, event.where)
        for report in result.reports
        for event in report.events
        if event.kind == "rewrote"
    ]
    # The core of what is split merges with the 3×3 before it.
    assert rewrote == [("fold-affine", "n"), ("bottleneck", "c"), (BEHIND, "c.core")]
    assert result.pipeline == f"{EXACT['macs']},{AUTO},{BEHIND}"
    assert {name for name, _ in timing.seconds} == {*EXACT["macs"].split(",")}
    assert "fitting layers" in said
    assert result.front is not None
    assert (result.before.macs or 0) >= 1.1 * (result.after.macs or 0)
    onnx.checker.check_model(result.model.to_proto(), full_check=True)
    assert result.model.metadata()["pwopt.pipeline"] == result.pipeline
    feeds = next(samples())
    (expected,), (given,) = run(model, feeds), run(result.model, feeds)
    assert ((expected - given) ** 2).sum() < 0.01 * (expected**2).sum()


def test_auto_with_nothing_to_merge_behind() -> None:
    result = pwopt.rewrite(
        plain(), bottleneck="auto", data=samples, bounds=Bounds(speedup=2), cost="macs"
    )
    assert result.pipeline == f"{EXACT['macs']},{AUTO}"
    assert [event.where for event in result.reports[-1].events] == ["n", "b", "y"]
    assert result.front is not None
    assert result.front.chosen is not None
    assert result.front.points[result.front.chosen].macs == result.after.macs
    assert (result.before.macs or 0) >= 2 * (result.after.macs or 0)


def test_a_bound_that_cannot_be_kept() -> None:
    with pytest.raises(BoundError, match=r"^net: no allocation .* 40 times as fast"):
        pwopt.rewrite(
            plain(), bottleneck="auto", data=samples, bounds=Bounds(speedup=40), cost="macs"
        )


def test_samples_at_a_given_rank() -> None:
    all_of_them, few = (
        pwopt.rewrite(plain(), bottleneck=16, data=samples, samples=limit) for limit in (64, 16)
    )
    assert all_of_them.pipeline == "fold-affine,bottleneck{rank=16,init=calibrated}"
    assert all_of_them.reports[-1].rewrote == 1
    assert all_of_them.front is None
    assert all_of_them.model.to_proto() != few.model.to_proto()
    svd = pwopt.rewrite(plain(), bottleneck=16, data=samples, init="svd")
    assert svd.model.to_proto() == pwopt.rewrite(plain(), bottleneck=16).model.to_proto()


# -- every network ----------------------------------------------------------------------------

RANK = 4


def build(name: str) -> pwopt.Model:
    return pwopt.Model(BUILDERS[name](**SMALL.get(name, {})))


@pytest.mark.parametrize("name", BUILDERS)
def test_every_network_survives(name: str) -> None:
    model = build(name)
    widest = max(
        (max(w.dims[:2]) for w in model.proto.graph.initializer if len(w.dims) == 4), default=RANK
    )
    result = pwopt.rewrite(model, bottleneck=min(RANK, widest))
    proto = result.model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert result.after.macs <= result.before.macs
    assert result.after.params <= result.before.params
    assert proto.graph.input == model.proto.graph.input
    assert proto.graph.output == model.proto.graph.output

    feeds = random_feeds(model, batch=1)
    before, after = run(model, feeds), run(result.model, feeds)
    assert [array.shape for array in after] == [array.shape for array in before]
    assert all(np.isfinite(array).all() for array in after)
    if not any(event.kind == "rewrote" for event in result.reports[-1].events):
        for ours, theirs in zip(after, before, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", sorted({*BUILDERS} - {"worked_example"}))
def test_what_analyze_proposes_is_what_rewrite_does(name: str) -> None:
    folded = pwopt.rewrite(build(name), pipeline="fold-affine").model
    analysis = pwopt.analyze(folded, bottleneck=RANK)
    proposed = {
        layer.output: (found.sides, found.rank, found.macs, found.params)
        for layer in analysis.layers
        if (found := layer.candidate)
    }
    declined = {
        layer.output: layer.why_not
        for layer in analysis.layers
        if layer.why_not and layer.op == "Conv"
    }
    result = pwopt.rewrite(folded, bottleneck=RANK)
    assert result.reports[0].rewrote == 0  # all affines were folded before
    events = result.reports[1].events
    done = {
        event.where: tuple(event.data[key] for key in ("sides", "rank", "macs", "params"))
        for event in events
        if event.kind == "rewrote"
    }
    assert done == proposed
    assert {e.where: e.reason for e in events if e.kind == "skipped"} == declined

    saved = sum(layer.saved_macs for layer in analysis.layers)
    assert result.after.macs == analysis.totals.macs - saved
    split = {layer.output: layer.params for layer in analysis.layers if layer.candidate}
    saved_params = sum(params - proposed[where][3] for where, params in split.items())
    assert result.after.params == analysis.totals.params - saved_params
    weights = (w for w in result.model.to_proto().graph.initializer if w.data_type == 1)
    assert result.after.params == sum(prod(w.dims) for w in weights)


def test_a_model_made_dense_takes_larger_images() -> None:
    model = pwopt.Model(BUILDERS["vgg16"](**SMALL["vgg16"]))
    height = model.proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    dense = pwopt.rewrite(model, pipeline="gemm-to-conv{dense=true}").model
    name = dense.proto.graph.input[0].name
    larger = {name: (1, 3, 2 * height, 2 * height)}
    assert pwopt.analyze(dense, shapes=larger).inputs == larger
