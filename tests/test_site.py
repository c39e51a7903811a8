"""A site reads, computes and writes what it does in its model."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import Array, parse, random_feeds, run

from pwopt import runtime
from pwopt.model import Model
from pwopt.shapes import bind, infer_types, inputs
from pwopt.site import extract, neighbours

NET = """
    net (float[N,4,8,8] x) => (float[N,32] y)
    <float[4,4,3,3] w, float[4] b, int64[1] minus = {-1}>
    {
        a = Relu(x)
        k = Constant<value = float[4,1,1] {1, 2, 3, 4}>()
        kk = Neg(k)
        c = Conv<pads = [1,1,1,1], strides = [2,2]>(a, w, b)
        m = Mul(c, kk)
        p, = MaxPool<kernel_shape = [2,2], strides = [2,2]>(m)
        s = Shape(p)
        zero = Constant<value = int64[1] {0}>()
        n = Gather(s, zero)
        shape = Concat<axis = 0>(n, minus)
        f = Reshape(p, shape)
        q = Concat<axis = 1>(f, f)
        y = Tanh(q)
    }
""".replace("p, =", "p =")


def site(model: Model, *names: str, hops: int = 0, batch: int = 2) -> Model:
    nodes = [n for n in model.graph.nodes if n.outputs[0].name in names]
    types = infer_types(model, bind(model, batch=batch))
    return extract(model, neighbours(nodes, hops), types)


def names(model: Model) -> tuple[set[str], list[str], list[str]]:
    proto = model.proto.graph
    ops = [node.op_type for node in proto.node]
    return {i.name for i in proto.input}, ops, [o.name for o in proto.output]


def assert_as_in(model: Model, part: Model) -> None:
    """Run the site on what the whole model feeds it, and compare what comes out."""
    whole = Model(model.to_proto())
    for info in (*part.proto.graph.input, *part.proto.graph.output):
        if all(info.name != i.name for i in (*whole.proto.graph.input, *whole.proto.graph.output)):
            whole.proto.graph.output.append(info)
    feeds = random_feeds(model, batch=2)
    results = run(whole, feeds)
    known: dict[str, Array] = {
        **feeds,
        **{o.name: v for o, v in zip(whole.proto.graph.output, results, strict=True)},
    }
    out = runtime.run(
        runtime.session(part), {i.name: known[i.name] for i in inputs(part)}, name="site"
    )
    assert out
    for name, values in out.items():
        np.testing.assert_allclose(values, known[name], rtol=1e-5, atol=1e-6)


def test_inputs_outputs_and_types() -> None:
    part = site(parse(NET), "c", "m")
    assert names(part) == ({"a"}, ["Constant", "Neg", "Conv", "Mul"], ["m"])
    assert [i.shape for i in inputs(part)] == [(2, 4, 8, 8)]
    assert [t.name for t in part.proto.graph.initializer] == ["w", "b"]
    onnx.checker.check_model(part.proto, full_check=True)
    assert_as_in(parse(NET), part)


@pytest.mark.parametrize("name", [["c"], ["m"], ["p"], ["f"], ["c", "f"], ["y"], ["q", "y"]])
@pytest.mark.parametrize("hops", [0, 1, 2, 9])
def test_every_part_computes_what_it_does_in_the_whole(name: list[str], hops: int) -> None:
    model = parse(NET)
    before = model.to_proto()
    assert_as_in(model, site(model, *name, hops=hops))
    assert model.to_proto() == before


def test_shapes_are_computed_in_the_site() -> None:
    read, ops, _ = names(site(parse(NET), "f"))
    assert read == {"p"}  # whose shape is that of random values, too
    assert ops == ["Shape", "Constant", "Gather", "Concat", "Reshape"]


def test_what_hangs_on_an_input_is_not_computed_again() -> None:
    read, ops, _ = names(site(parse(NET), "p"))
    assert (read, ops) == ({"m"}, ["MaxPool"])


def test_weights_are_shared_not_decoded() -> None:
    model = parse(NET)
    conv = next(n for n in model.graph.nodes if n.op == "Conv")
    site(model, "c")
    assert not isinstance(conv.inputs[1]._values, np.ndarray)


def test_outputs_that_nobody_reads_are_none_of_the_site() -> None:
    model = parse(
        """
        net (float[2,4] x) => (float[2,4] y)
        { d, mask = Dropout(x)  y = Relu(d) }
        """
    )
    assert names(site(model, "d"))[2] == ["d"]


def test_an_output_in_the_middle_and_a_reader_outside() -> None:
    model = parse(
        """
        net (float[2,4] x) => (float[2,4] a, float[2,4] y, float[2,4] z)
        { a = Relu(x)  b = Neg(a)  y = Abs(b)  z = Exp(b) }
        """
    )
    assert names(site(model, "a", "b", "y"))[2] == ["a", "b", "y"]


def test_empty_inputs_stay_empty() -> None:
    model = parse(
        """
        net (float[2,4] x) => (float[2,4] y)
        <float high> { a = Relu(x)  y = Clip(a, , high) }
        """
    )
    part = site(model, "y")
    assert list(part.proto.graph.node[0].input) == ["a", "", "high"]
    assert_as_in(model, part)


def test_a_tensor_read_in_a_subgraph_leaves() -> None:
    model = parse(
        """
        net (float[4] x, bool cond) => (float[4] y)
        {
            a = Neg(x)
            y = If(cond) <
                then_branch = yes () => (float[4] t) { t = Abs(a) },
                else_branch = no () => (float[4] e) { e = Exp(a) }
            >
        }
        """
    )
    assert names(site(model, "a")) == ({"x"}, ["Neg"], ["a"])
    assert names(site(model, "a", hops=2))[1] == ["Neg"]  # If has a body and stays outside


def test_external_weights(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(
        parse(NET).to_proto(), path, save_as_external_data=True, location="w", size_threshold=0
    )
    model = Model.load(path)
    part = site(model, "c", "m")
    feeds = {i.name: np.ones(i.shape, i.dtype) for i in inputs(part)}  # type: ignore[arg-type]
    inside = runtime.run(runtime.session(part), feeds, name="site")
    here = runtime.run(runtime.session(site(parse(NET), "c", "m")), feeds, name="site")
    np.testing.assert_array_equal(inside["m"], here["m"])


def test_neighbours_go_both_ways() -> None:
    model = parse(NET)
    conv = [n for n in model.graph.nodes if n.op == "Conv"]
    assert [n.op for n in neighbours(conv, 0)] == ["Conv"]
    assert {n.op for n in neighbours(conv, 1)} == {"Relu", "Conv", "Mul"}
    assert {n.op for n in neighbours(conv, 2)} == {"Relu", "Conv", "Mul", "Neg", "MaxPool"}


def test_a_site_of_a_graph_being_edited() -> None:
    model = parse(NET)
    relu = next(n for n in model.graph.nodes if n.op == "Relu")
    relu.op = "Softplus"
    model.graph.nodes.append(gs.Node("Abs", "", {}, [relu.outputs[0]], [gs.Variable("new")]))
    assert names(site(model, "a"))[1:] == (["Softplus"], ["a"])
