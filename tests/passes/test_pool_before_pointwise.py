"""pool-before-pointwise: what moves, how exactly, and what stays for which reason."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import (
    RANDOM_GRAPHS,
    apply,
    assert_close,
    assert_pass,
    assert_same_numbers,
    assert_skipped,
    checked,
    parse,
    random_feeds,
    random_weight,
    run,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pwopt import analysis
from pwopt.editing import Edit
from pwopt.model import Model
from pwopt.models import BUILDERS
from pwopt.passes.pool_before_pointwise import PoolBeforePointwise
from pwopt.rewriting import Context, Judgement

Array = npt.NDArray[Any]

POOL = PoolBeforePointwise()

HEADER = "g (float[N,4,9,9] x) => (float[] y)"
WEIGHTS = "<float[6,4,1,1] w, float[6] b>"
HALVE = "kernel_shape=[2,2], strides=[2,2]"

MOVED = "AveragePool moved in front of the 1×1 Conv"
PADDING = "AveragePool counts padding, which has none of the Conv's bias"
MISSES = "a window of AveragePool may miss the map, where there is none of the Conv's bias"
SAME_SIZE = "AveragePool leaves as many positions as before"
NOT_SPATIAL = "ReduceMean does not go over exactly the spatial axes"
READ_ELSEWHERE = "the Conv's output is read elsewhere too"


def opset(version: int) -> str:
    return f'<ir_version: 8, opset_import: ["" : {version}]>'


def pooled(attributes: str, *, bias: bool = True, version: int = 19) -> str:
    """A 1×1 Conv and an AveragePool."""
    weights, conv = (WEIGHTS, "Conv(x, w, b)") if bias else ("<float[6,4,1,1] w>", "Conv(x, w)")
    body = f"t = {conv}  y = AveragePool<{attributes}>(t)"
    return f"{opset(version)} {HEADER} {weights} {{ {body} }}"


def refuse(model: Model, edit: Edit, *, free: bool) -> Judgement:
    return Judgement(False, "does not pay")


# -- what moves -------------------------------------------------------------------------------


def test_average_pool() -> None:
    before = f"{HEADER} {WEIGHTS} {{ t = Conv(x, w, b)  y = AveragePool<{HALVE}>(t) }}"
    after = f"{HEADER} {WEIGHTS} {{ y.pool = AveragePool<{HALVE}>(x)  y = Conv(y.pool, w, b) }}"
    outcome = assert_pass(before, POOL, after)
    assert [(e.where, e.reason, e.data) for e in outcome.events] == [
        ("y", MOVED, {"op": "AveragePool"})
    ]


def test_global_average_pool() -> None:
    before = f"{HEADER} {WEIGHTS} {{ t = Conv(x, w, b)  y = GlobalAveragePool(t) }}"
    after = f"{HEADER} {WEIGHTS} {{ y.pool = GlobalAveragePool(x)  y = Conv(y.pool, w, b) }}"
    assert_pass(before, POOL, after)


@pytest.mark.parametrize("axes", ["2,3", "3,2", "-1,-2", "2,-1"])
@pytest.mark.parametrize("version", [11, 13, 17])
def test_reduce_mean(axes: str, version: int) -> None:
    header = f"{opset(version)} {HEADER} {WEIGHTS}"
    mean = f"ReduceMean<axes=[{axes}]>"
    before = f"{header} {{ t = Conv(x, w, b)  y = {mean}(t) }}"
    after = f"{header} {{ y.pool = {mean}(x)  y = Conv(y.pool, w, b) }}"
    assert_pass(before, POOL, after)


@pytest.mark.parametrize("noop", [0, 1])
def test_reduce_mean_with_axes_as_input(noop: int) -> None:
    header = f"{opset(18)} {HEADER} <float[6,4,1,1] w, float[6] b, int64[2] axes = {{-2, 3}}>"
    mean = f"ReduceMean<noop_with_empty_axes={noop}>"
    before = f"{header} {{ t = Conv(x, w, b)  y = {mean}(t, axes) }}"
    after = f"{header} {{ y.pool = {mean}(x, axes)  y = Conv(y.pool, w, b) }}"
    assert_pass(before, POOL, after)


def test_reduce_mean_that_drops_its_axes() -> None:
    before = f"{HEADER} {WEIGHTS} {{ t = Conv(x, w, b)  y = ReduceMean<axes=[2,3],keepdims=0>(t) }}"
    after = f"""
    {HEADER} <float[6,4,1,1] w, float[6] b, int64[2] y.axes = {{2, 3}}>
    {{
      y.pool = ReduceMean<axes=[2,3],keepdims=1>(x)
      y.conv = Conv(y.pool, w, b)
      y = Squeeze(y.conv, y.axes)
    }}
    """
    assert_pass(before, POOL, after)


@pytest.mark.parametrize("version", [7, 12])
def test_axes_to_drop_are_an_attribute_before_opset_13(version: int) -> None:
    header = f"{opset(version)} {HEADER} {WEIGHTS}"
    mean = "ReduceMean<axes=[2,3],keepdims=0>"
    before = f"{header} {{ t = Conv(x, w, b)  y = {mean}(t) }}"
    after = f"""
    {header}
    {{
      y.pool = ReduceMean<axes=[2,3],keepdims=1>(x)
      y.conv = Conv(y.pool, w, b)
      y = Squeeze<axes=[2,3]>(y.conv)
    }}
    """
    assert_pass(before, POOL, after)


@pytest.mark.parametrize(
    "attributes",
    [
        "kernel_shape=[2,3], strides=[2,3]",
        "kernel_shape=[9,9]",
        "kernel_shape=[2,1]",
        "kernel_shape=[1,1], strides=[2,1]",
        "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]",
        "kernel_shape=[3,3], strides=[2,2], pads=[0,0,1,2]",
        "kernel_shape=[3,3], pads=[1,0,1,1]",
        "kernel_shape=[2,2], strides=[2,2], ceil_mode=1",
        "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1",
        "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=0",
        "kernel_shape=[2,2], strides=[2,2], count_include_pad=1",
        "kernel_shape=[2,2], strides=[2,2], pads=[0,0,0,0], count_include_pad=1",
        'kernel_shape=[2,2], strides=[2,2], auto_pad="VALID", count_include_pad=1',
        'kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER"',
        'kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_LOWER", ceil_mode=1',
        'kernel_shape=[1,1], strides=[4,4], auto_pad="SAME_UPPER"',
        "kernel_shape=[3,2], dilations=[2,3]",
        "kernel_shape=[2,2], dilations=[2,2], strides=[2,2], ceil_mode=1",
    ],
)
def test_windows_that_hold_only_the_map(attributes: str) -> None:
    model = parse(pooled(attributes))
    outcome = apply(model, POOL)
    assert [event.reason for event in outcome.events] == [MOVED]
    for side in (9, 10):
        assert_same_numbers(outcome.model, model, side=side)


@pytest.mark.parametrize(
    "attributes",
    [
        "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1",
        "kernel_shape=[2,2], strides=[2,2], ceil_mode=1, count_include_pad=1",
        'kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER", count_include_pad=1',
        "kernel_shape=[2,2], strides=[3,3], ceil_mode=1",
        "kernel_shape=[2,2], strides=[2,2], dilations=[8,8], pads=[1,1,1,1]",
    ],
)
@pytest.mark.parametrize("bias", ["", "zero", "empty"])
def test_without_a_bias_any_window_will_do(attributes: str, bias: str) -> None:
    model = parse(
        pooled(attributes, bias=bias == "zero"), {"b": np.zeros(6)} if bias == "zero" else {}
    )
    if bias == "empty":
        model.proto.graph.node[0].input.append("")
    outcome = apply(model, POOL)
    assert [event.reason for event in outcome.events] == [MOVED]
    assert_same_numbers(outcome.model, model)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ("kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1", PADDING),
        ("kernel_shape=[3,3], strides=[2,2], pads=[0,0,0,1], count_include_pad=1", PADDING),
        ("kernel_shape=[2,2], strides=[2,2], ceil_mode=1, count_include_pad=1", PADDING),
        (
            'kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER", count_include_pad=1',
            PADDING,
        ),
        ("kernel_shape=[2,2], strides=[3,2], ceil_mode=1", MISSES),
        ("kernel_shape=[2,2], strides=[2,2], pads=[0,0,0,1], ceil_mode=1", MISSES),
        ("kernel_shape=[2,2], strides=[2,2], dilations=[8,8], pads=[1,1,1,1]", MISSES),
        (
            'kernel_shape=[2,2], strides=[2,2], dilations=[2,2], auto_pad="SAME_UPPER"',
            MISSES,
        ),
        ("kernel_shape=[1,1]", SAME_SIZE),
        ("kernel_shape=[3,3], pads=[1,1,1,1]", SAME_SIZE),
        ('kernel_shape=[3,3], auto_pad="SAME_LOWER"', SAME_SIZE),
        ("kernel_shape=[2,3], strides=[1,2], pads=[1,0,1,0]", SAME_SIZE),
    ],
)
def test_windows_that_hold_more(attributes: str, reason: str) -> None:
    assert_skipped(pooled(attributes), POOL, reason)


def test_moving_a_bias_through_padding_would_be_wrong() -> None:
    """The near-miss: the pool itself thins the bias out at the border."""
    attributes = "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1"
    model = parse(pooled(attributes))
    text = f"{HEADER} {WEIGHTS} {{ t = AveragePool<{attributes}>(x)  y = Conv(t, w, b) }}"
    swapped = parse(f"{opset(19)} {text}")
    feeds = random_feeds(model)
    (ours,), (theirs,) = run(swapped, feeds), run(model, feeds)
    assert np.abs(ours - theirs).max() > 0.1


@pytest.mark.parametrize("spatial", ["8", "8,6", "6,4,4"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("op", ["AveragePool", "GlobalAveragePool", "ReduceMean"])
def test_any_number_of_axes_and_groups(spatial: str, group: int, op: str) -> None:
    rank = spatial.count(",") + 1
    attributes = {
        "AveragePool": f"<kernel_shape={[2] * rank}, strides={[2] * rank}>",
        "ReduceMean": f"<axes={list(range(2, 2 + rank))}, keepdims=0>",
    }
    model = parse(f"""
    g (float[N,4,{spatial}] x) => (float[] y) <float[8,{4 // group}{",1" * rank}] w, float[8] b>
    {{ t = Conv<group={group}>(x, w, b)  y = {op}{attributes.get(op, "")}(t) }}
    """)
    outcome = apply(model, POOL)
    assert outcome.rewrote == ["y"]
    assert_same_numbers(outcome.model, model)


@pytest.mark.parametrize("op", ["GlobalAveragePool", f"AveragePool<{HALVE}>"])
def test_a_map_of_any_size(op: str) -> None:
    text = f"g (float[N,4,H,W] x) => (float[] y) {WEIGHTS} {{ t = Conv(x, w, b)  y = {op}(t) }}"
    model = parse(text)
    outcome = apply(model, POOL)
    assert outcome.rewrote == ["y"]
    for side in (2, 5, 8):
        assert_same_numbers(outcome.model, model, side=side)


@pytest.mark.parametrize(("kind", "rtol"), [("float16", 5e-3), ("float", 1e-4), ("double", 1e-9)])
def test_types(kind: str, rtol: float) -> None:
    text = f"{HEADER} {WEIGHTS} {{ t = Conv(x, w, b)  y = GlobalAveragePool(t) }}"
    model = parse(text.replace("float[", f"{kind}["))
    outcome = apply(model, POOL)
    assert outcome.rewrote == ["y"]
    assert_same_numbers(outcome.model, model, rtol)


@pytest.mark.parametrize(
    "attributes", ['auto_pad="SAME_UPPER"', 'auto_pad="VALID"', "dilations=[2,2]", "pads=[0,0,0,0]"]
)
def test_what_says_nothing_about_a_kernel_of_1(attributes: str) -> None:
    text = f"{HEADER} {WEIGHTS} {{ t = Conv<{attributes}>(x, w, b)  y = GlobalAveragePool(t) }}"
    model = parse(text)
    outcome = apply(model, POOL)
    assert outcome.rewrote == ["y"]
    assert_same_numbers(outcome.model, model)


@pytest.mark.parametrize("names", [("conv", "pool"), ("same", "same"), ("", "")])
def test_nodes_keep_their_notes_where_names_tell_them_apart(names: tuple[str, str]) -> None:
    model = parse(f"{HEADER} {WEIGHTS} {{ t = Conv(x, w, b)  y = GlobalAveragePool(t) }}")
    for node, name in zip(model.proto.graph.node, names, strict=True):
        node.name, node.doc_string = name, f"about {node.op_type}"
    found = {n.op_type: n.doc_string for n in apply(model, POOL).proto.graph.node}
    conv, pool = ("about Conv", "about GlobalAveragePool") if len(set(names)) == 2 else ("", "")
    assert found == {"GlobalAveragePool": pool, "Conv": conv}


def test_a_pool_moves_up_a_whole_chain() -> None:
    text = """
    g (float[N,4,8,8] x) => (float[] y)
    <float[6,4,1,1] w, float[5,6,1,1] v, float[5] b, float[7,5,1,1] u>
    {
      s = Conv(x, w)
      t = Conv(s, v, b)
      p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(t)
      q = Conv(p, u)
      y = ReduceMean<axes=[2,3], keepdims=0>(q)
    }
    """
    model = parse(text)
    outcome = apply(model, POOL)
    assert outcome.rewrote == ["p", "p", "y", "y", "y"]
    ops = [node.op_type for node in outcome.proto.graph.node]
    assert ops == ["AveragePool", "ReduceMean", "Conv", "Conv", "Conv", "Squeeze"]
    assert_same_numbers(outcome.model, model)


def test_shared_weights_and_constant_nodes() -> None:
    text = """
    g (float[N,2,4,4] x, float[N,2,4,4] z) => (float[] y, float[] v)
    {
      w = Constant<value = float[2,2,1,1] {1, 2, 3, 5}>()
      t = Conv(x, w)
      y = GlobalAveragePool(t)
      b = Constant<value = float[2] {7, 11}>()
      u = Conv(z, w, b)
      axes = Constant<value = int64[2] {3, 2}>()
      v = ReduceMean(u, axes)
    }
    """
    model = parse(f"{opset(18)} {text}")
    outcome = apply(model, POOL)
    assert outcome.rewrote == ["y", "v"]
    assert_same_numbers(outcome.model, model)


def test_a_bias_that_is_computed() -> None:
    text = """
    g (float[N,4,6,6] x, float[6] s) => (float[] y) <float[6,4,1,1] w>
    { b = Relu(s)  t = Conv(x, w, b)  y = GlobalAveragePool(t) }
    """
    model = parse(text)
    outcome = apply(model, POOL)
    assert outcome.rewrote == ["y"]
    assert_same_numbers(outcome.model, model)


@pytest.mark.parametrize("condition", [True, False])
def test_a_subgraph_may_read_the_pool(condition: bool) -> None:
    text = f"""
    g (float[N,4,9,9] x, bool c) => (float[N,6,1,1] z) {WEIGHTS}
    {{
      t = Conv(x, w, b)
      y = GlobalAveragePool(t)
      z = If(c) <
        then_branch = yes () => (float[N,6,1,1] one) {{ one = Relu(y) }},
        else_branch = no () => (float[N,6,1,1] two) {{ two = Neg(y) }}
      >
    }}
    """
    model = parse(text)
    outcome = apply(model, POOL)
    assert outcome.rewrote == ["y"]
    feeds = random_feeds(model) | {"c": np.array(condition)}
    assert_close(run(outcome.model, feeds), run(model, feeds))


def test_nodes_keep_their_names_and_weights_theirs() -> None:
    model = parse(f"{HEADER} {WEIGHTS} {{ t = Conv(x, w, b)  y = GlobalAveragePool(t) }}")
    for node, name in zip(model.proto.graph.node, ("mix", "average"), strict=True):
        node.name = name
    proto = apply(model, POOL).proto
    assert [node.name for node in proto.graph.node] == ["average", "mix"]
    assert list(proto.graph.initializer) == list(model.proto.graph.initializer)


# -- what stays -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("t = Conv<strides=[2,1]>(x, w, b)  y = GlobalAveragePool(t)", "the Conv has a stride"),
        ("t = Conv<pads=[0,1,0,0]>(x, w, b)  y = GlobalAveragePool(t)", "the Conv pads its input"),
        (
            "t = Conv(x, w, b)  u = Relu(t)  y = GlobalAveragePool(u)",
            "Relu stands between the Conv and the pool",
        ),
        (
            "t = Conv(x, w, b)  u = BatchNormalization(t, b, b, b, b)  y = GlobalAveragePool(u)",
            "BatchNormalization stands between the Conv and the pool; fold-affine removes it",
        ),
        ("t = Conv(x, w, b)  y = ReduceMean(t)", NOT_SPATIAL),
        ("t = Conv(x, w, b)  y = ReduceMean<axes=[3]>(t)", NOT_SPATIAL),
        ("t = Conv(x, w, b)  y = ReduceMean<axes=[1,2,3]>(t)", NOT_SPATIAL),
        ("t = Conv(x, w, b)  y = ReduceMean<axes=[-1,-3]>(t)", NOT_SPATIAL),
        ("t = Conv(x, w, b)  y = ReduceMean<axes=[0,2,3]>(t)", NOT_SPATIAL),
    ],
)
def test_skips(body: str, reason: str) -> None:
    assert_skipped(f"{HEADER} {WEIGHTS} {{ {body} }}", POOL, reason)


@pytest.mark.parametrize("noop", [0, 1])
def test_reduce_mean_over_no_axes(noop: int) -> None:
    body = f"t = Conv(x, w, b)  y = ReduceMean<noop_with_empty_axes={noop}>(t)"
    assert_skipped(f"{opset(18)} {HEADER} {WEIGHTS} {{ {body} }}", POOL, NOT_SPATIAL)
    text = f"{HEADER} <float[6,4,1,1] w, float[6] b, int64[0] axes>"
    body = body.replace("(t)", "(t, axes)")
    assert_skipped(f"{opset(18)} {text} {{ {body} }}", POOL, NOT_SPATIAL)


def test_reduce_mean_over_axes_that_the_caller_gives() -> None:
    text = f"""{opset(18)}
    g (float[N,4,9,9] x, int64[2] axes) => (float[?,?,?,?] y) {WEIGHTS}
    {{ t = Conv(x, w, b)  y = ReduceMean(t, axes) }}
    """
    assert_skipped(text, POOL, "the axes of ReduceMean are not constant")


@pytest.mark.parametrize(
    ("outputs", "more"),
    [
        ("float[] y, float[] z", "z = Relu(t)"),
        ("float[] y, float[] t", ""),
        ("float[] y, float[] z", "z = GlobalMaxPool(t)"),
    ],
)
def test_several_readers(outputs: str, more: str) -> None:
    text = f"g (float[N,4,9,9] x) => ({outputs}) {WEIGHTS}"
    text += f"{{ t = Conv(x, w, b)  y = GlobalAveragePool(t) {more} }}"
    assert_skipped(text, POOL, READ_ELSEWHERE)


def test_a_subgraph_that_reads_the_conv() -> None:
    text = f"""
    g (float[N,4,9,9] x, bool c) => (float[] y, float[N,6,9,9] z) {WEIGHTS}
    {{
      t = Conv(x, w, b)
      y = GlobalAveragePool(t)
      z = If(c) <
        then_branch = yes () => (float[N,6,9,9] one) {{ one = Relu(t) }},
        else_branch = no () => (float[N,6,9,9] two) {{ two = Neg(t) }}
      >
    }}
    """
    assert_skipped(text, POOL, READ_ELSEWHERE)


def test_a_weight_that_the_caller_may_override() -> None:
    model = parse(f"{HEADER} {WEIGHTS} {{ t = Conv(x, w, b)  y = GlobalAveragePool(t) }}")
    info = helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 4, 1, 1])
    model.proto.graph.input.append(info)
    assert_skipped(model, POOL, "the Conv's weight is not a constant")


def test_a_quantized_weight() -> None:
    text = f"{HEADER} <int8[6,4,1,1] q, float s>"
    body = (
        "w = DequantizeLinear(q, s)  t = Conv<kernel_shape=[1,1]>(x, w)  y = GlobalAveragePool(t)"
    )
    assert_skipped(f"{text} {{ {body} }}", POOL, "the Conv's weight is not a constant")


def test_bfloat16() -> None:
    text = f"{HEADER} {WEIGHTS} {{ t = Conv(x, w, b)  y = GlobalAveragePool(t) }}"
    text = text.replace("float[", "bfloat16[")
    model = f'<ir_version: 10, opset_import: ["" : 22]> {text}'
    assert_skipped(model, POOL, "the Conv's weight is bfloat16")


@pytest.mark.parametrize(
    "body",
    [
        "t = Conv(x, w, b)  y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t)",
        "t = Conv(x, w, b)  y = GlobalMaxPool(t)",
        "t = Conv(x, w, b)  y = LpPool<kernel_shape=[2,2]>(t)",
        "t = Conv(x, w, b)  y = ReduceMax<axes=[2,3]>(t)",
        "y = GlobalAveragePool(x)",
        "t = Relu(x)  y = GlobalAveragePool(t)",
        "t = Constant<value = float[1,1,2,2] {1, 2, 3, 4}>()  y = GlobalAveragePool(t)",
        "y = GlobalAveragePool(w)",
    ],
)
def test_no_sites(body: str) -> None:
    assert apply(parse(f"{HEADER} {WEIGHTS} {{ {body} }}"), POOL).events == []


@pytest.mark.parametrize("kernel", ["1,2", "3,3"])
def test_a_larger_kernel_is_no_site(kernel: str) -> None:
    text = f"{HEADER} <float[6,4,{kernel}] w> {{ t = Conv(x, w)  y = GlobalAveragePool(t) }}"
    assert apply(parse(text), POOL).events == []


def test_what_the_judge_refuses_stays_and_the_rest_goes_on() -> None:
    text = f"g (float[N,4,9,9] x) => (float[] y, float[] z) {WEIGHTS}"
    body = "t = Conv(x, w, b)  y = GlobalAveragePool(t)  u = Conv(x, w)  z = GlobalAveragePool(u)"
    model = parse(f"{text} {{ {body} }}")
    outcome = apply(model, POOL, judge=refuse)
    assert outcome.reasons == {"y": "does not pay", "z": "does not pay"}
    outcome = apply(
        model, POOL, judge=lambda m, e, free: Judgement(e.new[-1].outputs[0].name == "z", "")
    )
    assert outcome.rewrote == ["z"]
    assert_same_numbers(outcome.model, model)


# -- DenseNet-121 -----------------------------------------------------------------------------


def densenet(**options: Any) -> Model:
    return Model(BUILDERS["densenet121"](**options))


def test_densenet_gives_the_same_numbers() -> None:
    model = densenet(size=64, growth=4, classes=10)
    outcome = apply(model, POOL)
    assert len(outcome.rewrote) == 3
    assert_same_numbers(outcome.model, model)


def test_densenet_121_loses_its_share_of_macs() -> None:
    model = densenet()
    before = analysis.size(model)
    assert len(list(POOL.apply(model, Context()))) == 3
    after = analysis.size(model)
    assert before.macs - after.macs == 3 * 256 * 128 * 56 * 56 // 4 * 3
    assert after.macs <= 0.925 * before.macs


# -- random graphs ----------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Model:
    """Draw one or two 1×1 Convs with a pool behind them, and what may stand in the way."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    version = draw(st.sampled_from([11, 17, 19]))
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=2))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2, *sizes])
    nodes: list[NodeProto] = []
    weights: dict[str, Array] = {}
    outputs, tensor, channels = ["y"], "x", 2
    for i in range(draw(st.sampled_from([1, 1, 2]))):
        group, wide = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 4]))
        weights[f"w{i}"] = random_weight(rng, "w", [wide, channels // group, *[1 for _ in sizes]])
        read = [tensor, f"w{i}"]
        bias = draw(st.sampled_from(["random", "random", "zero", "none"]))
        if bias != "none":
            weights[f"b{i}"] = rng.standard_normal(wide) * (bias == "random")
            read.append(f"b{i}")
        stride, pad = draw(st.sampled_from([(1, 0)] * 8 + [(2, 0), (1, 1)]))
        geometry = {"strides": [stride for _ in sizes], "pads": [0, pad] * len(sizes)}
        nodes.append(helper.make_node("Conv", read, [f"t{i}"], group=group, **geometry))
        before, after = geometry["pads"][: len(sizes)], geometry["pads"][len(sizes) :]
        sizes = [
            (s + a + b - 1) // stride + 1 for s, a, b in zip(sizes, before, after, strict=True)
        ]
        tensor, channels = f"t{i}", wide
        more = draw(st.sampled_from([None] * 8 + ["between", "reader", "output"]))
        if more in ("between", "reader"):
            nodes.append(helper.make_node("Relu", [tensor], [f"{tensor}.relu"]))
        if more in ("reader", "output"):
            outputs.append(tensor if more == "output" else f"{tensor}.relu")
        if more == "between":
            tensor = f"{tensor}.relu"
    op = draw(st.sampled_from(["AveragePool", "AveragePool", "GlobalAveragePool", "ReduceMean"]))
    attributes: dict[str, Any] = {}
    if op == "AveragePool":
        attributes = draw(windows(sizes, dilated=version >= 19))
    read = [tensor]
    if op == "ReduceMean":
        attributes["keepdims"] = draw(st.integers(0, 1))
        rank = len(sizes) + 2
        spatial = list(range(2, rank))
        axes = draw(st.sampled_from([spatial, spatial, [a - rank for a in spatial], [1], [0, 2]]))
        if version < 18:
            attributes["axes"] = axes
        else:
            weights["axes"] = np.array(axes, np.int64)
            read.append("axes")
    nodes.append(helper.make_node(op, read, ["y"], **attributes))
    graph = helper.make_graph(
        nodes,
        "random",
        [x],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [
            numpy_helper.from_array(w if name == "axes" else w.astype(np.float32), name)
            for name, w in weights.items()
        ],
    )
    opsets = [helper.make_opsetid("", version)]
    return checked(helper.make_model(graph, opset_imports=opsets, ir_version=8))


@st.composite
def windows(draw: st.DrawFn, sizes: list[int], *, dilated: bool) -> dict[str, Any]:
    """Draw the attributes of an AveragePool that onnxruntime takes."""

    def each(largest: int) -> list[int]:
        return draw(st.lists(st.integers(1, largest), min_size=len(sizes), max_size=len(sizes)))

    kernel = each(3)
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": each(3),
        "ceil_mode": draw(st.integers(0, 1)),
        "count_include_pad": draw(st.integers(0, 1)),
    }
    dilations = each(4) if dilated and draw(st.booleans()) else [1 for _ in sizes]
    if dilated:
        attributes["dilations"] = dilations
    pads = [0 for _ in kernel * 2]
    attributes["auto_pad"] = draw(
        st.sampled_from(["NOTSET"] * 5 + ["VALID", "SAME_UPPER", "SAME_LOWER"])
    )
    if attributes["auto_pad"] == "NOTSET" and draw(st.booleans()):
        pads = [draw(st.integers(0, size - 1)) for size in kernel * 2]
        attributes["pads"] = pads
    same = attributes["auto_pad"].startswith("SAME")
    for i, size in enumerate(sizes):
        assume(not same or attributes["strides"][i] <= kernel[i])  # else it pads a negative number
        assume(dilations[i] * (kernel[i] - 1) < size + pads[i] + pads[i + len(sizes)])
    return attributes


@settings(max_examples=RANDOM_GRAPHS)
@given(model=graphs())
def test_random_graphs(model: Model) -> None:
    outcome = apply(model, POOL)
    feeds = random_feeds(model)
    expected = run(model, feeds)
    assert_close(run(outcome.model, feeds), expected)
    apply(model, POOL, judge=refuse)
