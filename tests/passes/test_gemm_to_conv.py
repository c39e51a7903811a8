"""gemm-to-conv: which layers become convolutions, how exactly, what stays for which reason."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from helpers import (
    ASSETS,
    RANDOM_GRAPHS,
    apply,
    assert_close,
    assert_pass,
    assert_same_numbers,
    assert_skipped,
    checked,
    needs_assets,
    parse,
    random_feeds,
    random_weight,
    run,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pwopt.model import Model
from pwopt.models import BUILDERS
from pwopt.passes.gemm_to_conv import GemmToConv
from pwopt.rewriting import Context, Event, Judgement

Array = npt.NDArray[Any]

CONVERT = GemmToConv()
DENSE = GemmToConv(dense=True)

HEADER = "g (float[N,4,3,2] x) => (float[N,5] y)"

COVERED = f"""
{HEADER} <float[5] b, float[5,4,3,2] w>
{{ y.map = Conv<kernel_shape=[3,2]>(x, w, b)  y = Flatten<axis=1>(y.map) }}
"""


def refuse(model: Model, edit: Any, *, free: bool) -> Judgement:
    return Judgement(False, "not worth it")


# -- one layer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flatten",
    [
        "t = Flatten(x)",
        "t = Flatten<axis=-3>(x)",
        "s = Constant<value = int64[2] {0,-1}>()  t = Reshape(x, s)",
        "s = Constant<value = int64[2] {-1,24}>()  t = Reshape(x, s)",
        "i = Identity(shape)  t = Reshape(x, i)",
        """
        s = Shape(x)  zero = Constant<value = int64[1] {0}>()  n = Gather(s, zero)
        rest = Constant<value = int64[1] {-1}>()  c = Concat<axis=0>(n, rest)  t = Reshape(x, c)
        """,
    ],
)
def test_a_flattened_map(flatten: str) -> None:
    shape = "int64[2] shape = {-1, 24}, " if "(shape)" in flatten else ""
    before = f"{HEADER} <{shape} float[5,24] w, float[5] b>"
    outcome = assert_pass(before + f"{{ {flatten} y = Gemm<transB=1>(t, w, b) }}", CONVERT, COVERED)
    event = Event("rewrote", "y", "1 layer written as Conv", {"layers": 1})
    assert outcome.events == [event]


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize(
    "flatten",
    [
        "t = Flatten(x)",
        "t = Squeeze(x, axes)",
        "u = Squeeze(x, axes)  t = Identity(u)",
        "s = Constant<value = int64[2] {-1,4}>()  t = Reshape(x, s)",
    ],
)
def test_a_map_of_one_pixel(flatten: str, opset: int) -> None:
    axes = "<int64[2] axes = {2, -1}, float[5,4] w, float[5] b>"
    if opset < 13:
        flatten = flatten.replace("Squeeze(x, axes)", "Squeeze<axes=[2,3]>(x)")
        axes = "<float[5,4] w, float[5] b>"
    before = parse(
        f'<ir_version: 8, opset_import: ["" : {opset}]>'
        f"g (float[N,4,1,1] x) => (float[N,5] y) {axes} {{ {flatten} y = Gemm<transB=1>(t, w, b) }}"
    )
    outcome = apply(before, CONVERT)
    ops = [node.op_type for node in outcome.proto.graph.node]
    assert [op for op in ops if op != "Identity"] == ["Conv", "Flatten"]
    assert values(outcome.proto)["w"].shape == (5, 4, 1, 1)
    assert_same_numbers(outcome.model, before)


@pytest.mark.parametrize("axes", ["2,3", "-1,-2", "3,2"])
@pytest.mark.parametrize("opset", [17, 18])
def test_a_mean_over_space_that_drops_it(axes: str, opset: int) -> None:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]> {HEADER}'
    mean = f"ReduceMean<axes=[{axes}], keepdims=0>(x)"
    kept = f"ReduceMean<axes=[{axes}], keepdims=1>(x)"
    initializer = ""
    if opset == 18:
        mean, kept = "ReduceMean<keepdims=0>(x, axes)", "ReduceMean<keepdims=1>(x, axes)"
        initializer = f"int64[2] axes = {{{axes}}},"
    before = f"""
    {header} <{initializer} float[5,4] w, float[5] b>
    {{ t = {mean}  y = Gemm<transB=1>(t, w, b) }}
    """
    after = f"""
    {header} <{initializer} float[5] b, float[5,4,1,1] w>
    {{
      t.map = {kept}
      y.map = Conv<kernel_shape=[1,1]>(t.map, w, b)
      y = Flatten<axis=1>(y.map)
    }}
    """
    assert_pass(before, CONVERT, after)


def test_axes_behind_a_constant_node_stay() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[N,4,3,2] x) => (float[N,5] y) <float[5,4] w>
    {
      axes = Constant<value = int64[2] {2, 3}>()
      t = ReduceMean<keepdims=0>(x, axes)
      y = Gemm<transB=1>(t, w)
    }
    """
    outcome = apply(parse(text), CONVERT)
    ops = [node.op_type for node in outcome.proto.graph.node]
    assert ops == ["Constant", "ReduceMean", "Conv", "Flatten"]
    assert_same_numbers(outcome.model, parse(text))


def test_a_computed_shape_that_others_read() -> None:
    text = """
    g (float[N,4,3,2] x) => (float[N,5] y, int64[1] rest) <float[24,5] w>
    {
      s = Shape(x)  n, c, hw = Split(s, parts)
      twenty, k = Split(known, halves)
      rest = Neg(k)  d = Concat<axis=0>(n, twenty)
      t = Reshape(x, d)  y = Gemm(t, w)
    }
    """
    text = text.replace(
        "<float[24,5] w>",
        "<float[24,5] w, int64[3] parts = {1, 1, 2}, int64[2] known = {24, 7},"
        " int64[2] halves = {1, 1}>",
    )
    outcome = apply(parse(text), CONVERT)
    ops = [node.op_type for node in outcome.proto.graph.node]
    assert sorted(ops) == ["Conv", "Flatten", "Neg", "Split"]
    assert_same_numbers(outcome.model, parse(text))


def test_a_mean_over_space_of_an_open_size() -> None:
    before = """
    g (float[N,4,H,W] x) => (float[N,5] y) <float[5,4] w>
    { t = ReduceMean<axes=[2,3], keepdims=0>(x)  y = Gemm<transB=1>(t, w) }
    """
    assert apply(parse(before), CONVERT).rewrote == ["y"]


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("transposed", [0, 1])
def test_values_stay_bit_for_bit(shape: tuple[int, ...], transposed: int) -> None:
    sizes = ",".join(map(str, shape))
    features = 4 * int(np.prod(shape))
    dims = f"5,{features}" if transposed else f"{features},5"
    before = parse(
        f"g (float[N,4,{sizes}] x) => (float[N,5] y) <float[{dims}] w, float[1,5] b>"
        f"{{ t = Flatten(x)  y = Gemm<transB={transposed}>(t, w, b) }}"
    )
    outcome = apply(before, CONVERT)
    old, new = values(before.proto), values(outcome.proto)
    matrix = old["w"] if transposed else old["w"].T
    np.testing.assert_array_equal(new["w"], matrix.reshape(5, 4, *shape))
    np.testing.assert_array_equal(new["b"], old["b"].reshape(5))
    assert_same_numbers(outcome.model, before)


@pytest.mark.parametrize("perm", [[0, 2, 3, 1], [0, 3, 1, 2], [0, 3, 2, 1], [0, 1, 3, 2]])
def test_a_transposed_map(perm: list[int]) -> None:
    before = f"""
    {HEADER} <float[5,24] w>
    {{ p = Transpose<perm={perm}>(x)  t = Flatten(p)  y = Gemm<transB=1>(t, w) }}
    """
    after = f"""
    {HEADER} <float[5,4,3,2] w>
    {{ y.map = Conv<kernel_shape=[3,2]>(x, w)  y = Flatten<axis=1>(y.map) }}
    """
    assert_pass(before, CONVERT, after)


def test_a_transposed_map_that_others_read() -> None:
    text = """
    g (float[N,4,3,2] x) => (float[N,5] y, float[N,24] r, float[N,3,2,4] q) <float[24,5] w>
    {
      p = Transpose<perm=[0,2,3,1]>(x)  q = Relu(p)
      t = Flatten(p)  r = Relu(t)  y = MatMul(t, w)
    }
    """
    model = parse(text)
    outcome = apply(model, CONVERT)
    assert outcome.rewrote == ["y"]
    ops = [node.op_type for node in outcome.proto.graph.node]
    assert ops == ["Transpose", "Relu", "Flatten", "Relu", "Conv", "Flatten"]
    assert_same_numbers(outcome.model, model)


def test_a_transpose_that_moves_the_batch() -> None:
    text = """
    g (float[4,N,3,2] x) => (float[N,5] y) <float[24,5] w>
    { p = Transpose<perm=[1,0,2,3]>(x)  t = Flatten(p)  y = MatMul(t, w) }
    """
    model = parse(text)
    outcome = apply(model, CONVERT)
    assert [n.op_type for n in outcome.proto.graph.node] == ["Transpose", "Conv", "Flatten"]
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 3, 3, 2)).astype(np.float32)}
    assert_close(run(outcome.model, feeds), run(model, feeds))


@pytest.mark.parametrize("bias", ["", "1", "5", "1,5", "1,1"])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("alpha", [1.0, -3.0])
def test_bias_alpha_beta(bias: str, alpha: float, beta: float) -> None:
    kind = f"float[{bias}]" if bias else "float"
    before = parse(
        f"{HEADER} <float[24,5] w, {kind} b>"
        f"{{ t = Flatten(x)  y = Gemm<alpha={alpha}, beta={beta}>(t, w, b) }}"
    )
    outcome = apply(before, CONVERT)
    assert outcome.rewrote == ["y"]
    assert_same_numbers(outcome.model, before)
    name = "w" if alpha == 1 else "y.weight"
    assert outcome.proto.graph.node[0].input[1] == name
    expected = (alpha * values(before.proto)["w"].astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(values(outcome.proto)[name], expected.T.reshape(5, 4, 3, 2))
    assert len(outcome.proto.graph.node[0].input) == (3 if beta else 2)


def test_an_empty_bias() -> None:
    before = parse(f"{HEADER} <float[24,5] w> {{ t = Flatten(x)  y = Gemm(t, w) }}")
    before.proto.graph.node[1].input.append("")
    assert apply(before, CONVERT).proto.graph.node[0].input == ["x", "w"]


@pytest.mark.parametrize("operands", ["m, b", "b, m"])
@pytest.mark.parametrize("bias", ["", "1", "5", "1,5"])
def test_matmul_and_add(operands: str, bias: str) -> None:
    before = f"""
    {HEADER} <float[24,5] w, {f"float[{bias}]" if bias else "float"} b>
    {{ t = Flatten(x)  m = MatMul(t, w)  y = Add({operands}) }}
    """
    name = "b" if bias in ("5", "1,5") else "y.bias"
    after = COVERED.replace("[5] b", f"[5] {name}").replace("w, b)", f"w, {name})")
    if bias != "5":
        after = after.replace(
            f"<float[5] {name}, float[5,4,3,2] w>", f"<float[5,4,3,2] w, float[5] {name}>"
        )
    assert_pass(before, CONVERT, after)


def test_a_sum_that_differs_from_row_to_row_stays_behind() -> None:
    text = """
    g (float[2,4,3,2] x) => (float[2,5] y) <float[24,5] w, float[2,5] b>
    { t = Flatten(x)  m = MatMul(t, w)  y = Add(m, b) }
    """
    model = parse(text)
    outcome = apply(model, CONVERT)
    assert [n.op_type for n in outcome.proto.graph.node] == ["Conv", "Flatten", "Add"]
    assert_same_numbers(outcome.model, model)


def test_float16() -> None:
    text = """
    g (float16[N,4,3,2] x) => (float16[N,5] y) <float16[24,5] w, float16[5] b>
    { t = Flatten(x)  y = Gemm(t, w, b) }
    """
    outcome = apply(parse(text), CONVERT)
    assert outcome.rewrote == ["y"]
    assert_same_numbers(outcome.model, parse(text), 1e-2)


# -- heads ------------------------------------------------------------------------------------


def test_a_whole_head_keeps_one_flatten() -> None:
    before = """
    g (float[N,4,8,8] x) => (float[N,3] y)
    <float[6,4] v, float[6] c, float[3,6] w, float[3] b>
    {
      a = GlobalAveragePool(x)
      t = Flatten(a)
      d = Dropout(t)
      u = Gemm<transB=1>(d, v, c)
      r = Relu(u)
      e, mask = Dropout(r)
      s = Gemm<transB=1>(e, w, b)
      y = Sigmoid(s)
    }
    """
    after = """
    g (float[N,4,8,8] x) => (float[N,3] y)
    <float[6] c, float[3] b, float[6,4,1,1] v, float[3,6,1,1] w>
    {
      a = GlobalAveragePool(x)
      d.map = Dropout(a)
      u.map = Conv<kernel_shape=[1,1]>(d.map, v, c)
      r.map = Relu(u.map)
      e.map = Dropout(r.map)
      s.map = Conv<kernel_shape=[1,1]>(e.map, w, b)
      y.map = Sigmoid(s.map)
      y = Flatten<axis=1>(y.map)
    }
    """
    outcome = assert_pass(before, CONVERT, after)
    assert outcome.events == [Event("rewrote", "u", "2 layers written as Conv", {"layers": 2})]


def test_arithmetic_and_normalization_between_layers() -> None:
    text = """
    g (float[N,4,3,2] x) => (float[N,3] y)
    <float[24] p, float[1,1] q, float[6,24] v, float[6] m, float[6] slope, float[3,6] w,
     float[6] gamma, float[6] beta, float[6] mean, float[6] var, float low, float high>
    {
      t = Flatten(x)
      a = Mul(t, p)
      b = Add(q, a)
      u = Gemm<transB=1>(b, v)
      n = BatchNormalization(u, gamma, beta, mean, var)
      o = PRelu(n, slope)
      s = Sigmoid(o)
      h = Mul(o, s)
      c = Clip(h, low, high)
      d = Sub(m, c)
      y = Gemm<transB=1>(d, w)
    }
    """
    limits = {"low": np.array(-1.0), "high": np.array(2.0)}
    model = parse(text, limits)
    outcome = apply(model, CONVERT)
    assert outcome.rewrote == ["u"]
    ops = [node.op_type for node in outcome.proto.graph.node]
    old = [node.op_type for node in model.proto.graph.node]
    assert ops == [{"Gemm": "Conv"}.get(op, op) for op in old[1:]] + ["Flatten"]
    assert values(outcome.proto)["p"].shape == (4, 3, 2)
    assert values(outcome.proto)["slope"].shape == (6, 1, 1)
    assert_same_numbers(outcome.model, model)


def test_rows_that_are_read_elsewhere_get_a_flatten() -> None:
    text = """
    g (float[N,4,3,2] x, bool c) => (float[N,3] y, float[N,6] u, float[N,24] f, float[N,6] z)
    <float[6,24] v, float[3,6] w>
    {
      t = Flatten(x)
      f = Neg(t)
      u = Gemm<transB=1>(t, v)
      r = Relu(u)
      z = If(c) <
        then_branch = yes () => (float[N,6] one) { one = Neg(r) },
        else_branch = no () => (float[N,6] two) { two = Identity(u) }
      >
      y = Gemm<transB=1>(r, w)
    }
    """
    model = parse(text)
    outcome = apply(model, CONVERT)
    nodes = [(n.op_type, n.output[0]) for n in outcome.proto.graph.node]
    assert nodes == [
        ("Flatten", "t"),
        ("Neg", "f"),
        ("Conv", "u.map"),
        ("Flatten", "u"),
        ("Relu", "r.map"),
        ("Flatten", "r"),
        ("Conv", "y.map"),
        ("Flatten", "y"),
        ("If", "z"),
    ]
    for condition in (True, False):
        feeds = random_feeds(model) | {"c": np.array(condition)}
        assert_close(run(outcome.model, feeds), run(model, feeds))


def test_two_branches_of_one_flatten() -> None:
    text = """
    g (float[N,4,3,2] x) => (float[N,5] y, float[N,4] z) <float[24,5] w, float[24,4] v>
    { t = Flatten(x)  y = Gemm(t, w)  z = Gemm(t, v) }
    """
    outcome = apply(parse(text), CONVERT)
    ops = [node.op_type for node in outcome.proto.graph.node]
    assert ops == ["Conv", "Flatten", "Conv", "Flatten"]
    assert_same_numbers(outcome.model, parse(text))


def test_a_layer_that_must_stay_ends_the_head() -> None:
    text = """
    g (float[N,4,3,2] x, float[5,6] w) => (float[N,5] y) <float[6,24] v>
    { t = Flatten(x)  u = Gemm<transB=1>(t, v)  r = Relu(u)  y = Gemm<transB=1>(r, w) }
    """
    outcome = apply(parse(text), CONVERT)
    ops = [node.op_type for node in outcome.proto.graph.node]
    assert ops == ["Conv", "Relu", "Flatten", "Gemm"]
    assert outcome.rewrote == ["u"]
    assert outcome.reasons == {"y": "the Gemm's weight is not a constant"}
    assert_same_numbers(outcome.model, parse(text))


def test_nothing_is_lifted_for_its_own_sake() -> None:
    text = """
    g (float[N,4,3,2] x) => (float[N,24] r, float[N,5] y) <float[24,5] w>
    { t = Flatten(x)  r = Relu(t)  y = Gemm(t, w) }
    """
    outcome = apply(parse(text), CONVERT)
    ops = [node.op_type for node in outcome.proto.graph.node]
    assert ops == ["Flatten", "Relu", "Conv", "Flatten"]


def test_a_shared_weight_stays_shared() -> None:
    text = """
    g (float[N,4,1,1] x) => (float[N,4] y) <float[4,4] w, float[4] b>
    { t = Flatten(x)  u = Gemm(t, w, b)  r = Relu(u)  y = Gemm(r, w, b) }
    """
    outcome = apply(parse(text), CONVERT)
    weights = values(outcome.proto)
    assert {name: w.shape for name, w in weights.items()} == {"w": (4, 4, 1, 1), "b": (4,)}
    assert_same_numbers(outcome.model, parse(text))


def test_a_square_weight_used_both_ways() -> None:
    text = """
    g (float[N,4,1,1] x) => (float[N,4] y) <float[4,4] w>
    { t = Flatten(x)  u = Gemm(t, w)  y = Gemm<transB=1>(u, w) }
    """
    outcome = apply(parse(text), CONVERT)
    assert len(outcome.proto.graph.initializer) == 2
    assert_same_numbers(outcome.model, parse(text))


@pytest.mark.parametrize(
    "other", ["z = Transpose(w)", "z = Identity(w)", "u = Gemm(p, w)  z = Relu(u)"]
)
def test_a_weight_that_others_read_keeps_its_name(other: str) -> None:
    text = f"""
    g (float[N,4,3,2] x, float[M,24] p) => (float[N,5] y, float[] z) <float[24,5] w>
    {{ t = Flatten(x)  y = Gemm(t, w)  {other} }}
    """
    outcome = apply(parse(text), CONVERT)
    assert {n: w.shape for n, w in values(outcome.proto).items()} == {
        "w": (24, 5),
        "y.weight": (5, 4, 3, 2),
    }


def test_a_weight_that_is_an_output_keeps_its_name() -> None:
    text = """
    g (float[N,4,3,2] x) => (float[N,5] y, float[24,5] w) <float[24,5] w>
    { t = Flatten(x)  y = Gemm(t, w) }
    """
    outcome = apply(parse(text), CONVERT)
    assert outcome.rewrote == ["y"]
    assert values(outcome.proto)["y.weight"].shape == (5, 4, 3, 2)


def test_constant_nodes_become_initializers() -> None:
    text = """
    g (float[N,2,1,1] x) => (float[N,1] y)
    {
      w = Constant<value = float[2,1] {2, 3}>()
      b = Constant<value = float[1] {5}>()
      t = Flatten(x)
      y = Gemm(t, w, b)
    }
    """
    proto = apply(parse(text), CONVERT).proto
    assert [node.op_type for node in proto.graph.node] == ["Conv", "Flatten"]
    new = {name: w.tolist() for name, w in values(proto).items()}
    assert new == {"y.weight": [[[[2]], [[3]]]], "y.bias": [5]}


def test_names_of_layers_stay() -> None:
    model = parse(f"{HEADER} <float[24,5] w> {{ t = Flatten(x)  u = Gemm(t, w)  y = Relu(u) }}")
    for node, name in zip(model.proto.graph.node, ("flat", "fc", "act"), strict=True):
        node.name = name
    proto = apply(model, CONVERT).proto
    assert [node.name for node in proto.graph.node] == ["fc", "act", "y.flatten"]


# -- what is left alone -----------------------------------------------------------------------

GEMM = "t = Flatten(x)  y = Gemm(t, w)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (float[N,4] x) => (float[N,5] y) <float[4,5] w> { y = Gemm(x, w) }",
            "reads an input, not a flattened map",
        ),
        (
            "g (float[N,4] x) => (float[N,5] y) <float[4,5] w> { y = MatMul(x, w) }",
            "reads an input, not a flattened map",
        ),
        (
            "g (float[N,4] x) => (float[N,5] y) <float[4,5] w> { t = Relu(x) y = Gemm(t, w) }",
            "reads Relu, not a flattened map",
        ),
        (
            f"g (float[N,4,H,2] x) => (float[N,5] y) <float[24,5] w> {{ {GEMM} }}",
            "the size of the map before it is open",
        ),
        (
            f"g (float[N,1,2,3,2,2] x) => (float[N,5] y) <float[24,5] w> {{ {GEMM} }}",
            "the map before it has 4 spatial axes",
        ),
        (
            "g (float[N,4,3,2] x) => (float[M,5] y) <float[4,5] w, int64[2] s = {-1, 4}>"
            "{ t = Reshape(x, s)  y = Gemm(t, w) }",
            "Reshape before it cuts the map into other rows",
        ),
        (
            "g (float[N,4,3,2] x) => (float[M,5] y) <float[6,5] w>"
            "{ t = Flatten<axis=2>(x)  y = Gemm(t, w) }",
            "Flatten before it cuts the map into other rows",
        ),
        (
            "g (float[2,4,3,2] x) => (float[1,5] y) <float[48,5] w>"
            "{ t = Flatten<axis=0>(x)  y = Gemm(t, w) }",
            "Flatten before it cuts the map into other rows",
        ),
        (
            "g (float[24,4,3,2] x) => (float[24,5] y) <float[24,5] w>"
            "{ t = Flatten(x)  y = Gemm<transA=1>(t, w) }",
            "transA takes the batch for the features",
        ),
        (
            "g (float[24,4,3,2] x) => (float[5,24] y) <float[5,24] w>"
            "{ t = Flatten(x)  y = Gemm(w, t) }",
            "the map is not its first operand",
        ),
        (
            f"g (float[N,4,3,2] x, float[24,5] w) => (float[N,5] y) {{ {GEMM} }}",
            "the Gemm's weight is not a constant",
        ),
        (
            f"{HEADER} <int8[24,5] q, float s> {{ w = DequantizeLinear(q, s) {GEMM} }}",
            "the Gemm's weight is not a constant",
        ),
        (
            "g (float[N,4,3,2] x, float[5] b) => (float[N,5] y) <float[24,5] w>"
            "{ t = Flatten(x)  y = Gemm(t, w, b) }",
            "the Gemm's bias is not a constant",
        ),
        (
            "g (float[2,4,3,2] x) => (float[2,5] y) <float[24,5] w, float[2,5] b>"
            "{ t = Flatten(x)  y = Gemm(t, w, b) }",
            "the Gemm's bias differs from row to row",
        ),
        (
            "g (float[5,4,3,2] x) => (float[5,5] y) <float[24,5] w, float[5,1] b>"
            "{ t = Flatten(x)  y = Gemm(t, w, b) }",
            "the Gemm's bias differs from row to row",
        ),
        (
            f"g (double[N,4,3,2] x) => (double[N,5] y) <double[24,5] w> {{ {GEMM} }}",
            "onnxruntime has no Conv of float64",
        ),
        (
            f"g (int32[N,4,3,2] x) => (int32[N,5] y) <int32[24,5] w> {{ {GEMM} }}",
            "onnxruntime has no Conv of int32",
        ),
        (
            f"g (bfloat16[N,4,3,2] x) => (bfloat16[N,5] y) <bfloat16[24,5] w> {{ {GEMM} }}",
            "onnxruntime has no Conv of bfloat16",
        ),
        (
            "g (float[N,4,3,2] x) => (float[N,5] y) <float[4,5] w>"
            "{ t = ReduceMean<axes=[1,2], keepdims=0>(x)  p = Concat<axis=1>(t, t)"
            "  y = Gemm(p, w) }",
            "reads Concat, not a flattened map",
        ),
    ],
)
def test_skips(text: str, reason: str) -> None:
    assert_skipped(text, CONVERT, reason)


def test_means_over_other_axes() -> None:
    text = """
    g (float[N,2,3,4] x) => (float[N,5] y) <float[4,5] w>
    { t = ReduceMean<axes=[1,2], keepdims=0>(x)  y = Gemm(t, w) }
    """
    assert_skipped(text, CONVERT, "reads ReduceMean, not a flattened map")


@pytest.mark.parametrize("name", ["w", "b"])
def test_constants_that_the_caller_may_override_stay(name: str) -> None:
    model = parse(f"{HEADER} <float[24,5] w, float[5] b> {{ t = Flatten(x)  y = Gemm(t, w, b) }}")
    (tensor,) = (t for t in model.proto.graph.initializer if t.name == name)
    info = helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
    model.proto.graph.input.append(info)
    what = {"w": "weight", "b": "bias"}[name]
    assert_skipped(model, CONVERT, f"the Gemm's {what} is not a constant")


@pytest.mark.parametrize("part", ["alpha", "beta"])
def test_what_float16_cannot_hold_stays(part: str) -> None:
    text = f"""
    g (float16[N,4,3,2] x) => (float16[N,5] y) <float16[24,5] w, float16[5] b>
    {{ t = Flatten(x)  y = Gemm<{part}=300.0>(t, w, b) }}
    """
    weights = {"w": np.full((24, 5), 300.0), "b": np.full(5, 300.0)}
    what = {"alpha": "weight", "beta": "bias"}[part]
    reason = f"the {what} times {part} would not be finite in float16"
    assert_skipped(parse(text, weights), CONVERT, reason)


@pytest.mark.parametrize(
    "between",
    [
        "r = Softmax(u)",
        "r, mask = Dropout(u)  z = Cast<to=1>(mask)",
        "r = Dropout(u, ratio, training)",
        "r = Mul(u, other)",
        "r = Add(u, wide)",
        "r = PRelu(slope, u)",
    ],
)
def test_what_cannot_run_on_maps_ends_the_head(between: str) -> None:
    text = f"""
    g (float[2,4,3,2] x, float[2,6] other, bool training) => (float[2,5] y)
    <float[24,6] v, float[6,5] w, float ratio, float[2,6] wide, float[2,6] slope>
    {{ t = Flatten(x)  u = Gemm(t, v)  {between}  y = Gemm(r, w) }}
    """
    outcome = apply(parse(text), CONVERT)
    assert outcome.rewrote == ["u"]
    assert outcome.reasons["y"].startswith("reads ")


def test_matmul_of_other_ranks_is_no_layer() -> None:
    text = """
    g (float[N,7,4] x, float[N,4,7] z) => (float[N,7,5] y, float[N,7,7] p) <float[4,5] w>
    { y = MatMul(x, w)  p = MatMul(x, z) }
    """
    assert apply(parse(text), CONVERT).events == []


def test_operators_of_another_domain_are_no_layers() -> None:
    model = parse(f"{HEADER} <float[24,5] w> {{ {GEMM} }}")
    model.proto.graph.node[1].domain = "com.example"
    model.proto.opset_import.add(domain="com.example", version=1)
    assert list(CONVERT.apply(model, Context())) == []


def test_a_judge_that_refuses_leaves_the_model_as_it_was() -> None:
    text = """
    g (float[N,4,3,2] x) => (float[N,3] y, float[N,6] u) <float[24,6] v, float[6,3] w, float[1,3] b>
    {
      s = Shape(x)  zero = Constant<value = int64[1] {0}>()  n = Gather(s, zero)
      rest = Constant<value = int64[1] {-1}>()  c = Concat<axis=0>(n, rest)
      t = Reshape(x, c)  u = Gemm(t, v)  r = Relu(u)  m = MatMul(r, w)  y = Add(m, b)
    }
    """
    outcome = apply(parse(text), CONVERT, judge=refuse)
    assert outcome.reasons == {"u": "not worth it"}


# -- dense ------------------------------------------------------------------------------------


def densified(model: Model, **shapes: tuple[int, ...]) -> tuple[Model, Event]:
    """Make a model dense; assert that for one crop it gives the same numbers."""
    dense = model.copy()
    (event,) = DENSE.apply(dense, Context(shapes=shapes or None))
    assert event.kind == "rewrote", event
    onnx.checker.check_model(dense.to_proto(), full_check=True)
    assert list(DENSE.apply(dense.copy(), Context())) == []
    feeds = random_feeds(model, batch=3)
    feeds |= {name: _random(shape) for name, shape in shapes.items()}
    expected = [y.reshape(*y.shape[:2], 1, 1) for y in run(model, feeds)]
    assert_close(run(dense, feeds), expected)
    return dense, event


def _random(shape: tuple[int, ...], seed: int = 2) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def refused(model: Model, reason: str, **options: Any) -> None:
    """Assert that a model cannot be made dense, and stays byte for byte."""
    before = model.to_proto().SerializeToString(deterministic=True)
    (event,) = DENSE.apply(model, Context(**options))
    assert event.kind == "skipped"
    assert reason in event.reason
    assert model.to_proto().SerializeToString(deterministic=True) == before


def crops(model: Model, image: Array, side: int, stride: int) -> Array:
    """Run the model on every crop that begins at a multiple of `stride`; [N, K, H', W']."""
    (name,) = (info.name for info in model.proto.graph.input)
    steps = [range(0, size - side + 1, stride) for size in image.shape[2:]]
    rows = [
        [run(model, {name: image[:, :, i : i + side, j : j + side]})[0] for j in steps[1]]
        for i in steps[0]
    ]
    return np.moveaxis(np.array(rows), (0, 1), (2, 3))


VGG_UNPADDED = """
vgg (float[N,3,18,18] images) => (float[N,5] logits)
<float[4,3,3,3] w1, float[4] b1, float[6,4,3,3] w2, float[6] b2,
 float[8,54] w6, float[8] b6, float[8,8] w7, float[8] b7, float[5,8] w8, float[5] b8>
{
  a = Conv(images, w1, b1)  b = Relu(a)
  c = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b)
  d = Conv(c, w2, b2)  e = Relu(d)
  f = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e)
  g = Flatten(f)
  h = Gemm<transB=1>(g, w6, b6)  i = Relu(h)  j = Dropout(i)
  k = Gemm<transB=1>(j, w7, b7)  l = Relu(k)
  logits = Gemm<transB=1>(l, w8, b8)
}
"""


@pytest.mark.parametrize("side", [18, 22, 29, 34])
def test_an_unpadded_network_gives_what_its_crops_give(side: int) -> None:
    model = parse(VGG_UNPADDED)
    dense, event = densified(model)
    assert event.data == {"crop": "18×18", "stride": "4×4", "padded": 0}
    assert event.reason == "made fully convolutional: a prediction every 4×4 pixels"
    image = _random((2, 3, side, side + 3))
    assert {"Gemm", "Flatten"}.isdisjoint(n.op_type for n in dense.to_proto().graph.node)
    assert_close(run(dense, {"images": image}), [crops(model, image, 18, 4)])


def test_a_padded_network_does_not() -> None:
    padded = VGG_UNPADDED.replace("Conv(", "Conv<pads=[1,1,1,1]>(").replace("18,18", "12,12")
    model = parse(padded)
    dense, event = densified(model)
    assert event.data == {"crop": "12×12", "stride": "4×4", "padded": 2}
    assert "layers pad, so predictions differ from those for crops" in event.reason
    image = _random((1, 3, 20, 20))
    (ours,) = run(dense, {"images": image})
    theirs = crops(model, image, 12, 4)
    assert ours.shape == theirs.shape == (1, 5, 3, 3)
    assert (np.abs(ours - theirs).max(axis=1) > 1e-3).all()


LAST_MAPS = {"vgg16": "pool5", "resnet50": "layer4.2.relu"}


@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_padded_networks_give_the_head_at_every_window_of_the_last_map(name: str) -> None:
    """Whatever the padding does to the features, the head slides over them."""
    model = Model(BUILDERS[name](size=64, width=4, classes=5))
    dense, event = densified(model)
    assert event.data["stride"] == "32×32"
    assert event.data["padded"]
    image = _random((2, 3, 128, 160))
    (predictions,) = run(dense, {"images": image})
    assert predictions.shape == (2, 5, 3, 4)

    last = LAST_MAPS[name]
    features, head = _cut(dense.to_proto(), model.proto, last, (2, 2))
    (maps,) = run(features, {"images": image})
    assert_close([predictions], [crops(head, maps, 2, 1)])


def _cut(
    dense: onnx.ModelProto, original: onnx.ModelProto, tensor: str, space: tuple[int, int]
) -> tuple[onnx.ModelProto, Model]:
    """Cut the features off a dense network, and the head, with its input, off the original."""
    features = onnx.ModelProto.FromString(dense.SerializeToString())
    del features.graph.output[:]
    features.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    place = next(i for i, n in enumerate(original.graph.node) if tensor in n.output)
    head = onnx.ModelProto.FromString(original.SerializeToString())
    del head.graph.node[: place + 1]
    del head.graph.input[:]
    head.graph.input.append(
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["N", "C", *space])
    )
    return features, Model(head)


@pytest.mark.parametrize(
    "pool",
    [
        "GlobalAveragePool(a)",
        "GlobalMaxPool(a)",
        "ReduceMean<axes=[2,3]>(a)",
        "ReduceMean<axes=[-1,-2], keepdims=0>(a)",
    ],
)
def test_pools_over_the_whole_map(pool: str) -> None:
    flat = "p" if "keepdims" in pool else "t"
    flatten = "" if flat == "p" else "t = Flatten(p)"
    model = parse(
        "g (float[N,3,9,7] x) => (float[N,5] y) <float[4,3,3,3] v, float[4,5] w>"
        f"{{ a = Conv<strides=[2,1]>(x, v)  p = {pool}  {flatten} y = Gemm({flat}, w) }}"
    )
    dense, event = densified(model)
    assert event.data == {"crop": "9×7", "stride": "2×1", "padded": 0}
    ops = [node.op_type for node in dense.to_proto().graph.node]
    assert ops == ["Conv", "MaxPool" if "Max" in pool else "AveragePool", "Conv"]
    image = _random((2, 3, 13, 9))
    (ours,) = run(dense, {"x": image})
    assert ours.shape == (2, 5, 3, 3)
    theirs = [
        [run(model, {"x": image[:, :, i : i + 9, j : j + 7]})[0] for j in range(3)]
        for i in (0, 2, 4)
    ]
    assert_close([ours], [np.moveaxis(np.array(theirs), (0, 1), (2, 3))])


def test_the_two_forms_of_one_head_become_the_same() -> None:
    sizes = {"size": 3, "in_channels": 4, "hidden": 5, "classes": 3}
    networks = [Model(BUILDERS[name](**sizes)) for name in ("mlp_head", "conv_head")]
    dense = [densified(model)[0].to_proto() for model in networks]
    for proto in dense:
        ops = [node.op_type for node in proto.graph.node]
        assert ops == ["AveragePool", "Conv", "Relu", "Conv"]
    image = {"features": _random((1, 4, 5, 6))}
    assert_close(run(dense[0], image), run(dense[1], image))


def test_inputs_and_outputs_say_that_their_size_is_open() -> None:
    model = parse(VGG_UNPADDED)
    for name, shape in (("b", ["N", 4, 16, 16]), ("h", ["N", 8])):
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        model.proto.graph.value_info.append(info)
    graph = densified(model)[0].to_proto().graph
    (x,), (y,) = graph.input, graph.output
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["N", 3, "H", "W"]
    assert [d.dim_param or d.dim_value for d in y.type.tensor_type.shape.dim] == ["N", 5, 0, 0]
    (inner,) = graph.value_info
    shape = inner.type.tensor_type.shape.dim
    assert (inner.name, [d.dim_param or d.dim_value for d in shape]) == ("b", ["N", 4, 0, 0])


def test_a_probability_per_place() -> None:
    text = """
    g (float[N,3,4,4] x) => (float[N,5] y) <float[48,5] w>
    { t = Flatten(x)  u = Gemm(t, w)  y = Softmax(u) }
    """
    dense, _ = densified(parse(text))
    (ours,) = run(dense, {"x": _random((2, 3, 6, 6))})
    np.testing.assert_allclose(ours.sum(axis=1), np.ones((2, 3, 3)), rtol=1e-5)
    old = f'<ir_version: 8, opset_import: ["" : 12]> {text}'
    refused(parse(old), "Softmax 'y' does not carry over to larger images")


def test_an_input_with_channels_last() -> None:
    text = """
    g (float[N,4,6,3] x) => (float[N,5] y) <float[2,3,3,3] v, float[16,5] w>
    { p = Transpose<perm=[0,3,1,2]>(x)  a = Conv(p, v)  t = Flatten(a)  y = Gemm(t, w) }
    """
    dense, event = densified(parse(text))
    assert dense.graph.inputs[0].shape == ["N", "H", "W", 3]
    assert event.data["crop"] == "4×6"
    assert run(dense, {"x": _random((1, 6, 7, 3))})[0].shape == (1, 5, 3, 2)


def test_an_open_input_needs_the_size_of_a_crop() -> None:
    text = """
    g (float[N,3,H,W] x) => (float[N,5] y) <float[5,3] w>
    { p = GlobalAveragePool(x)  t = Flatten(p)  y = Gemm<transB=1>(t, w) }
    """
    refused(parse(text), "the size of input 'x' is open; give that of a crop with --shape")
    dense, event = densified(parse(text), x=(1, 3, 4, 6))
    assert event.data["crop"] == "4×6"
    assert run(dense, {"x": _random((2, 3, 6, 6))})[0].shape == (2, 5, 3, 1)


def test_a_network_without_a_head_just_opens_its_input() -> None:
    text = "g (float[N,3,8,8] x) => (float[N,4,6,6] y) <float[4,3,3,3] w> { y = Conv(x, w) }"
    model = parse(text)
    (event,) = DENSE.apply(model, Context())
    assert event.kind == "rewrote"
    assert model.graph.outputs[0].shape == ["N", 4, None, None]
    assert list(DENSE.apply(model, Context())) == []


MAP = "g (float[N,4,6,6] x) => (float[N,5] y)"
HEAD = "p = GlobalAveragePool(s)  t = Flatten(p)  y = Gemm(t, w)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[N,4] x) => (float[N,5] y) <float[4,5] w> { y = Gemm(x, w) }", "is no map"),
        (
            f"{MAP} <float[4,5] w, int64[4] r = {{0, 4, 6, 6}}> {{ s = Reshape(x, r) {HEAD} }}",
            "Reshape 's' does not carry over to larger images",
        ),
        (
            f"{MAP} <float[4,5] w, float[4,6,6] k> {{ s = Add(x, k) {HEAD} }}",
            "Add 's' does not carry over",
        ),
        (
            f"{MAP} <float[4,5] w, float[1,6] k> {{ s = Mul(x, k) {HEAD} }}",
            "Mul 's' does not carry over",
        ),
        (
            f"{MAP} <float[4,5] w, float[4] a, float[4] b>"
            f"{{ s = InstanceNormalization(x, a, b) {HEAD} }}",
            "InstanceNormalization 's' does not carry over",
        ),
        (
            f"{MAP} <float[4,5] w, float[4,4,1,1] k>"
            f"{{ g = GlobalAveragePool(x) h = Conv(g, k) i = Sigmoid(h) s = Mul(x, i) {HEAD} }}",
            "maps no longer fit together on a larger image",
        ),
        (
            "g (float[N,4,6,6] x, float[N,4,1,6] z) => (float[N,5] y) <float[4,5] w>"
            f"{{ s = Mul(x, z) {HEAD} }}",
            "the inputs differ in size",
        ),
        (
            f"{MAP} <float[4,5] w> {{ s = Concat<axis=2>(x, x) {HEAD} }}",
            "Concat 's' does not carry over",
        ),
        (
            "g (float[N,4,6,6] x, float[4,5] w) => (float[N,5] y)"
            "{ p = GlobalAveragePool(x)  t = Flatten(p)  y = Gemm(t, w) }",
            "input 'w' is no map",
        ),
        (
            f"{MAP} <float[4,5] w, float[2] other>"
            "{ p = GlobalAveragePool(x)  t = Flatten(p)  z = Softmax<axis=0>(t)  y = Gemm(z, w) }",
            "does not carry over",
        ),
        (
            "g (float[N,4,6,6] x) => (float[N,144] y) { y = Flatten(x) }",
            "Flatten 'y' does not carry over",
        ),
        (
            "g (float[N,4,6,6] x) => (float[N,5] y, int64[4] s) <float[144,5] w>"
            "{ s = Shape(x) t = Flatten(x) y = Gemm(t, w) }",
            "Shape 's' does not carry over",
        ),
    ],
)
def test_what_cannot_become_dense(text: str, reason: str) -> None:
    refused(parse(text), reason)


# -- pretrained networks ----------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize(
    ("name", "layers"), [("resnet56_cifar10", 1), ("smallvgg_cifar10", 3), ("vgg16_cifar10", 2)]
)
def test_pretrained_networks(name: str, layers: int) -> None:
    model = Model.load(ASSETS / "models" / f"{name}.onnx")
    outcome = apply(model, CONVERT)
    assert [event.data["layers"] for event in outcome.events] == [layers]
    ops = [node.op_type for node in outcome.proto.graph.node]
    assert "Gemm" not in ops
    assert ops.count("Flatten") == 1
    assert_same_numbers(outcome.model, model)
    densified(model)


# -- random graphs ----------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Model:
    """Draw a map, something that makes rows of it, and a head with readers in the middle."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    batch = draw(st.sampled_from([1, 2, "N"]))
    space = draw(st.sampled_from([[1, 1], [2, 2], [2, 3], [3], [1, 2, 2]]))
    sizes = [draw(st.sampled_from([2, 4])), *space]
    weights: dict[str, Array] = {}
    nodes: list[NodeProto] = []
    outputs: list[str] = []

    def add(op: str, inputs: list[str], output: str, **attrs: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attrs))
        return output

    def weight(name: str, shape: list[int]) -> str:
        weights[name] = random_weight(rng, name, shape).astype(np.float32)
        return name

    x, listed = "x", sizes
    if draw(st.booleans()):
        order = draw(st.permutations(range(len(sizes))))
        x = add("Transpose", [x], "p", perm=[0, *[axis + 1 for axis in order]])
        listed = [sizes[axis] for axis in order]
    features = int(np.prod(sizes))
    kind = draw(st.sampled_from(["Flatten", "Flatten", "Reshape", "ReduceMean", "axis", "rows"]))
    if kind == "Flatten":
        t = add("Flatten", [x], "t", axis=draw(st.sampled_from([1, -len(sizes)])))
    elif kind == "Reshape":
        weights["shape"] = np.array(draw(st.sampled_from([[0, -1], [-1, features]])))
        t = add("Reshape", [x, "shape"], "t")
    elif kind == "ReduceMean":
        axes = list(range(2, len(sizes) + 1))
        t, features = add("ReduceMean", [x], "t", axes=axes, keepdims=0), listed[0]
    elif kind == "axis":
        t, features = add("Flatten", [x], "t", axis=2), int(np.prod(listed[1:]))
    else:
        features = listed[-1]
        weights["shape"] = np.array([-1, features])
        t = add("Reshape", [x, "shape"], "t")

    other = None
    for i in range(draw(st.integers(1, 5))):
        op = draw(
            st.sampled_from(
                ["Gemm", "Gemm", "MatMul", "Linear", "Relu", "Dropout", "Mul", "Softmax", "Both"]
            )
        )
        out = f"t{i}"
        if op in ("Gemm", "MatMul", "Linear"):
            wide = draw(st.sampled_from([1, 2, features]))
            turned = op == "Gemm" and draw(st.booleans())
            dims = [wide, features] if turned else [features, wide]
            w = next((n for n, v in weights.items() if list(v.shape) == dims), None)
            if w is None or draw(st.booleans()):
                w = weight(f"w{i}", dims)
            if op == "Gemm":
                shapes = [[], [1], [wide], [1, wide], [1, 1], None]
                bias = draw(st.sampled_from(shapes))
                inputs = [t, w] if bias is None else [t, w, weight(f"b{i}", bias)]
                factors = {n: draw(st.sampled_from([1.0, 1.0, 0.5])) for n in ("alpha", "beta")}
                t = add("Gemm", inputs, out, transB=int(turned), **factors)
            else:
                t = add("MatMul", [t, w], out)
            if op == "Linear":
                bias = draw(st.sampled_from([[wide], [1, wide], [1], []]))
                t = add("Add", draw(st.permutations([t, weight(f"b{i}", bias)])), f"{out}.add")
            features, other = wide, None
        elif op == "Mul":
            along = draw(st.sampled_from([[features], [1, features], [1], []]))
            t = add("Mul", draw(st.permutations([t, weight(f"s{i}", along)])), out)
        elif op == "Both":
            t = add("Add", [t, other or t], out)
        else:
            other = t
            t = add(op, [t], out)
        if draw(st.integers(0, 3)) == 0:
            outputs.append(t)
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *sizes])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in {*outputs, t}],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return checked(helper.make_model(graph, opset_imports=opsets, ir_version=8))


EXAMPLES = settings(max_examples=RANDOM_GRAPHS)


@EXAMPLES
@given(model=graphs())
def test_random_graphs(model: Model) -> None:
    outcome = apply(model, CONVERT)
    for batch in (1, 3):
        feeds = random_feeds(model, batch=batch)
        assert_near(run(outcome.model, feeds), run(model, feeds))
    refusing = model.copy()
    list(CONVERT.apply(refusing, Context(judge=refuse)))
    assert refusing.to_proto() == model.proto


@EXAMPLES
@given(model=graphs(), side=st.integers(0, 2))
def test_random_graphs_dense(model: Model, side: int) -> None:
    dense = model.copy()
    (event,) = DENSE.apply(dense, Context())
    if event.kind == "skipped":
        assert dense.to_proto() == model.proto
        return
    onnx.checker.check_model(dense.to_proto(), full_check=True)
    image = random_feeds(model)["x"]
    open_ = [
        axis for axis, size in enumerate(dense.graph.inputs[0].shape) if size in ("D", "H", "W")
    ]
    grown = _random(tuple(n + side * (axis in open_) for axis, n in enumerate(image.shape)))
    predictions = run(dense, {"x": grown})
    for place in (0, side):
        crop = grown
        for axis in open_:
            crop = crop.take(range(place, place + image.shape[axis]), axis)
        ours = [y[(..., *[place] * len(open_))] for y in predictions]
        assert_near(ours, run(model, {"x": crop}))


def assert_near(actual: list[Array], expected: list[Array]) -> None:
    """Compare numbers near 1, of which some may have cancelled out."""
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
