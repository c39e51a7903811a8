"""Walking through a network ends where running it does, replaced layers or not."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import Array, assert_close, parse, random_feeds, run

from pwopt import external, runtime, shapes
from pwopt.calibration import walk as walking
from pwopt.calibration.walk import Stop, Walk
from pwopt.data import Batch
from pwopt.linear import Linear, linear
from pwopt.model import Model
from pwopt.models import BUILDERS

CHAIN = """
    net (float[N,4,8,8] x) => (float[N,5] y)
    <float[8,4,3,3] w, float[8] b, float[8,8,1,1] v, float[8,5] m, float[5] c>
    {
        a = Conv<pads = [1,1,1,1], strides = [2,2]>(x, w, b)
        r = Relu(a)
        p = Conv(r, v)
        g = GlobalAveragePool(p)
        f = Flatten(g)
        h = MatMul(f, m)
        y = Add(h, c)
    }
"""
BRANCHES = """
    net (float[N,4,6,6] x, float[N,4,6,6] other)
        => (float[N,8,6,6] y, float[N,4,6,6] a, float[N,4,1,1] z)
    <float[4,4,3,3] u, float[4,4,3,3] v, float[4,4,1,1] w, float[4] b>
    {
        a = Conv<pads = [1,1,1,1]>(x, u, b)
        s = Sigmoid(other)
        t = Conv<pads = [1,1,1,1]>(x, v)
        both = Add(a, t)
        q = Conv(both, w, b)
        sum = Add(q, s)
        rest = Add(sum, x)
        y = Concat<axis = 1>(rest, t)
        z = GlobalAveragePool(s)
    }
"""
HEAD = """
    net (float[N,4,2,2] x) => (float[N,3] y)
    <float[6,16] w, float[1,6] b, float[6,3] v, int64[2] axes = {0, 2}, int64[1] minus = {-1}>
    {
        s = Shape(x)
        first = Constant<value = int64[1] {0}>()
        n = Gather(s, first)
        shape = Concat<axis = 0>(n, minus)
        f = Reshape(x, shape)
        g = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(f, w, b)
        r = Relu(g)
        y = Gemm(r, v)
    }
"""
INSIDE = """
    net (float[N,4,4,4] x, bool cond) => (float[N,4,4,4] y)
    <float[4,4,1,1] w, float[4,4,1,1] v, float[4] shift>
    {
        a = Conv(x, w)
        k = Neg(shift)
        i = If(cond) <
            then_branch = yes () => (float[N,4,4,4] t) { t = Abs(a) },
            else_branch = no () => (float[N,4,4,4] e)
            { low = ReduceMin<keepdims = 0>(k)  e = Max(a, low) }
        >
        y = Conv(i, v)
    }
"""
TEXTS = {"chain": CHAIN, "branches": BRANCHES, "head": HEAD, "inside": INSIDE}
SIZES = {
    "resnet_projection": {"size": 8, "in_channels": 32, "width": 8},
    "inception_reduced": {"size": 8, "in_channels": 32},
    "mlp_head": {"size": 3, "in_channels": 8},
}
NETWORKS = [*TEXTS, *SIZES]


def layers(model: Model) -> list[Linear]:
    known = shapes.infer(model, shapes.bind(model))
    found = (linear(node, known) for node in model.graph.nodes)
    return [layer for layer in found if isinstance(layer, Linear)]


def feed(model: Model, *sizes: int) -> list[Batch]:
    """Make batches of these sizes."""
    drawn = [random_feeds(model, batch=size, seed=seed) for seed, size in enumerate(sizes)]
    return [
        Batch({name: np.asarray(array) for name, array in feeds.items()}, None, size)
        for feeds, size in zip(drawn, sizes, strict=True)
    ]


def model_named(name: str) -> Model:
    return parse(TEXTS[name]) if name in TEXTS else Model(BUILDERS[name](**SIZES[name]))


def assert_ends_as(walk: Walk, teacher: Model, student: Model, batches: Sequence[Batch]) -> None:
    ends = list(walk.outputs())
    assert len(ends) == len(batches)
    names = [output.name for output in teacher.proto.graph.output]
    for batch, (ours, theirs) in zip(batches, ends, strict=True):
        assert list(ours) == list(theirs) == names
        for values, model in ((ours, teacher), (theirs, student)):
            whole = [array[: batch.samples] for array in run(model, batch.feeds)]
            assert_close(list(values.values()), whole)


@pytest.fixture(params=[1 << 30, 2000, 0], ids=["memory", "both", "files"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "MEMORY", request.param)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("name", NETWORKS)
def test_without_replacement_it_ends_as_the_network(name: str) -> None:
    model = model_named(name)
    before = model.to_proto()
    batches = feed(model, 3, 3, 2)
    walk = Walk(model, layers(model), batches)
    stops = []
    for stop in walk:
        assert all(one is other for one, other, _ in stop.pairs())
        stops.append(stop.layer.where)
    assert stops == [layer.where for layer in layers(model)]
    assert_ends_as(walk, model, model, batches)
    assert model.to_proto() == before


def scaled(model: Model, where: set[str], factor: float = 1.5) -> Model:
    """Multiply weights of some layers; biases stay."""
    changed = model.copy()
    for layer in layers(changed):
        if layer.where in where:
            weight = layer.node.inputs[1]
            layer.node.inputs[1] = type(weight)(f"{layer.where}.scaled", weight.values * factor)
    return changed


def alone(model: Model, where: str) -> Model:
    """Make a model of one layer."""
    copy = model.copy()
    node = next(n for n in copy.graph.nodes if n.outputs[0].name == where)
    copy.graph.nodes[:] = [node]
    copy.graph.inputs[:] = [node.inputs[0]]
    copy.graph.outputs[:] = [node.outputs[0]]
    node.inputs[0].dtype = np.dtype(np.float32)
    return copy


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("name", NETWORKS)
def test_replaced_layers_give_the_rewritten_network(name: str) -> None:
    model = model_named(name)
    batches = feed(model, 3, 2)
    replaced = {layer.where for layer in layers(model)[::2]}
    rewritten = scaled(model, replaced)
    walk = Walk(model, layers(model)[::-1], batches)
    for stop in walk:
        if stop.layer.where in replaced:
            part = runtime.session(alone(rewritten, stop.layer.where))

            def replacement(x: Array, stop: Stop = stop, part: object = part) -> Array:
                out = runtime.run(part, {stop.input: x}, name="part")  # type: ignore[arg-type]
                return out[stop.layer.where]

            stop.replace(replacement)
    assert_ends_as(walk, model, rewritten, batches)


def test_pairs_are_what_teacher_and_student_really_have() -> None:
    model = parse(CHAIN)
    batches = feed(model, 2, 2)
    rewritten = scaled(model, {"a"})
    for stop in Walk(model, layers(model), batches):
        if stop.layer.where == "a":
            stop.replace(lambda x: run(alone(rewritten, "a"), {"x": x})[0])
            continue
        for batch, (teacher, student, output) in zip(batches, stop.pairs(), strict=True):
            for which, values in ((model, teacher), (rewritten, student)):
                whole = which.to_proto()
                whole.graph.output.append(onnx.ValueInfoProto(name=stop.input))
                whole.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
                assert_close([values], run(whole, batch.feeds)[1:])
            assert_close(run(alone(model, stop.layer.where), {stop.input: teacher}), [output])


def test_frontier_values_of_a_sum() -> None:
    """The shortcut of a residual sum is there for teacher and student, and not computed twice."""
    model = parse(BRANCHES)
    for stop in Walk(model, layers(model), feed(model, 2)):
        if stop.layer.where == "a":
            assert stop.frontier == ("x", "other")
            stop.replace(lambda x: 0 * x)
        elif stop.layer.where == "t":
            assert stop.frontier == ("x", "a", "s")  # z and y read s; x is read again
            ((teacher, student),) = stop.values("a")
            assert student.any() != teacher.any()
            ((teacher, student),) = stop.values("s")
            assert student is teacher


@pytest.mark.parametrize("name", NETWORKS)
def test_tail_gives_the_networks_outputs(name: str) -> None:
    model = model_named(name)
    batches = feed(model, 3, 2)
    for stop in Walk(model, layers(model), batches):
        where, tail = stop.layer.where, stop.tail()
        onnx.checker.check_model(checkable(tail), full_check=True)
        assert {i.name for i in shapes.inputs(tail)} == {*stop.behind}
        assert where in stop.behind
        session = runtime.session(tail)
        rewritten = scaled(model, {where})
        own, half_more = alone(model, where), alone(rewritten, where)
        for layer, whole in ((own, model), (half_more, rewritten)):
            for batch, (x, read) in zip(batches, stop.feeds(), strict=True):
                (output,) = run(layer, {stop.input: x})
                outputs = runtime.run(session, {**read, where: output}, name="tail")
                expected = dict(
                    zip([o.name for o in model.graph.outputs], run(whole, batch.feeds), strict=True)
                )
                assert outputs
                for output, values in outputs.items():
                    assert_close([values], [expected[output]])


def checkable(model: Model) -> onnx.ModelProto:
    """Give the outputs types, which onnxruntime does without, and take weights in."""
    proto = model.to_proto()
    external.load(proto, model.folder)
    inferred = onnx.shape_inference.infer_shapes(proto)
    given = {i.name: i for i in proto.graph.input}
    for output, known in zip(proto.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(given.get(output.name, known))  # some inputs are passed on
        if not output.type.HasField("tensor_type"):  # behind an If of two shapes, say
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return proto


def test_rows_that_fill_up_a_batch_do_not_count() -> None:
    model = parse(CHAIN.replace("[N,4,8,8]", "[4,4,8,8]").replace("[N,5]", "[4,5]"))
    feeds = random_feeds(model)
    feeds["x"][3] = feeds["x"][0]
    batches = [*feed(model, 4), Batch(feeds, None, 3)]
    walk = Walk(model, layers(model), batches)
    for stop in walk:
        counts = [[len(array) for array in arrays] for arrays in stop.pairs()]
        assert counts == [[4, 4, 4], [3, 3, 3]]
        (_, (x, read)) = stop.feeds()
        assert {len(array) for array in (x, *read.values())} == {4}
        stop.replace(lambda x, stop=stop: run(alone(model, stop.layer.where), {stop.input: x})[0])
    assert_ends_as(walk, model, model, batches)


def test_outputs_that_no_node_computes_and_layers_in_vain() -> None:
    model = parse(
        """
        net (float[N,4] x) => (float[N,4] x, float[2] k, float[N,2] y, float[1,2] dead_end)
        <float[2] k = {1, 2}, float[4,2] w, float[1,4] one>
        {
            vain = MatMul(x, w)
            y = MatMul(x, w)
            dead_end = MatMul(one, w)
        }
        """
    )
    batches = feed(model, 2)
    walk = Walk(model, layers(model), batches)
    assert [stop.layer.where for stop in walk] == ["y"]
    assert_ends_as(walk, model, model, batches)


def test_a_replacement_of_another_shape_is_refused() -> None:
    model = parse(CHAIN)
    walk = iter(Walk(model, layers(model), feed(model, 2)))
    next(walk).replace(lambda x: x)
    with pytest.raises(ValueError, match="'a'"):
        next(walk)


def test_files_are_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = parse(CHAIN)
    walk = Walk(model, layers(model), feed(model, 2))
    most = max(sum(1 for _ in tmp_path.rglob("*.npy")) for _ in walk)
    assert 0 < most <= 2  # input and output of the layer
    assert list(walk.outputs())
    del walk
    assert not list(tmp_path.iterdir())
