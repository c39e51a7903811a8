"""conv-to-gemm: which convolutions become matrix products, what comes along, what is left alone."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import (
    RANDOM_GRAPHS,
    Outcome,
    apply,
    assert_close,
    assert_pass,
    assert_same_numbers,
    assert_skipped,
    checked,
    parse,
    parse_proto,
    random_feeds,
    random_weight,
    run,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from pwopt.editing import Edit
from pwopt.model import Model
from pwopt.models import BUILDERS
from pwopt.passes.conv_to_gemm import ConvToGemm
from pwopt.passes.gemm_to_conv import GemmToConv
from pwopt.rewriting import Context, Judgement, Pass

Array = npt.NDArray[Any]

GEMM = ConvToGemm()
MATMUL = ConvToGemm(general=True)
CONV = GemmToConv()


def opset(version: int, text: str) -> str:
    ir = {7: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7}.get(version, 8)
    return f'<ir_version: {max(ir, 4)}, opset_import: ["" : {version}]> {text}'


def ops(outcome: Outcome) -> list[str]:
    return [node.op_type for node in outcome.proto.graph.node]


def became(text: str, *expected: str, step: ConvToGemm = GEMM, rtol: float = 1e-4) -> Outcome:
    """Apply the pass; assert the operators afterwards and that the numbers stay."""
    model = parse(text)
    outcome = apply(model, step)
    assert ops(outcome) == list(expected), outcome.events
    assert_same_numbers(outcome.model, model, rtol)
    return outcome


# -- one convolution --------------------------------------------------------------------------


def test_pointwise_on_a_pixel_before_a_flatten() -> None:
    before = """
    head (float[N,4,5,5] x) => (float[N,6] y)
    <float[6,4,1,1] w, float[6] b>
    { p = GlobalAveragePool(x)  c = Conv(p, w, b)  y = Flatten(c) }
    """
    after = """
    head (float[N,4,5,5] x) => (float[N,6] y)
    <float[6,4] w, float[6] b>
    {
      p = GlobalAveragePool(x)
      p.flat = Flatten<axis=1>(p)
      y = Gemm<transB=1>(p.flat, w, b)
    }
    """
    outcome = assert_pass(before, GEMM, after)
    assert [(e.where, e.reason, e.data) for e in outcome.events] == [
        ("c", "became a Gemm", {"convs": 1})
    ]


def test_kernel_that_covers_its_input() -> None:
    before = """
    head (float[N,4,3,2] x) => (float[N,6] y) <float[6,4,3,2] w, float[6] b>
    { c = Conv<kernel_shape=[3,2]>(x, w, b)  y = Flatten(c) }
    """
    after = """
    head (float[N,4,3,2] x) => (float[N,6] y) <float[6,24] w, float[6] b>
    { x.flat = Flatten<axis=1>(x)  y = Gemm<transB=1>(x.flat, w, b) }
    """
    outcome = assert_pass(before, GEMM, after)
    original = values(parse(before).proto)["w"]
    assert values(outcome.proto)["w"].tobytes() == original.tobytes()


def test_chain_with_activations() -> None:
    before = """
    head (float[N,4,3,3] x) => (float[N,2] y)
    <float[6,4,3,3] w, float[6] b, float[5,6,1,1] v, float[2,5,1,1] u, float[2] c>
    {
      h = Conv(x, w, b)
      i = Relu(h)
      j = Conv(i, v)
      k = Dropout(j)
      l = HardSigmoid<alpha=0.3>(k)
      m = Conv(l, u, c)
      n = Sigmoid(m)
      y = Flatten(n)
    }
    """
    after = """
    head (float[N,4,3,3] x) => (float[N,2] y)
    <float[6] b, float[2] c, float[6,36] w, float[5,6] v, float[2,5] u>
    {
      x.flat = Flatten<axis=1>(x)
      h.flat = Gemm<transB=1>(x.flat, w, b)
      i.flat = Relu(h.flat)
      j.flat = Gemm<transB=1>(i.flat, v)
      k.flat = Dropout(j.flat)
      l.flat = HardSigmoid<alpha=0.3>(k.flat)
      m.flat = Gemm<transB=1>(l.flat, u, c)
      y = Sigmoid(m.flat)
    }
    """
    outcome = assert_pass(before, GEMM, after)
    assert [(e.where, e.reason, e.data) for e in outcome.events] == [
        ("h", "became 3 Gemms", {"convs": 3})
    ]


HEAD = "head (float[N,4,1,1] x) => (float[N,6] y)"
MAP = "head (float[N,4,1,1] x) => (float[N,6,1,1] y)"


@pytest.mark.parametrize("dtype", ["float16", "float", "double"])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_types_and_a_missing_bias(dtype: str, bias: str) -> None:
    text = f"""
    head ({dtype}[N,4,2,2] x) => ({dtype}[N,6,1,1] y)
    <{dtype}[6,4,2,2] w, {dtype}[6] b>
    {{ y = Conv(x, w{bias}) }}
    """
    became(text, "Flatten", "Gemm", "Unsqueeze", rtol=1e-2 if dtype == "float16" else 1e-4)


@pytest.mark.parametrize(
    ("x", "kernel"), [("4,1", "1"), ("4,5", "5"), ("4,1,1,1", "1,1,1"), ("4,2,3,1", "2,3,1")]
)
def test_one_and_three_axes(x: str, kernel: str) -> None:
    size = ",".join("1" for _ in kernel.split(","))
    text = f"""
    head (float[N,{x}] x) => (float[N,6,{size}] y, float[N,6] z) <float[6,4,{kernel}] w>
    {{ y = Conv(x, w)  r = Relu(y)  z = Flatten(r) }}
    """
    became(text, "Flatten", "Gemm", "Unsqueeze", "Relu")


@pytest.mark.parametrize("batch", ["1", "3", "N"])
def test_static_and_open_batch(batch: str) -> None:
    text = f"""
    head (float[{batch},4,2,2] x) => (float[{batch},6] y) <float[6,4,2,2] w>
    {{ c = Conv(x, w)  y = Flatten(c) }}
    """
    model = parse(text)
    outcome = apply(model, GEMM)
    assert ops(outcome) == ["Flatten", "Gemm"]
    feeds = random_feeds(model, batch=1 if batch == "1" else 3)
    assert_close(run(outcome.model, feeds), run(model, feeds))


def test_weights_in_constant_nodes_become_initialisers() -> None:
    text = """
    head (float[N,1,1,1] x) => (float[N,2] y)
    {
      w = Constant<value = float[2,1,1,1] {2, 3}>()
      b = Constant<value = float[2] {5, 7}>()
      c = Conv(x, w, b)
      y = Flatten(c)
    }
    """
    outcome = became(text, "Constant", "Flatten", "Gemm")
    assert values(outcome.proto)["c.weight"].tolist() == [[2], [3]]


def test_a_bias_the_caller_may_override_stays_one() -> None:
    model = parse(f"{HEAD} <float[6,4,1,1] w, float[6] b> {{ c = Conv(x,w,b) y = Flatten(c) }}")
    model.proto.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [6]))
    outcome = apply(model, GEMM)
    assert ops(outcome) == ["Flatten", "Gemm"]
    feeds = random_feeds(model) | {"b": np.arange(6, dtype=np.float32)}
    assert_close(run(outcome.model, feeds), run(model, feeds))


def test_a_shared_weight_stays_shared() -> None:
    text = """
    twins (float[N,4,1,1] x, float[N,4,1,1] z) => (float[N,6] y, float[N,6] u)
    <float[6,4,1,1] w>
    { c = Conv(x, w)  y = Flatten(c)  d = Conv(z, w)  u = Flatten(d) }
    """
    outcome = became(text, "Flatten", "Gemm", "Flatten", "Gemm")
    assert outcome.rewrote == ["c", "d"]
    assert {name: w.shape for name, w in values(outcome.proto).items()} == {"c.weight": (6, 4)}


def test_siblings_share_the_flatten_and_keep_a_shared_weights_name() -> None:
    text = """
    twins (float[N,4,1,1] x) => (float[N,6] y, float[N,6] u)
    <float[6,4,1,1] w, float[6] b>
    { c = Conv(x, w)  y = Flatten(c)  d = Conv(x, w, b)  u = Flatten(d) }
    """
    outcome = became(text, "Flatten", "Gemm", "Gemm")
    assert outcome.rewrote == ["c"]
    assert {name: w.shape for name, w in values(outcome.proto).items()} == {"w": (6, 4), "b": (6,)}


def test_a_weight_that_others_read_keeps_its_name_there() -> None:
    text = """
    twins (float[N,4,1,1] x, float[N,4,3,3] z) => (float[N,6] y, float[N,6,3,3] u)
    <float[6,4,1,1] w>
    { c = Conv(x, w)  y = Flatten(c)  u = Conv(z, w) }
    """
    outcome = became(text, "Flatten", "Gemm", "Conv")
    shapes = {name: w.shape for name, w in values(outcome.proto).items()}
    assert shapes == {"w": (6, 4, 1, 1), "c.weight": (6, 4)}


def test_a_weight_that_is_an_output_stays() -> None:
    text = """
    head (float[N,4,1,1] x) => (float[N,6] y, float[6,4,1,1] w) <float[6,4,1,1] w>
    { c = Conv(x, w)  y = Flatten(c) }
    """
    model = parse(text)
    outcome = apply(model, GEMM)
    assert values(outcome.proto)["w"].shape == (6, 4, 1, 1)
    assert_same_numbers(outcome.model, model)


def test_one_weight_as_kernel_and_as_operand() -> None:
    text = """
    odd (float[N,1,1,1] x) => (float[N,1] y) <float[1,1,1,1] w>
    { c = Conv(x, w)  m = Mul(c, w)  y = Flatten(m) }
    """
    outcome = became(text, "Flatten", "Gemm", "Mul")
    shapes = {name: w.shape for name, w in values(outcome.proto).items()}
    assert shapes == {"w": (1, 1), "m.operand": (1,)}


# -- padding, strides, dilations --------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kernel", "attributes", "columns"),
    [
        ("1,1", "3,3", "pads=[1,1,1,1]", 1),
        ("1,1", "5,3", "pads=[2,1,2,1]", 1),
        ("1,1", "3,3", "pads=[2,2,2,2], dilations=[2,2]", 1),
        ("1,1", "3,3", "pads=[2,2,0,0]", 1),
        ("1,1", "3,3", "pads=[0,0,2,2]", 1),
        ("1,1", "2,2", 'auto_pad="SAME_UPPER"', 1),
        ("1,1", "2,2", 'auto_pad="SAME_LOWER"', 1),
        ("1,1", "4,3", 'auto_pad="SAME_UPPER", strides=[2,2]', 1),
        ("2,2", "3,3", 'auto_pad="SAME_UPPER", strides=[2,2]', 4),
        ("2,2", "3,3", 'auto_pad="SAME_LOWER", strides=[2,2]', 4),
        ("2,3", "2,3", 'auto_pad="VALID", strides=[2,1]', 6),
        ("2,2", "3,3", "pads=[1,1,1,1], strides=[2,2]", 4),
        ("2,2", "4,3", "pads=[1,1,1,1], strides=[3,2]", 4),
        ("1,1", "1,1", "strides=[2,2]", 1),
        ("1,1", "1,1", "strides=[2,2], pads=[0,0,1,1]", 1),
        ("1,1", "1,1", "dilations=[3,3]", 1),
        ("2,1", "2,1", "dilations=[1,2]", 2),
    ],
)
def test_taps_on_padding_are_cut_off(size: str, kernel: str, attributes: str, columns: int) -> None:
    text = f"""
    head (float[N,4,{size}] x) => (float[N,6] y) <float[6,4,{kernel}] w, float[6] b>
    {{ c = Conv<{attributes}>(x, w, b)  y = Flatten(c) }}
    """
    outcome = became(text, "Flatten", "Gemm")
    name = "w" if kernel == size else "c.weight"
    assert values(outcome.proto)[name].shape == (6, 4 * columns)


EVERY_PIXEL = "its kernel does not read every pixel of the input"
PADDING = "its padding makes the output larger than a pixel"


@pytest.mark.parametrize(
    ("size", "kernel", "attributes", "reason"),
    [
        ("1,1", "1,1", "pads=[1,1,0,0], strides=[2,2]", EVERY_PIXEL),  # reads the padding
        ("2,2", "1,1", "strides=[2,2]", EVERY_PIXEL),
        ("4,4", "3,3", "strides=[2,2]", EVERY_PIXEL),
        ("3,3", "2,2", "dilations=[2,2]", EVERY_PIXEL),
        ("3,3", "2,3", "strides=[2,1]", EVERY_PIXEL),
        ("2,2", "3,3", "pads=[2,2,0,0], strides=[2,2]", EVERY_PIXEL),
        ("3,3", "3,3", "pads=[1,1,1,1]", PADDING),
        ("1,1", "1,1", "pads=[0,0,1,0]", PADDING),
        ("3,3", "3,3", 'auto_pad="SAME_UPPER"', PADDING),
        ("2,2", "2,2", "dilations=[2,2], pads=[1,1,1,1]", PADDING),
    ],
)
def test_windows_that_miss(size: str, kernel: str, attributes: str, reason: str) -> None:
    text = f"""
    head (float[N,4,{size}] x) => (float[N,6,a,b] y) <float[6,4,{kernel}] w, float[6] b>
    {{ y = Conv<{attributes}>(x, w, b) }}
    """
    assert_skipped(text, GEMM, reason)


# -- readers ----------------------------------------------------------------------------------


def test_a_map_that_is_an_output_stays_one() -> None:
    after = f"""
    {MAP} <float[6] b, float[6,4] w, int64[2] y.axes = {{2, 3}}>
    {{
      x.flat = Flatten<axis=1>(x)
      y.flat = Gemm<transB=1>(x.flat, w, b)
      y = Unsqueeze(y.flat, y.axes)
    }}
    """
    weights = "<float[6,4,1,1] w, float[6] b>"
    assert_pass(f"{MAP} {weights} {{ y = Conv(x, w, b) }}", GEMM, after)


def test_readers_of_both_forms() -> None:
    text = """
    head (float[N,4,1,1] x) => (float[N,6] y, float[N,6,1,1] z, float[N,6] u, float[N,6,1,1] c)
    <float[6,4,1,1] w>
    { c = Conv(x, w)  y = Flatten(c)  z = Softmax<axis=1>(c)  u = Squeeze(c, axes) }
    """
    model = parse(text.replace("w>", "w, int64[2] axes = {2, 3}>"))
    outcome = apply(model, GEMM)
    assert ops(outcome) == ["Flatten", "Gemm", "Identity", "Unsqueeze", "Softmax"]
    assert_same_numbers(outcome.model, model)


@pytest.mark.parametrize(
    ("flattening", "weights"),
    [
        ("Flatten(c)", ""),
        ("Flatten<axis=-3>(c)", ""),
        ("Reshape(c, s)", ", int64[2] s = {0, -1}"),
        ("Reshape(c, s)", ", int64[2] s = {-1, 6}"),
        ("Reshape(c, s)", ", int64[2] s = {0, 6}"),
        ("Reshape<allowzero=1>(c, s)", ", int64[2] s = {-1, 6}"),
        ("Squeeze(c, s)", ", int64[2] s = {2, 3}"),
        ("Squeeze(c, s)", ", int64[2] s = {-1, -2}"),
    ],
)
def test_flattenings_go(flattening: str, weights: str) -> None:
    text = f"{HEAD} <float[6,4,1,1] w{weights}> {{ c = Conv(x, w)  y = {flattening} }}"
    outcome = became(text, "Flatten", "Gemm")
    assert set(values(outcome.proto)) == {"w"}


def test_a_shape_computed_by_the_exporter() -> None:
    text = """
    head (float[N,4,1,1] x) => (float[N,6] y)
    <float[6,4,1,1] w, int64 zero = {0}, int64[1] axis = {0}, int64[1] rest = {-1}>
    {
      c = Conv(x, w)
      shape = Shape(x)
      batch = Gather(shape, zero)
      batches = Unsqueeze(batch, axis)
      s = Concat<axis=0>(batches, rest)
      y = Reshape(c, s)
    }
    """
    model = parse(text)
    outcome = apply(model, GEMM)
    assert outcome.rewrote == ["c"]
    assert_same_numbers(outcome.model, model)


@pytest.mark.parametrize(
    ("reader", "weights", "shape"),
    [
        ("Reshape(c, s)", ", int64[2] s = {6, -1}", "6,N"),
        ("Reshape(c, s)", ", int64[2] s = {-1, 3}", "M,3"),
        ("Reshape(c, s)", ", int64[2] s = {1, -1}", "1,M"),
        ("Flatten<axis=2>(c)", "", "M,1"),
        ("Flatten<axis=0>(c)", "", "1,M"),
        ("Transpose<perm=[1,0,2,3]>(c)", "", "6,N,1,1"),
        ("Softmax<axis=1>(c)", "", "N,6,1,1"),
    ],
)
def test_other_readers_get_the_map(reader: str, weights: str, shape: str) -> None:
    text = f"""
    head (float[N,4,1,1] x) => (float[{shape}] y) <float[6,4,1,1] w{weights}>
    {{ c = Conv(x, w)  y = {reader} }}
    """
    became(text, "Flatten", "Gemm", "Unsqueeze", reader.partition("(")[0].partition("<")[0])


def test_squeeze_without_axes_whatever_is_declared() -> None:
    text = f"{HEAD} <float[6,4,1,1] w> {{ c = Conv(x, w)  y = Squeeze(c) }}"
    proto = parse_proto(text)  # of a batch of one, it leaves a vector
    del proto.graph.value_info[:]
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((6, 4, 1, 1), np.float32), "w"))
    assert ops(apply(Model(proto), GEMM)) == ["Flatten", "Gemm", "Unsqueeze", "Squeeze"]


@pytest.mark.parametrize("condition", [True, False])
def test_a_subgraph_reads_the_map(condition: bool) -> None:
    text = """
    head (float[N,4,1,1] x, bool q) => (float[N,6] y, float[N,6] z)
    <float[6,4,1,1] w>
    {
      c = Conv(x, w)
      y = Flatten(c)
      z = If(q) <
        then_branch = yes () => (float[N,6] one) { one = Flatten(c) },
        else_branch = no () => (float[N,6] two) { d = Conv(x, w)  two = Flatten(d) }
      >
    }
    """
    model = parse(text)
    outcome = apply(model, GEMM)
    assert ops(outcome) == ["Flatten", "Gemm", "Unsqueeze", "If"]
    feeds = random_feeds(model) | {"q": np.array(condition)}
    assert_close(run(outcome.model, feeds), run(model, feeds))


def test_the_map_in_the_middle_of_a_chain_is_read() -> None:
    text = """
    head (float[N,4,1,1] x) => (float[N,6] y, float[N,5,1,1] z)
    <float[5,4,1,1] w, float[6,5,1,1] v>
    { c = Conv(x, w)  r = Relu(c)  d = Conv(r, v)  y = Flatten(d)  z = Softmax<axis=1>(r) }
    """
    became(text, "Flatten", "Gemm", "Relu", "Unsqueeze", "Gemm", "Softmax")


def test_squeeze_and_excitation() -> None:
    text = """
    block (float[N,4,3,3] x) => (float[N,4,3,3] y)
    <float[2,4,1,1] w, float[2] b, float[4,2,1,1] v, float[4] c>
    {
      p = GlobalAveragePool(x)
      d = Conv(p, w, b)
      r = Relu(d)
      e = Conv(r, v, c)
      s = Sigmoid(e)
      y = Mul(x, s)
    }
    """
    expected = ["Flatten", "Gemm", "Relu", "Gemm", "Unsqueeze", "Sigmoid", "Mul"]
    became(text, "GlobalAveragePool", *expected)


# -- what comes along -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("t = Identity(c)", ""),
        ("t = Dropout(c)", ""),
        ("t = Clip(c, low, high)", "float low = {-0.5}, float high = {0.5}"),
        ("t = PRelu(c, s)", "float[6,1,1] s"),
        ("t = PRelu(c, s)", "float[1] s"),
        ("t = Mul(s, c)", "float[1,6,1,1] s"),
        ("t = Sub(s, c)", "float s"),
        ("t = Div(c, s)", "float[1,1] s = {3}"),
        ("t = Add(c, s)", "float[1,1,1] s"),
        ("t = Mul(c, c)", ""),
        ("q = Sigmoid(c)  t = Mul(c, q)", ""),
        (
            "t = BatchNormalization(c, g, b, m, var)",
            "float[6] g, float[6] b, float[6] m, float[6] var",
        ),
        ("t = Max(c, s)", "float[6,1,1] s"),
    ],
)
def test_operators_that_come_along(nodes: str, weights: str) -> None:
    weights = f"<float[6,4,2,2] w, float[3,6,1,1] v{', ' if weights else ''}{weights}>"
    text = f"""
    head (float[N,4,2,2] x) => (float[N,3] y) {weights}
    {{ c = Conv(x, w)  {nodes}  d = Conv(t, v)  y = Flatten(d) }}
    """
    model = parse(text)
    between = [node.op_type for node in model.proto.graph.node[1:-2]]
    became(text, "Flatten", "Gemm", *between, "Gemm")


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("t, mask = Dropout(c)  m = Cast<to=1>(mask)  n = Relu(t)  t2 = Mul(n, m)", ""),
        ("t2 = Add(c, s)", ", float[5,1,1,1] s"),
        ("t2 = Add(c, s)", ", float[6] s"),
        ("t2 = Add(c, s)", ", float[1,1,1,1,1] s"),
        ("t2 = Add(c, x)", ""),
        ("t2 = Softmax<axis=1>(c)", ""),
    ],
)
def test_operators_that_do_not_come_along(nodes: str, weights: str) -> None:
    text = f"""
    head (float[5,6,1,1] x) => (float[] y) <float[6,6,1,1] w{weights}>
    {{ c = Conv(x, w)  {nodes}  y = Flatten(t2) }}
    """
    model = parse(text)
    outcome = apply(model, GEMM)
    assert "Unsqueeze" in ops(outcome)
    assert ops(outcome)[-1] == "Flatten"
    feeds = random_feeds(model)
    assert_close(run(outcome.model, feeds), run(model, feeds))


def test_a_mask_stays_a_map() -> None:
    text = """
    head (float[N,4,1,1] x) => (float[N,6] y, bool[N,6,1,1] mask) <float[6,4,1,1] w>
    { c = Conv(x, w)  t, mask = Dropout(c)  y = Flatten(t) }
    """
    became(text, "Flatten", "Gemm", "Unsqueeze", "Dropout", "Flatten")


def test_maps_of_unlike_rank_do_not_meet_as_matrices() -> None:
    text = """
    odd (float[1,4,1] x, float[1,4,1,1] z) => (float[1,36] y)
    <float[6,4,1] w, float[6,4,1,1] v>
    { c = Conv(x, w)  d = Conv(z, v)  s = Add(c, d)  y = Flatten(s) }
    """
    model = parse(text)
    outcome = apply(model, GEMM)
    assert ops(outcome) == [*["Flatten", "Gemm", "Unsqueeze"] * 2, "Add", "Flatten"]
    assert_close(run(outcome.model, random_feeds(model)), run(model, random_feeds(model)))


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (8, ["Flatten", "Gemm", "Unsqueeze", "BatchNormalization", "Flatten"]),
        (9, ["Flatten", "Gemm", "BatchNormalization"]),
    ],
)
def test_normalisation_of_matrices_from_opset_9_on(version: int, expected: list[str]) -> None:
    text = f"""
    {HEAD} <float[6,4,1,1] w, float[6] g, float[6] b, float[6] m, float[6] var>
    {{ c = Conv(x, w)  t = BatchNormalization(c, g, b, m, var)  y = Flatten(t) }}
    """
    became(opset(version, text), *expected)


def test_residual_branches_are_one_site() -> None:
    text = """
    mlp (float[N,4,1,1] x) => (float[N,4] y)
    <float[4,4,1,1] a, float[4,4,1,1] b, float[4,4,1,1] c>
    {
      s = Conv(x, a)
      t = Conv(x, b)
      r = Relu(t)
      u = Conv(r, c)
      v = Add(s, u)
      y = Flatten(v)
    }
    """
    outcome = became(text, "Flatten", "Gemm", "Gemm", "Relu", "Gemm", "Add")
    assert outcome.rewrote == ["s"]


# -- in front ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "weights", "kernel"),
    [
        ("Reshape(x, s)", "int64[4] s = {0, 4, 1, 1}", "4,1,1"),
        ("Reshape(x, s)", "int64[4] s = {-1, 1, 2, 2}", "1,2,2"),
        ("Reshape(x, s)", "int64[4] s = {0, -1, 2, 1}", "2,2,1"),
        ("Unsqueeze(x, s)", "int64[2] s = {2, 3}", "4,1,1"),
        ("Unsqueeze(x, s)", "int64[2] s = {1, 2}", "1,1,4"),
    ],
)
def test_views_of_rows_go(view: str, weights: str, kernel: str) -> None:
    text = f"""
    head (float[N,4] x) => (float[N,6] y) <float[6,{kernel}] w, {weights}>
    {{ t = {view}  c = Conv(t, w)  y = Flatten(c) }}
    """
    outcome = became(text, "Gemm")
    assert set(values(outcome.proto)) == {"w"}


def test_other_views_in_front_stay() -> None:
    text = """
    head (float[N,8] x) => (float[M,6] y) <float[6,4,1,1] w, int64[4] s = {-1, 4, 1, 1}>
    { t = Reshape(x, s)  c = Conv(t, w)  y = Flatten(c) }
    """
    became(text, "Reshape", "Flatten", "Gemm")


def test_rows_and_maps_in_turn() -> None:
    text = """
    head (float[N,8,1,1] x) => (float[N,3] y)
    <float[4,8,1,1] w, float[3,2,1,2] v, int64[4] s = {0, 2, 1, 2}>
    { c = Conv(x, w)  f = Flatten(c)  t = Reshape(f, s)  d = Conv(t, v)  y = Flatten(d) }
    """
    outcome = became(text, "Flatten", "Gemm", "Gemm")
    assert outcome.rewrote == ["c", "d"]


def test_a_view_that_others_read_stays() -> None:
    text = """
    head (float[N,4] x) => (float[N,6] y, float[N,4,1,1] z)
    <float[6,4,1,1] w, int64[2] s = {2, 3}>
    { t = Unsqueeze(x, s)  c = Conv(t, w)  y = Flatten(c)  z = Relu(t) }
    """
    became(text, "Unsqueeze", "Flatten", "Gemm", "Relu")


# -- opsets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [7, 9, 10, 11, 12, 13, 17, 21])
def test_opsets(version: int) -> None:
    text = opset(
        version,
        f"{MAP} <float[5,4,1,1] w, float[5] b, float[6,5,1,1] v>"
        "{ c = Conv(x, w, b)  r = Relu(c)  y = Conv(r, v) }",
    )
    outcome = became(text, "Flatten", "Gemm", "Relu", "Gemm", "Unsqueeze")
    assert len(outcome.proto.graph.node[3].input) == (3 if version < 11 else 2)
    assert len(outcome.proto.graph.node[4].input) == (1 if version < 13 else 2)


def test_squeeze_before_opset_13() -> None:
    text = f"{HEAD} <float[6,4,1,1] w> {{ c = Conv(x, w)  y = Squeeze<axes=[2,3]>(c) }}"
    became(opset(11, text), "Flatten", "Gemm")


def test_before_opset_7() -> None:
    text = opset(6, f"{MAP} <float[6,4,1,1] w> {{ y = Conv(x, w) }}")
    assert_skipped(text, GEMM, "before opset 7, operands are broadcast by other rules")


# -- what is left alone -----------------------------------------------------------------------


def test_groups() -> None:
    text = f"{MAP} <float[6,2,1,1] w> {{ y = Conv<group=2>(x, w) }}"
    assert_skipped(text, GEMM, "it has 2 groups")


def test_a_weight_that_is_an_input() -> None:
    text = "h (float[N,4,1,1] x, float[6,4,1,1] w) => (float[N,6,1,1] y) { y = Conv(x, w) }"
    assert_skipped(text, GEMM, "the Conv's weight is not a constant")


def test_a_weight_the_caller_may_override() -> None:
    model = parse(f"{MAP} <float[6,4,1,1] w> {{ y = Conv(x, w) }}")
    info = helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 4, 1, 1])
    model.proto.graph.input.append(info)
    assert_skipped(model, GEMM, "the Conv's weight is not a constant")


def test_bfloat16() -> None:
    text = """<ir_version: 10, opset_import: ["" : 22]>
    h (bfloat16[N,4,1,1] x) => (bfloat16[N,6,1,1] y) <bfloat16[6,4,1,1] w> { y = Conv(x, w) }
    """
    assert_skipped(text, GEMM, "the Conv's weight is bfloat16")


@pytest.mark.parametrize(
    ("x", "kernel"),
    [("8,8", "1,1"), ("H,W", "1,1"), ("H,W", "3,3"), ("1,W", "1,1"), ("8,8", "3,3")],
)
def test_larger_and_open_maps_are_no_sites(x: str, kernel: str) -> None:
    text = (
        f"h (float[N,4,{x}] x) => (float[N,6,a,b] y) <float[6,4,{kernel}] w> {{ y = Conv(x, w) }}"
    )
    assert apply(parse(text), GEMM).events == []


def test_shapes_given_for_one_run_do_not_count() -> None:
    text = "h (float[N,4,H,W] x) => (float[N,6,a,b] y) <float[6,4,3,3] w> { y = Conv(x, w) }"
    assert apply(parse(text), GEMM, shapes={"x": (1, 4, 3, 3)}).events == []


def test_operators_of_another_domain_are_no_sites() -> None:
    model = parse(f"{MAP} <float[6,4,1,1] w> {{ y = Conv(x, w) }}")
    model.proto.graph.node[0].domain = "com.example"
    model.proto.opset_import.add(domain="com.example", version=1)
    assert list(GEMM.apply(model, Context())) == []


# -- the judge --------------------------------------------------------------------------------


def refuse(model: Model, edit: Edit, *, free: bool) -> Judgement:
    return Judgement(False, "does not pay")


TWO_SITES = """
heads (float[N,4,1,1] x, float[N,4,3,3] z) => (float[N,6,1,1] y, float[N,6] u)
<float[6,4,1,1] w, float[6] b, float[6,4,3,3] v>
{ y = Conv(x, w, b)  c = Conv(z, v, b)  r = Relu(c)  u = Flatten(r) }
"""


@pytest.mark.parametrize("step", [GEMM, MATMUL])
def test_a_judge_that_refuses_leaves_the_model_as_it_was(step: ConvToGemm) -> None:
    outcome = apply(parse(TWO_SITES), step, judge=refuse)
    assert outcome.reasons == {"y": "does not pay", "c": "does not pay"}


def test_one_site_refused_the_other_kept() -> None:
    def only_pixels(model: Model, edit: Edit, *, free: bool) -> Judgement:
        model.check()
        return Judgement(len(edit.new) == 3, "no", {"nodes": len(edit.new)})

    model = parse(TWO_SITES)
    outcome = Outcome(model.copy(), [])
    for event in GEMM.apply(outcome.model, Context(judge=only_pixels)):
        outcome.events.append(event)
    assert outcome.rewrote == ["y", "c"]


# -- 1×1 convolutions in general --------------------------------------------------------------


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize(
    ("size", "channels", "between"),
    [
        ("5", 6, []),
        ("L", 6, []),
        ("5,7", 6, ["Reshape"]),
        ("5,W", 6, ["Reshape"]),
        ("H,7", 6, ["Reshape"]),
        ("H,W", 4, ["Shape", "Reshape"]),
        ("H,W", 6, ["Shape", "Gather", "Concat", "Reshape"]),
        ("2,3,4", 6, ["Reshape"]),
        ("2,H,4", 6, ["Reshape"]),
        ("D,H,4", 6, ["Shape", "Gather", "Concat", "Reshape"]),
    ],
)
def test_pointwise_as_matmul(size: str, channels: int, between: list[str], bias: str) -> None:
    kernel = ",".join("1" for _ in size.split(","))
    text = f"""
    pointwise (float[N,4,{size}] x) => (float[] y)
    <float[{channels},4,{kernel}] w{f", float[{channels}] b" if bias else ""}>
    {{ y = Conv(x, w{bias}) }}
    """
    front = ["Reshape"] if "," in size else []
    add = ["Add"] if bias else []
    outcome = became(text, *front, "MatMul", *add, *between, step=MATMUL)
    assert [(e.where, e.reason) for e in outcome.events] == [("y", "became a MatMul")]
    shapes = {name: w.shape for name, w in values(outcome.proto).items() if name in ("w", "b")}
    assert shapes == {"w": (channels, 4), **({"b": (channels, 1)} if bias else {})}


def test_pointwise_in_text() -> None:
    before = """
    pointwise (float[N,4,5,7] x) => (float[N,6,5,7] y) <float[6,4,1,1] w, float[6] b>
    { y = Conv(x, w, b) }
    """
    after = """
    pointwise (float[N,4,5,7] x) => (float[N,6,5,7] y)
    <
      float[6,4] w, int64[3] y.shape = {0, 4, -1}, float[6,1] b,
      int64[4] y.shape_2 = {0, 6, 5, 7}
    >
    {
      y.reshape = Reshape(x, y.shape)
      y.matmul = MatMul(w, y.reshape)
      y.add = Add(y.matmul, b)
      y = Reshape(y.add, y.shape_2)
    }
    """
    assert_pass(before, MATMUL, after)


def test_pixels_become_gemms_even_so() -> None:
    became(
        f"{MAP} <float[6,4,1,1] w> {{ y = Conv(x, w) }}",
        "Flatten",
        "Gemm",
        "Unsqueeze",
        step=MATMUL,
    )


@pytest.mark.parametrize(
    ("attributes", "weights", "reason"),
    [
        ("strides=[2,2]", "float[6,4,1,1] w", "its stride leaves pixels out"),
        ("strides=[1,2]", "float[6,4,1,1] w", "its stride leaves pixels out"),
        ("pads=[0,0,1,1]", "float[6,4,1,1] w", "it is padded"),
        ("group=2", "float[6,2,1,1] w", "it has 2 groups"),
    ],
)
def test_matmul_refusals(attributes: str, weights: str, reason: str) -> None:
    text = f"h (float[N,4,H,W] x) => (float[] y) <{weights}> {{ y = Conv<{attributes}>(x, w) }}"
    assert_skipped(text, MATMUL, reason)


def test_matmul_bias_that_is_an_input() -> None:
    text = """
    h (float[N,4,8,8] x, float[6] b) => (float[] y) <float[6,4,1,1] w> { y = Conv(x, w, b) }
    """
    assert_skipped(text, MATMUL, "the Conv's bias is not a constant")


def test_a_bias_that_is_an_output_keeps_its_name() -> None:
    text = """
    h (float[N,4,8,8] x) => (float[N,6,8,8] y, float[6] b) <float[6,4,1,1] w, float[6] b>
    { y = Conv(x, w, b) }
    """
    outcome = became(text, "Reshape", "MatMul", "Add", "Reshape", step=MATMUL)
    shapes = {name: w.shape for name, w in values(outcome.proto).items()}
    assert (shapes["b"], shapes["y.bias"]) == ((6,), (6, 1))


def test_auto_pad_pads_no_pointwise() -> None:
    text = """
    h (float[N,4,8,8] x) => (float[] y) <float[6,4,1,1] w>
    { y = Conv<auto_pad="SAME_UPPER">(x, w) }
    """
    became(text, "Reshape", "MatMul", "Reshape", step=MATMUL)


@pytest.mark.parametrize("version", [7, 9, 10, 12, 13, 15, 18, 21])
def test_matmul_opsets(version: int) -> None:
    text = "h (float[N,4,H,W] x) => (float[] y) <float[6,4,1,1] w> { y = Conv(x, w) }"
    became(
        opset(version, text),
        "Reshape",
        "MatMul",
        "Shape",
        "Gather",
        "Concat",
        "Reshape",
        step=MATMUL,
    )


def test_equal_weights_and_shapes_are_shared() -> None:
    text = """
    h (float[N,4,8,8] x) => (float[N,4,8,8] y) <float[4,4,1,1] w>
    { c = Conv(x, w)  y = Conv(c, w) }
    """
    outcome = became(text, *["Reshape", "MatMul", "Reshape"] * 2, step=MATMUL)
    assert set(values(outcome.proto)) == {"c.weight", "c.shape", "c.shape_2"}


# -- there and back ---------------------------------------------------------------------------


def weights(proto: ModelProto) -> dict[str, tuple[np.dtype[Any], bytes]]:
    """Initialiser name → type and bytes: equal where they differ in shape only."""
    return {name: (w.dtype, w.tobytes()) for name, w in values(proto).items()}


def assert_there_and_back(model: Model, there: Pass, back: Pass) -> None:
    """Assert that `back` undoes `there`: operators, and weights by name and bit."""
    outcome = apply(model, there)
    assert outcome.rewrote
    returned = apply(outcome.model, back)
    assert returned.rewrote
    before = [node.op_type for node in model.proto.graph.node]
    assert ops(returned) == before != ops(outcome)
    assert weights(returned.proto) == weights(model.proto)
    assert_same_numbers(returned.model, model)


MLP = """
<float[6,8] w, float[6] b, float[5,6] v, float[3,5] u, float[3] c>
{
  f = Flatten(x)
  g = Gemm<transB=1>(f, w, b)
  h = Relu(g)
  i = Gemm<transB=1>(h, v)
  j = Dropout(i)
  k = LeakyRelu<alpha=0.1>(j)
  y = Gemm<transB=1>(k, u, c)
}
"""


@pytest.mark.parametrize("version", [11, 13, 17])
@pytest.mark.parametrize("size", ["8,1,1", "2,2,2", "4,1,2", "1,4,2", "8,1", "2,4"])
def test_gemms_to_convs_and_back(size: str, version: int) -> None:
    model = parse(opset(version, f"mlp (float[N,{size}] x) => (float[N,3] y) {MLP}"))
    assert_there_and_back(model, CONV, GEMM)


@pytest.mark.parametrize("size", ["8,1,1", "2,2,2", "2,4"])
def test_convs_to_gemms_and_back(size: str) -> None:
    ones = ",".join("1" for _ in size.split(",")[1:])
    model = parse(f"""
    convs (float[N,{size}] x) => (float[N,3] y)
    <float[6,{size}] w, float[6] b, float[5,6,{ones}] v, float[3,5,{ones}] u, float[3] c>
    {{
      g = Conv(x, w, b)
      h = Relu(g)
      i = Conv(h, v)
      j = LeakyRelu<alpha=0.1>(i)
      k = Conv(j, u, c)
      y = Flatten(k)
    }}
    """)
    assert_there_and_back(model, GEMM, CONV)


def test_an_operand_per_channel_there_and_back() -> None:
    model = parse("""
    mlp (float[N,2,2,1] x) => (float[N,3] y)
    <float[6,4] w, float[6] s, float[3,6] v>
    { f = Flatten(x)  g = Gemm<transB=1>(f, w)  h = PRelu(g, s)  y = Gemm<transB=1>(h, v) }
    """)
    returned = apply(apply(model, CONV).model, GEMM)
    assert ops(returned) == [node.op_type for node in model.proto.graph.node]
    assert sorted(weights(returned.proto).values()) == sorted(weights(model.proto).values())
    assert_same_numbers(returned.model, model)


def test_mlp_head_and_conv_head() -> None:
    sizes = {"size": 3, "in_channels": 8, "hidden": 6, "classes": 4}
    mlp, conv = (Model(BUILDERS[name](**sizes)) for name in ("mlp_head", "conv_head"))
    assert_there_and_back(mlp, CONV, GEMM)
    assert_there_and_back(conv, GEMM, CONV)
    gemms = apply(conv, GEMM)
    assert ops(gemms) == [node.op_type for node in mlp.proto.graph.node]
    assert weights(gemms.proto) == weights(mlp.proto)
    assert_same_numbers(gemms.model, mlp)


@pytest.mark.parametrize("size", [32, 64])
def test_vgg_head(size: int) -> None:
    assert_there_and_back(Model(BUILDERS["vgg16"](size=size, width=2, classes=5)), CONV, GEMM)


def test_a_classifier_averaged_over_the_map_stays() -> None:
    outcome = apply(Model(BUILDERS["squeezenet"](size=64, classes=5)), GEMM)
    assert outcome.rewrote == []
    assert outcome.reasons == {"fire9.expand3x3": PADDING}  # 3×3 on a 3×3 map


# -- random graphs ----------------------------------------------------------------------------


@st.composite
def heads(draw: st.DrawFn) -> tuple[Model, int]:
    """Draw convolutions on small maps, with operators between them and readers in the middle.

    Height and width may be open; then the drawn number is what to feed.
    """
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    axes = draw(st.sampled_from([1, 2, 2, 2]))
    size = [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(axes)]
    version = draw(st.sampled_from([11, 13, 17]))
    batch: str | int = draw(st.sampled_from(["N", "N", 1, 3]))
    is_open = draw(st.sampled_from([False] * 5 + [True]))
    if is_open:
        size = [size[0] for _ in size]
    tensors: dict[str, list[int]] = {"x": [2, *size]}  # channels and size
    if not is_open and draw(st.sampled_from([False, False, True])):
        tensors = {"x": [2 * int(np.prod(size))], "m": [2, *size]}
    nodes: list[NodeProto] = []
    weights: dict[str, Array] = {}
    if "m" in tensors:
        weights["to_map"] = np.array([-1, 2, *size], np.int64)
        nodes.append(helper.make_node("Reshape", ["x", "to_map"], ["m"]))
    outputs = []
    for i in range(draw(st.integers(1, 6))):
        maps = [name for name, shape in tensors.items() if len(shape) > 1]
        source = maps[-1] if draw(st.booleans()) else draw(st.sampled_from(maps))
        name = f"t{i}"
        node, shape = _drawn(draw, rng, name, source, tensors, weights)
        nodes.append(node)
        if version < 13 and node.op_type == "Squeeze":
            axes_attribute = weights[node.input.pop()].tolist()
            node.attribute.append(helper.make_attribute("axes", axes_attribute))
        tensors[name] = shape
        if draw(st.sampled_from([False, False, False, True])):
            outputs.append(name)
    last = nodes[-1].output[0]
    outputs += [] if last in outputs else [last]
    x = ["H"] * len(tensors["x"][1:]) if is_open else tensors["x"][1:]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, tensors["x"][0], *x])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [
            numpy_helper.from_array(w if w.dtype == np.int64 else w.astype(np.float32), name)
            for name, w in weights.items()
            if name in used
        ],
    )
    opsets = [helper.make_opsetid("", version)]
    return checked(helper.make_model(graph, opset_imports=opsets, ir_version=8)), size[0]


def _drawn(
    draw: st.DrawFn,
    rng: np.random.Generator,
    name: str,
    source: str,
    tensors: dict[str, list[int]],
    weights: dict[str, Array],
) -> tuple[NodeProto, list[int]]:
    """Draw a node that reads the map `source`; return it with its channels and size."""
    channels, *size = shape = tensors[source]
    kind = draw(st.sampled_from(["Conv"] * 4 + ["unary", "binary", "constant", "view"]))
    if kind == "Conv":
        return _drawn_conv(draw, rng, name, source, shape, weights)
    if kind == "unary":
        op = draw(st.sampled_from(["Relu", "Tanh", "Identity", "Dropout", "GlobalAveragePool"]))
        return helper.make_node(op, [source], [name]), (
            [channels, *(1 for _ in size)] if op == "GlobalAveragePool" else shape
        )
    if kind == "binary":
        others = [other for other, its in tensors.items() if its == shape]
        op = draw(st.sampled_from(["Add", "Mul"]))
        return helper.make_node(op, [source, draw(st.sampled_from(others))], [name]), shape
    if kind == "constant":
        dims = [[], [1], [channels, *(1 for _ in size)], [1, channels, *(1 for _ in size)], [1] * 3]
        weights[f"{name}.c"] = rng.uniform(0.5, 2, draw(st.sampled_from(dims[: len(size) + 3])))
        operands = draw(st.permutations([source, f"{name}.c"]))
        return helper.make_node(draw(st.sampled_from(["Mul", "Sub"])), operands, [name]), shape
    features = [int(np.prod(shape))]
    view = draw(st.sampled_from(["Flatten", "Reshape", "Squeeze"]))
    if view == "Squeeze" and set(size) == {1}:
        weights[f"{name}.s"] = np.arange(2, len(size) + 2)
        return helper.make_node("Squeeze", [source, f"{name}.s"], [name]), features
    if view == "Reshape":
        target = draw(st.sampled_from([[0, -1], [-1, *features], [0, *features]]))
        weights[f"{name}.s"] = np.array(target, np.int64)
        return helper.make_node("Reshape", [source, f"{name}.s"], [name]), features
    return helper.make_node("Flatten", [source], [name]), features


def _drawn_conv(
    draw: st.DrawFn,
    rng: np.random.Generator,
    name: str,
    source: str,
    shape: list[int],
    weights: dict[str, Array],
) -> tuple[NodeProto, list[int]]:
    channels, *size = shape
    kernel = [draw(st.sampled_from([side, side, 1, 2, 3])) for side in size]
    strides = [draw(st.sampled_from([1, 1, 2])) for _ in size]
    dilations = [draw(st.sampled_from([1, 1, 1, 2])) for _ in size]
    auto_pad = draw(st.sampled_from(["NOTSET"] * 3 + ["SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto_pad.startswith("SAME"):
        dilations = [1 for _ in size]  # onnxruntime has no such kernel
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations}
    pads = [0] * 2 * len(size)
    if auto_pad == "NOTSET":
        for axis, (extent, side) in enumerate(zip(extents, size, strict=True)):
            lacking = max(extent - side, 0)
            begin = draw(st.integers(0, lacking + 1))
            end = draw(st.integers(max(lacking - begin, 0), max(lacking - begin, 0) + 1))
            if draw(st.booleans()) and not lacking:
                begin = end = 0
            pads[axis], pads[axis + len(size)] = begin, end
        attributes["pads"] = pads
    else:
        attributes["auto_pad"] = auto_pad
        if auto_pad == "VALID":
            kernel = [min(k, side) for k, side in zip(kernel, size, strict=True)]
            attributes["dilations"] = dilations = [1 for _ in size]
            extents = kernel
    group = draw(st.sampled_from([1] * 6 + [channels]))
    wide = group * draw(st.sampled_from([1, 2]))
    if auto_pad.startswith("SAME"):
        after = [-(-side // stride) for side, stride in zip(size, strides, strict=True)]
    else:
        after = [
            (side + pads[axis] + pads[axis + len(size)] - extents[axis]) // strides[axis] + 1
            for axis, side in enumerate(size)
        ]
    dims = (wide, channels // group, *kernel)
    fitting = [n for n, w in weights.items() if n.endswith(".w") and w.shape == dims]
    weight = draw(st.sampled_from([f"{name}.w", *fitting]))
    if weight not in weights:
        weights[weight] = random_weight(rng, "w", dims)
    inputs = [source, weight]
    if draw(st.booleans()):
        weights[f"{name}.b"] = rng.standard_normal(wide)
        inputs.append(f"{name}.b")
    return helper.make_node("Conv", inputs, [name], group=group, **attributes), [wide, *after]


@settings(max_examples=RANDOM_GRAPHS)
@given(drawn=heads(), general=st.booleans())
def test_random_graphs(drawn: tuple[Model, int], general: bool) -> None:
    model, side = drawn
    step = ConvToGemm(general=general)
    outcome = apply(model, step)
    for batch in (1, 3):
        dims = model.proto.graph.input[0].type.tensor_type.shape.dim
        if dims[0].dim_value not in (0, batch):
            continue
        feeds = random_feeds(model, batch=batch, side=side)
        assert_close(run(outcome.model, feeds), run(model, feeds))
    refused = model.copy()
    events = list(step.apply(refused, Context(judge=refuse)))
    assert [event.where for event in events] == [event.where for event in outcome.events]
    assert refused.to_proto() == model.proto
