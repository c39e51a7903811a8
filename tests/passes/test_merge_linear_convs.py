"""merge-linear-convs: what merges, how exactly, and what is left alone for which reason."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import (
    ASSETS,
    RANDOM_GRAPHS,
    Outcome,
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

from pwopt.analysis import size
from pwopt.editing import Edit
from pwopt.errors import ModelError
from pwopt.model import Model
from pwopt.passes.bottleneck import Bottleneck
from pwopt.passes.merge_linear_convs import MergeLinearConvs
from pwopt.rewriting import Context, Judgement

Array = npt.NDArray[Any]

MERGE = MergeLinearConvs()

HEADER = "conv (float[N,4,9,9] x) => (float[] y)"


def merged(text: str | Model, *, sites: int = 1, rtol: float = 1e-4, **sizes: int) -> Outcome:
    """Apply the pass; assert that it merged, that the numbers stay, and that the cost falls."""
    model = parse(text) if isinstance(text, str) else text
    outcome = apply(model, MERGE)
    assert len(outcome.rewrote) == sites, outcome.events
    assert_same_numbers(outcome.model, model, rtol, **sizes)
    before, after = size(model), size(outcome.model)
    events = [event for event in outcome.events if event.kind == "rewrote"]
    assert before.macs - after.macs == sum(int(event.data["saved_macs"]) for event in events) > 0
    assert (
        before.params - after.params == sum(int(event.data["saved_params"]) for event in events) > 0
    )
    return outcome


def attributes(outcome: Outcome, index: int = 0) -> dict[str, Any]:
    node = outcome.proto.graph.node[index]
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# -- convolutions -----------------------------------------------------------------------------


POINTWISE = "<dilations=[1,1], group=1, kernel_shape=[1,1], strides=[1,1], pads=[0,0,0,0]>"


@pytest.mark.parametrize(
    ("first", "second", "bias"),
    [("v", "w", ""), ("v, a", "w", "y.bias"), ("v", "w, b", "b"), ("v, a", "w, b", "y.bias")],
)
def test_pointwise_and_pointwise(first: str, second: str, bias: str) -> None:
    weights = {"v": "float[8,4,1,1]", "a": "float[8]", "w": "float[6,8,1,1]", "b": "float[6]"}
    read = ", ".join(f"{weights[name]} {name}" for name in f"{first}, {second}".split(", "))
    before = f"{HEADER} <{read}> {{ t = Conv(x, {first})  y = Conv(t, {second}) }}"
    after = f"""
    {HEADER}
    <float[6,4,1,1] y.weight {f", float[6] {bias}" if bias else ""}>
    {{ y = Conv{POINTWISE}(x, y.weight {f", {bias}" if bias else ""}) }}
    """
    outcome = assert_pass(before, MERGE, after)
    (event,) = outcome.events
    assert (event.where, event.reason) == ("y", "merged with the Conv before it")


def test_a_kept_bias_is_the_same_to_the_bit() -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[6,8,3,3] w, float[6] b>"
    model = parse(text + "{ t = Conv(x, v)  y = Conv<pads=[1,1,1,1]>(t, w, b) }")
    outcome = merged(model)
    assert np.array_equal(values(outcome.proto)["b"], values(model.proto)["b"])


def test_rounded_once() -> None:
    model = parse(
        f"{HEADER} <float[8,4,1,1] v, float[6,8,1,1] w> {{ t = Conv(x, v) y = Conv(t, w) }}"
    )
    v, w = (values(model.proto)[name][..., 0, 0].astype(np.float64) for name in "vw")
    weight = values(merged(model).proto)["y.weight"]
    assert np.array_equal(weight[..., 0, 0], (w @ v).astype(np.float32))


@pytest.mark.parametrize("bias", ["", ", a"])
@pytest.mark.parametrize("side", [9, 10, 11, 12])
def test_wide_then_pointwise(bias: str, side: int) -> None:
    outcome = merged(
        f"""
        conv (float[N,4,H,W] x) => (float[] y)
        <float[8,4,3,2] v, float[8] a, float[6,8,1,1] w, float[6] b>
        {{
          t = Conv<strides=[1,2], pads=[1,0,2,1], dilations=[2,1]>(x, v{bias})
          y = Conv<strides=[2,3]>(t, w, b)
        }}
        """,
        side=side,
    )
    assert attributes(outcome) == {
        "dilations": [2, 1],
        "group": 1,
        "kernel_shape": [3, 2],
        "pads": [1, 0, 2, 1],
        "strides": [2, 6],
    }


def test_pointwise_then_wide_and_padded() -> None:
    outcome = merged(
        f"""
        {HEADER}
        <float[8,4,1,1] v, float[6,8,3,3] w, float[6] b>
        {{ t = Conv(x, v)  y = Conv<pads=[1,0,2,1], strides=[2,1], dilations=[1,2]>(t, w, b) }}
        """
    )
    found = attributes(outcome)
    assert found["pads"] == [1, 0, 2, 1]
    assert (found["strides"], found["dilations"]) == ([2, 1], [1, 2])


def test_pointwise_with_a_bias_then_wide_and_unpadded() -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[8] a, float[6,8,3,3] w, float[6] b>"
    merged(f"{text} {{ t = Conv(x, v, a)  y = Conv(t, w, b) }}")
    merged(f"{text} {{ t = Conv<pads=[1,2,0,1]>(x, v, a)  y = Conv(t, w) }}")


@pytest.mark.parametrize("pads", ["pads=[1,1,1,1]", "pads=[0,0,0,1]", 'auto_pad="SAME_UPPER"'])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_bias_at_a_padded_border(pads: str, kernel: int) -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[8] a, float[6,8,{kernel},{kernel}] w>"
    text += f"{{ t = Conv(x, v, a)  y = Conv<{pads}>(t, w) }}"
    if kernel == 1 and "auto" in pads:  # which pads a 1×1 by nothing
        merged(text)
        return
    assert_skipped(text, MERGE, "the first Conv's bias would leak into the second one's padding")
    zero = parse(text, {"a": np.zeros(8)})
    assert list(merged(zero).proto.graph.node[0].input) == ["x", "y.weight"]


@pytest.mark.parametrize("side", range(9, 15))
@pytest.mark.parametrize(("dilation", "stride"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_strided_pointwise_then_wide(side: int, dilation: int, stride: int) -> None:
    outcome = merged(
        f"""
        conv (float[N,4,H,W] x) => (float[] y)
        <float[32,4,1,1] v, float[6,32,2,3] w>
        {{
          t = Conv<strides=[2,3], pads=[0,1,1,0]>(x, v)
          y = Conv<pads=[2,1,0,3], dilations=[{dilation},1], strides=[{stride},1]>(t, w)
        }}
        """,
        side=side,
    )
    assert attributes(outcome) == {
        "dilations": [2 * dilation, 3],
        "group": 1,
        "kernel_shape": [2, 3],
        "pads": [4, 4, 1, 9],
        "strides": [2 * stride, 3],
    }


def test_row_then_column() -> None:
    outcome = merged(
        """
        conv (float[N,2,9,9] x) => (float[] y)
        <float[16,2,1,3] v, float[2,16,3,1] w>
        { t = Conv<pads=[0,1,0,1]>(x, v)  y = Conv<pads=[1,0,1,0], strides=[2,1]>(t, w) }
        """
    )
    assert attributes(outcome)["pads"] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("first", "second", "group"), [(2, 2, 2), (4, 2, 2), (2, 4, 2), (2, 1, 1), (1, 2, 1), (4, 6, 2)]
)
def test_groups(first: int, second: int, group: int) -> None:
    outcome = merged(
        f"""
        conv (float[N,4,9,9] x) => (float[] y)
        <float[48,{4 // first},3,3] v, float[48] a, float[12,{48 // second},1,1] w>
        {{ t = Conv<group={first}>(x, v, a)  y = Conv<group={second}>(t, w) }}
        """
    )
    assert attributes(outcome)["group"] == group
    assert values(outcome.proto)["y.weight"].shape == (12, 4 // group, 3, 3)


def test_depthwise_and_pointwise_usually_do_not_pay() -> None:
    text = """
    conv (float[N,8,9,9] x) => (float[N,8,7,7] y) <float[8,1,3,3] v, float[8,8,1,1] w>
    { t = Conv<group=8>(x, v)  y = Conv(t, w) }
    """
    assert_skipped(text, MERGE, "merged it would take 28224 MACs instead of 6664")


def test_depthwise_that_multiplies_channels_then_pointwise() -> None:
    merged(
        """
        conv (float[N,3,9,9] x) => (float[] y) <float[24,1,3,3] v, float[4,24,1,1] w>
        { t = Conv<group=3, pads=[1,1,1,1]>(x, v)  y = Conv(t, w) }
        """
    )


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("wide", ["first", "second"])
def test_other_ranks(rank: int, wide: str) -> None:
    kernel, one, dims = ((",".join([s] * rank)) for s in "319")
    first, second = (kernel, one) if wide == "first" else (one, kernel)
    merged(
        f"""
        conv (float[N,4,{dims}] x) => (float[] y) <float[8,4,{first}] v, float[6,8,{second}] w>
        {{ t = Conv(x, v)  y = Conv(t, w) }}
        """
    )


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize("side", [8, 9])
def test_auto_pad(mode: str, side: int) -> None:
    header = "conv (float[N,4,H,W] x) => (float[] y)"
    wide = f'Conv<auto_pad="{mode}", strides=[2,1]>'
    first = (
        f"<float[8,4,3,4] v, float[8] a, float[6,8,1,1] w> {{ t = {wide}(x, v, a) y = Conv(t, w) }}"
    )
    second = f"<float[8,4,1,1] v, float[6,8,3,4] w> {{ t = Conv(x, v) y = {wide}(t, w) }}"
    for text in (first, second):
        found = attributes(merged(f"{header} {text}", side=side))
        assert found.get("auto_pad", b"").decode() == (mode if "SAME" in mode else "")
    # A 1×1 is padded by nothing, whatever the mode.
    text = "<float[8,4,3,3] v, float[6,8,1,1] w> { t = Conv(x, v) y = "
    merged(f'{header} {text} Conv<auto_pad="{mode}", strides=[2,2]>(t, w) }}', side=side)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_auto_pad_that_would_pad_otherwise(mode: str) -> None:
    reason = f"auto_pad={mode} would pad otherwise after merging"
    same = f'auto_pad="{mode}"'
    wide = f"{HEADER} <float[8,4,3,3] v, float[6,8,1,1] w>"
    assert_skipped(
        f"{wide} {{ t = Conv<{same}>(x, v) y = Conv<strides=[2,1]>(t, w) }}", MERGE, reason
    )
    assert_skipped(
        f"{wide} {{ t = Conv<{same}>(x, v) y = Conv<pads=[0,1,0,0]>(t, w) }}", MERGE, reason
    )
    behind = f"{HEADER} <float[8,4,1,1] v, float[6,8,3,3] w>"
    assert_skipped(
        f"{behind} {{ t = Conv<strides=[1,2]>(x, v) y = Conv<{same}>(t, w) }}", MERGE, reason
    )
    assert_skipped(
        f"{behind} {{ t = Conv<pads=[0,1,0,0]>(x, v) y = Conv<{same}>(t, w) }}", MERGE, reason
    )


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("side", [4, 5, 8, 10])
def test_a_pointwise_that_crops(mode: str, side: int) -> None:
    """At a stride of 4 or 5, onnxruntime drops rows in front of what SAME needs not pad."""
    text = f"conv (float[N,4,{side},{side}] x) => (float[] y)"
    crop = f'Conv<auto_pad="{mode}", strides=[4,5]>'
    kept = f"{text} <float[8,4,1,1] v, float[6,8,1,1] w> {{ t = {crop}(x, v)  y = Conv(t, w) }}"
    assert attributes(merged(kept))["auto_pad"].decode() == mode
    wide = f"{text} <float[8,4,3,3] v, float[6,8,1,1] w> {{ t = Conv<pads=[1,1,1,1]>(x, v)"
    reason = f"auto_pad={mode} would pad otherwise after merging"
    assert_skipped(f"{wide}  y = {crop}(t, w) }}", MERGE, reason)


def test_a_dilation_of_a_single_tap_says_nothing() -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[6,8,3,1] w> {{ t = Conv<dilations=[2,2]>(x, v)"
    outcome = merged(f'{text} y = Conv<auto_pad="SAME_UPPER">(t, w) }}')
    assert attributes(outcome)["dilations"] == [1, 1]  # onnxruntime wants it with SAME


def test_neither_kernel_is_pointwise() -> None:
    text = f"{HEADER} <float[8,4,3,3] v, float[6,8,2,2] w> {{ t = Conv(x, v)  y = Conv(t, w) }}"
    assert_skipped(text, MERGE, "neither kernel is 1×1")


def test_a_pointwise_that_pads_what_a_wide_one_wrote() -> None:
    text = f"{HEADER} <float[8,4,3,3] v, float[6,8,1,1] w>"
    text += "{ t = Conv(x, v)  y = Conv<pads=[1,1,1,1]>(t, w) }"
    assert_skipped(text, MERGE, "the second Conv pads what a k×k wrote")


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_auto_pad_and_pads(mode: str) -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[6,8,3,3] w>"
    text += f'{{ t = Conv(x, v)  y = Conv<auto_pad="{mode}", pads=[1,1,1,1]>(t, w) }}'
    assert_skipped(text, MERGE, "auto_pad and pads contradict each other")


def test_negative_pads_stay() -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[6,8,3,3] w>"
    model = parse(f"{text} {{ t = Conv(x, v)  y = Conv<pads=[1,1,1,1]>(t, w) }}")
    model.proto.graph.node[1].attribute[0].ints[:] = [-1, 0, 0, 0]  # which no checker lets pass
    (event,) = MERGE.apply(model, Context())
    assert (event.kind, event.reason) == ("skipped", "negative pads")


def test_a_kernel_shape_or_not() -> None:
    text = f"{HEADER} <float[8,4,3,3] v, float[6,8,1,1] w>"
    merged(f"{text} {{ t = Conv<kernel_shape=[3,3]>(x, v)  y = Conv<kernel_shape=[1,1]>(t, w) }}")


# -- matrices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trans", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
@pytest.mark.parametrize("bias", ["", "5", "1,5", "1,1", "1", "scalar"])
def test_gemm_and_gemm(trans: tuple[int, int, int], bias: str) -> None:
    a, b, c = trans
    first = f"float[{bias}] a," if bias and bias != "scalar" else "float a," if bias else ""
    outcome = merged(
        f"""
        fc (float[{"4,3" if a else "3,4"}] x) => (float[] y)
        <float[{"5,4" if b else "4,5"}] v, {first} float[{"2,5" if c else "5,2"}] w, float[2] b>
        {{
          t = Gemm<transA={a}, transB={b}, alpha=0.5, beta=2.0>(x, v{", a" if bias else ""})
          y = Gemm<transB={c}, alpha=3.0, beta=0.25>(t, w, b)
        }}
        """
    )
    wanted = ({"transA": 1} if a else {}) | ({} if bias else {"beta": 0.25})
    assert attributes(outcome) == wanted


@pytest.mark.parametrize("shape", ["4", "N,4", "N,3,4", "N,2,3,4"])
def test_matmul_chains(shape: str) -> None:
    before = f"""
    g (float[{shape}] x) => (float[] y) <float[4,8] u, float[8,8] v, float[8,2] w>
    {{ s = MatMul(x, u)  t = MatMul(s, v)  y = MatMul(t, w) }}
    """
    outcome = merged(before, sites=2)
    (node,) = outcome.proto.graph.node
    assert node.op_type == "MatMul"
    assert [tensor.dims for tensor in outcome.proto.graph.initializer] == [[4, 2]]


@pytest.mark.parametrize("first", ["MatMul(x, v)", "Gemm<alpha=2.0>(x, v)", "Gemm(x, v, a)"])
@pytest.mark.parametrize("second", ["MatMul(t, w)", "Gemm(t, w)", "Gemm<beta=0.5>(t, w, b)"])
def test_mixed(first: str, second: str) -> None:
    text = "g (float[N,4] x) => (float[] y) <float[4,8] v, float[8] a, float[8,3] w, float[3] b>"
    outcome = merged(f"{text} {{ t = {first}  y = {second} }}")
    kinds = {first.partition("(")[0].partition("<")[0], second[:4].rstrip("(<")}
    assert outcome.proto.graph.node[0].op_type == (
        "MatMul" if kinds == {"MatMul", "MatM"} else "Gemm"
    )


def test_a_bias_per_row_behind_none_is_kept() -> None:
    text = "g (float[3,4] x) => (float[] y) <float[4,8] v, float[8,2] w, float[3,2] b>"
    merged(f"{text} {{ t = Gemm(x, v)  y = Gemm(t, w, b) }}")


@pytest.mark.parametrize(
    ("a", "b", "op"), [("3,1", "2", "Gemm"), ("3,8", "2", "Gemm"), ("8", "3,2", "Gemm")]
)
def test_a_bias_per_row_stays(a: str, b: str, op: str) -> None:
    text = (
        f"g (float[3,4] x) => (float[] y) <float[4,8] v, float[{a}] a, float[8,2] w, float[{b}] b>"
    )
    text += "{ t = Gemm(x, v, a)  y = Gemm(t, w, b) }"
    assert_skipped(text, MERGE, f"the {op}'s bias differs from row to row")


def test_a_second_gemm_that_transposes() -> None:
    text = "g (float[3,4] x) => (float[] y) <float[4,8] v, float[3,2] w>"
    text += "{ t = Gemm(x, v)  y = Gemm<transA=1>(t, w) }"
    assert_skipped(text, MERGE, "the second Gemm transposes what it reads")


def test_stacks_of_matrices_stay() -> None:
    text = "g (float[2,3,4] x) => (float[] y) <float[2,4,8] v, float[8,2] w>"
    text += "{ t = MatMul(x, v)  y = MatMul(t, w) }"
    assert_skipped(text, MERGE, "the MatMul's right operand is not a matrix")


def test_matmul_by_a_vector_stays() -> None:
    text = "g (float[2,3,4] x) => (float[] y) <float[4,8] v, float[8] w>"
    text += "{ t = MatMul(x, v)  y = MatMul(t, w) }"
    assert_skipped(text, MERGE, "the MatMul's right operand is not a matrix")


def test_gemm_before_opset_7_stays() -> None:
    text = """<ir_version: 4, opset_import: ["" : 6]>
    g (float[3,4] x) => (float[3,2] y) <float[4,8] v, float[8] a, float[8,2] w, float[2] b>
    { t = Gemm<broadcast=1>(x, v, a)  y = Gemm<broadcast=1>(t, w, b) }
    """
    reason = "before opset 7, a Gemm's bias is broadcast by other rules"
    assert_skipped(text, MERGE, reason)


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13])
def test_gemm_of_any_opset(opset: int) -> None:
    merged(
        f"""<ir_version: 4, opset_import: ["" : {opset}]>
        g (float[3,4] x) => (float[3,2] y) <float[4,8] v, float[8] a, float[8,2] w, float[2] b>
        {{ t = Gemm(x, v, a)  y = Gemm(t, w, b) }}
        """
    )


def test_attention_is_left_alone() -> None:
    text = "g (float[3,4] q, float[4,3] k, float[3,4] v) => (float[] y)"
    reason = "the first MatMul's weight is not a constant"
    assert_skipped(f"{text} {{ t = MatMul(q, k)  y = MatMul(t, v) }}", MERGE, reason)


# -- what lies between ------------------------------------------------------------------------


BETWEEN = [
    "Identity(t)",
    "Dropout(t)",
    "Dropout(t, ratio)",
    "Dropout(t, ratio, false)",
]


@pytest.mark.parametrize("node", BETWEEN)
@pytest.mark.parametrize("twice", [False, True])
def test_through_identities(node: str, twice: bool) -> None:
    more = "r = Identity(s)" if twice else ""
    model = parse(
        f"""
        {HEADER}
        <float[8,4,1,1] v, float[6,8,1,1] w>
        {{
          ratio = Constant<value = float {{0.5}}>()
          false = Constant<value = bool {{0}}>()
          t = Conv(x, v)
          s = {node}
          {more}
          y = Conv({"r" if twice else "s"}, w)
          z = Identity(y)
        }}
        """
    )
    outcome = apply(model, MERGE)
    assert outcome.rewrote == ["y"]
    assert_same_numbers(outcome.model, model)
    ops = [node.op_type for node in outcome.proto.graph.node if node.op_type != "Constant"]
    assert ops == ["Conv", "Identity"]


def test_an_unread_mask() -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[6,8,1,1] w>"
    merged(f"{text} {{ t = Conv(x, v)  s, m = Dropout(t)  y = Conv(s, w) }}")


def test_a_mask_that_is_read() -> None:
    text = "conv (float[N,4,9,9] x) => (float[] y, bool[] m) <float[8,4,1,1] v, float[6,8,1,1] w>"
    text += "{ t = Conv(x, v)  s, m = Dropout(t)  y = Conv(s, w) }"
    assert_skipped(text, MERGE, "Dropout's mask is read")


def test_dropout_in_training() -> None:
    text = f"""
    {HEADER} <float[8,4,1,1] v, float[6,8,1,1] w, float ratio = {{0.5}}, bool training = {{1}}>
    {{ t = Conv(x, v)  s = Dropout(t, ratio, training)  y = Conv(s, w) }}
    """
    assert_skipped(text, MERGE, "Dropout is in training mode")


def test_dropout_that_the_caller_may_train() -> None:
    text = """
    conv (float[N,4,9,9] x, bool training) => (float[] y)
    <float[8,4,1,1] v, float[6,8,1,1] w, float ratio>
    { t = Conv(x, v)  s = Dropout(t, ratio, training)  y = Conv(s, w) }
    """
    assert_skipped(text, MERGE, "Dropout is in training mode")


@pytest.mark.parametrize("is_test", ["", "<is_test=1>"])
def test_dropout_before_opset_7(is_test: str) -> None:
    text = f"""<ir_version: 4, opset_import: ["" : 6]>
    conv (float[2,4,9,9] x) => (float[2,6,9,9] y) <float[8,4,1,1] v, float[6,8,1,1] w>
    {{ t = Conv(x, v)  s = Dropout{is_test}(t)  y = Conv(s, w) }}
    """
    if is_test:
        assert apply(parse(text), MERGE).rewrote == ["y"]
    else:
        assert_skipped(text, MERGE, "Dropout is in training mode")


def test_something_non_linear_is_no_site() -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[6,8,1,1] w>"
    text += "{ t = Conv(x, v)  s = Relu(t)  y = Conv(s, w) }"
    assert apply(parse(text), MERGE).events == []


# -- readers ----------------------------------------------------------------------------------


def test_another_reader() -> None:
    text = "conv (float[N,4,9,9] x) => (float[] y, float[] z) <float[8,4,1,1] v, float[6,8,1,1] w>"
    text += "{ t = Conv(x, v)  y = Conv(t, w)  z = Relu(t) }"
    assert_skipped(text, MERGE, "the Conv's output is read elsewhere too")


@pytest.mark.parametrize("tensor", ["t", "s"])
def test_a_graph_output_in_the_middle(tensor: str) -> None:
    text = f"conv (float[N,4,9,9] x) => (float[] y, float[] {tensor})"
    text += "<float[8,4,1,1] v, float[6,8,1,1] w>"
    text += "{ t = Conv(x, v)  s = Identity(t)  y = Conv(s, w) }"
    op = {"t": "Conv", "s": "Identity"}[tensor]
    assert_skipped(text, MERGE, f"the {op}'s output is read elsewhere too")


def test_a_subgraph_that_reads_the_middle() -> None:
    text = """
    conv (float[N,4,7,7] x, bool c) => (float[] y, float[] z)
    <float[8,4,1,1] v, float[6,8,1,1] w>
    {
      t = Conv(x, v)
      y = Conv(t, w)
      z = If(c) <
        then_branch = yes () => (float[N,8,7,7] one) { one = Identity(t) },
        else_branch = no () => (float[N,8,7,7] two) { two = Relu(t) }
      >
    }
    """
    assert_skipped(text, MERGE, "the Conv's output is read elsewhere too")


@pytest.mark.parametrize("condition", [True, False])
def test_subgraphs_see_the_new_output(condition: bool) -> None:
    text = """
    conv (float[N,4,7,7] x, bool c) => (float[] z)
    <float[8,4,1,1] v, float[6,8,1,1] w>
    {
      t = Conv(x, v)
      y = Conv(t, w)
      z = If(c) <
        then_branch = yes () => (float[N,6,7,7] one) { one = Identity(y) },
        else_branch = no () => (float[N,6,7,7] two) { two = Relu(y) }
      >
    }
    """
    model = parse(text)
    outcome = apply(model, MERGE)
    assert outcome.rewrote == ["y"]
    feeds = random_feeds(model) | {"c": np.array(condition)}
    assert_close(run(outcome.model, feeds), run(model, feeds))


def test_a_weight_that_a_subgraph_reads_is_not_saved() -> None:
    text = """
    conv (float[N,4,7,7] x, bool c) => (float[] y, float[] z)
    <float[5,4,1,1] v, float[4,5,1,1] w>
    {
      t = Conv(x, v)
      y = Conv(t, w)
      z = If(c) <
        then_branch = yes () => (float[5,4,1,1] one) { one = Identity(v) },
        else_branch = no () => (float[5,4,1,1] two) { two = Relu(v) }
      >
    }
    """
    outcome = apply(parse(text), MERGE)
    assert outcome.rewrote == ["y"]  # 16 new ones, and w's 20 are freed
    narrow = text.replace("5,", "4,").replace("[4,5", "[4,4")
    assert_skipped(narrow, MERGE, "merged it would take 16 new parameters and free only 16")


# -- weights ----------------------------------------------------------------------------------


def test_shared_weights_save_nothing() -> None:
    text = """
    siamese (float[N,4,9,9] x, float[N,4,9,9] z) => (float[] y, float[] u)
    <float[8,4,1,1] v, float[6,8,1,1] w>
    { t = Conv(x, v)  y = Conv(t, w)  s = Conv(z, v)  u = Conv(s, w) }
    """
    reason = "merged it would take 24 new parameters and free only 0"
    assert apply(parse(text), MERGE).reasons == {"y": reason, "u": reason}


def test_a_weight_that_both_share_is_counted_once() -> None:
    text = "conv (float[N,4,9,9] x) => (float[] y) <float[4,4,1,1] w>"
    text += "{ t = Conv(x, w)  y = Conv(t, w) }"
    assert_skipped(text, MERGE, "merged it would take 16 new parameters and free only 16")


def test_a_weight_that_is_a_graph_output_is_not_saved() -> None:
    text = "conv (float[N,4,9,9] x) => (float[] y, float[4,4,1,1] v)"
    text += "<float[4,4,1,1] v, float[4,4,1,1] w> { t = Conv(x, v)  y = Conv(t, w) }"
    assert apply(parse(text), MERGE).rewrote == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("v", "the first Conv's weight"),
        ("a", "the first Conv's bias"),
        ("w", "the second Conv's weight"),
        ("b", "the second Conv's bias"),
    ],
)
def test_constants_that_the_caller_may_override_stay(name: str, what: str) -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[8] a, float[6,8,1,1] w, float[6] b>"
    model = overridable(parse(text + "{ t = Conv(x, v, a)  y = Conv(t, w, b) }"), name)
    assert_skipped(model, MERGE, f"{what} is not a constant")


@pytest.mark.parametrize("kind", ["conv", "gemm"])
def test_a_second_bias_that_is_not_constant_is_kept(kind: str) -> None:
    text = {
        "conv": f"{HEADER} <float[8,4,1,1] v, float[6,8,1,1] w, float[6] b>"
        "{ t = Conv(x, v)  y = Conv(t, w, b) }",
        "gemm": "g (float[N,4] x) => (float[] y) <float[4,8] v, float[8,6] w, float[6] b>"
        "{ t = Gemm(x, v)  y = Gemm<beta=0.5>(t, w, b) }",
    }[kind]
    outcome = merged(overridable(parse(text), "b"))
    assert outcome.proto.graph.node[0].input[2] == "b"


def test_a_bias_computed_in_between() -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[6,8,1,1] w, float[6] c>"
    merged(f"{text} {{ t = Conv(x, v)  b = Relu(c)  y = Conv(t, w, b) }}")


def overridable(model: Model, name: str) -> Model:
    (tensor,) = (t for t in model.proto.graph.initializer if t.name == name)
    info = helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
    model.proto.graph.input.append(info)
    return model


def test_constant_nodes() -> None:
    model = parse(
        f"{HEADER} <float[8,4,1,1] v, float[6,8,1,1] w> {{ t = Conv(x, v) y = Conv(t, w) }}"
    )
    graph = model.proto.graph
    nodes = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in graph.initializer
    ]
    nodes += list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.node.extend(nodes)
    outcome = apply(model, MERGE)
    assert [node.op_type for node in outcome.proto.graph.node] == ["Conv"]
    assert_same_numbers(outcome.model, model)


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_floats(dtype: str) -> None:
    text = f"conv ({dtype}[2,4,9,9] x) => ({dtype}[] y)"
    text += f"<{dtype}[8,4,3,3] v, {dtype}[8] a, {dtype}[6,8,1,1] w>"
    text += "{ t = Conv(x, v, a)  y = Conv(t, w) }"
    outcome = merged(text, rtol=1e-2 if dtype == "float16" else 1e-12)
    assert {t.data_type for t in outcome.proto.graph.initializer} == {
        TensorProto.FLOAT16 if dtype == "float16" else TensorProto.DOUBLE
    }


@pytest.mark.parametrize(("dtype", "name"), [("int32", "int32"), ("bfloat16", "bfloat16")])
def test_other_types_stay(dtype: str, name: str) -> None:
    text = f"g ({dtype}[2,4] x) => ({dtype}[] y) <{dtype}[4,8] v, {dtype}[8,2] w>"
    model = parse(f"{text} {{ t = MatMul(x, v)  y = MatMul(t, w) }}")
    assert_skipped(model, MERGE, f"the first MatMul's weight is {name}")


def test_what_float16_cannot_hold_stays() -> None:
    text = "conv (float16[2,4,9,9] x) => (float16[] y) <float16[8,4,1,1] v, float16[6,8,1,1] w>"
    text += "{ t = Conv(x, v)  y = Conv(t, w) }"
    weights = {"v": np.full((8, 4, 1, 1), 300.0), "w": np.full((6, 8, 1, 1), 300.0)}
    reason = "the merged weight would not be finite in float16"
    assert_skipped(parse(text, weights), MERGE, reason)


@pytest.mark.parametrize(("name", "shape"), [("v", (8, 4, 1, 1)), ("a", (8,)), ("b", (6,))])
def test_what_is_not_finite_stays(name: str, shape: tuple[int, ...]) -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[8] a, float[6,8,1,1] w, float[6] b>"
    model = parse(text + "{ t = Conv(x, v, a)  y = Conv(t, w, b) }", {name: np.full(shape, np.inf)})
    assert_skipped(model, MERGE, "the merged weight would not be finite in float32")


def test_the_merged_layer_takes_the_name_of_the_second() -> None:
    text = f"{HEADER} <float[8,4,1,1] v, float[6,8,1,1] w> {{ t = Conv(x, v) y = Conv(t, w) }}"
    for name in ("", "same", "last"):
        model = parse(text)
        model.proto.graph.node[0].name = name if name != "last" else "first"
        model.proto.graph.node[1].name = name
        outcome = apply(model, MERGE)
        assert [(node.name, node.output) for node in outcome.proto.graph.node] == [(name, ["y"])]


# -- profit -----------------------------------------------------------------------------------


def test_a_narrow_middle_stays() -> None:
    text = f"{HEADER} <float[2,4,1,1] v, float[4,2,1,1] w> {{ t = Conv(x, v) y = Conv(t, w) }}"
    assert_skipped(text, MERGE, "merged it would take 1296 MACs instead of 1296")


def test_a_stride_in_the_second_decides() -> None:
    text = f"{HEADER} <float[1,4,1,1] v, float[4,1,3,3] w> {{ t = Conv(x, v) y = Conv"
    strides = "<strides=[9,9]>(t, w) }"
    assert_skipped(f"{text}(t, w) }}", MERGE, "merged it would take 7056 MACs instead of 2088")
    reason = "merged it would take 144 new parameters and free only 40"
    assert_skipped(f"{text}{strides}", MERGE, reason)


def test_what_a_chain_of_three_comes_to() -> None:
    text = """
    conv (float[N,8,9,9] x) => (float[] y)
    <float[16,8,1,1] u, float[32,16,3,3] v, float[4,32,1,1] w>
    { s = Conv(x, u)  t = Conv(s, v)  y = Conv(t, w) }
    """
    outcome = merged(text, sites=2)
    assert [tensor.dims for tensor in outcome.proto.graph.initializer] == [[4, 8, 3, 3]]


def test_what_is_refused_at_first_may_merge_later() -> None:
    text = """
    conv (float[N,8,9,9] x) => (float[] y)
    <float[2,8,1,1] u, float[8,2,1,1] v, float[2,8,1,1] w>
    { s = Conv(x, u)  t = Conv(s, v)  y = Conv(t, w) }
    """
    outcome = merged(text, sites=2)
    assert outcome.reasons == {}
    assert [tensor.dims for tensor in outcome.proto.graph.initializer] == [[2, 8, 1, 1]]


def test_a_size_that_is_not_known() -> None:
    text = "conv (float[N,4,9,9] x, int64[4] shape) => (float[N,6,9,9] y)"
    text += "<float[8,4,1,1] v, float[6,8,1,1] w>"
    text += "{ r = Reshape(x, shape)  t = Conv(r, v)  y = Conv(t, w) }"
    reason = "its MACs are not known; give the input's shape with --shape"
    assert_skipped(text, MERGE, reason)


def test_channels_left_open_matter_only_where_there_is_something_to_merge() -> None:
    text = "conv (float[N,C,H,W] x) => (float[] y) <float[8,4,1,1] v, float[6,8,1,1] w>"
    alone = parse("conv (float[N,C,H,W] x) => (float[] y) <float[8,4,1,1] v> { y = Conv(x, v) }")
    assert apply(alone, MERGE).events == []
    model = parse(f"{text} {{ t = Conv(x, v)  y = Conv(t, w) }}")
    with pytest.raises(ModelError, match="leaves its channels open"):
        list(MERGE.apply(model, Context()))
    assert apply(model, MERGE, shapes={"x": (1, 4, 9, 9)}).rewrote == ["y"]


# -- beside the bottleneck pass ---------------------------------------------------------------


@pytest.mark.parametrize("sides", ["input", "output", "both"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_bottleneck_stays(sides: Any, stride: int) -> None:
    text = f"""
    conv (float[N,64,16,16] x) => (float[] y) <float[64,64,3,3] w, float[64] b>
    {{ y = Conv<pads=[1,1,1,1], strides=[{stride},{stride}]>(x, w, b) }}
    """
    split = apply(parse(text), Bottleneck(rank=16, sides=sides))
    assert split.rewrote == ["y"]
    outcome = apply(split.model, MERGE)
    assert outcome.rewrote == []
    assert len(outcome.events) == (2 if sides == "both" else 1)


def test_a_bottleneck_merges_with_a_pointwise_beside_it() -> None:
    text = """
    conv (float[N,32,16,16] x) => (float[] y)
    <float[64,32,1,1] v, float[64,64,3,3] w, float[64] b>
    { t = Conv(x, v)  y = Conv<pads=[1,1,1,1]>(t, w, b) }
    """
    split = apply(parse(text), Bottleneck(rank=16, sides="input")).model
    outcome = merged(split)
    assert [node.op_type for node in outcome.proto.graph.node] == ["Conv", "Conv"]
    assert values(outcome.proto)[outcome.proto.graph.node[0].input[1]].shape == (16, 32, 1, 1)
    assert outcome.proto.graph.node[1] == split.to_proto().graph.node[2]


# -- the judge --------------------------------------------------------------------------------


class Counting:
    """Refuses what writes a tensor of the given names, or everything; counts how often asked."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.asked: list[str] = []

    def __call__(self, model: Model, edit: Edit, *, free: bool) -> Judgement:
        written = edit.new[-1].outputs[0].name
        self.asked.append(written)
        model.check()
        return Judgement(
            bool(self.refused) and written not in self.refused, "slower", {"ratio": 0.9}
        )


CHAIN = """
conv (float[N,8,9,9] x) => (float[] y)
<float[16,8,1,1] u, float[32,16,3,3] v, float[32] a, float[4,32,1,1] w>
{ s = Conv(x, u)  r = Identity(s)  t = Conv(r, v, a)  y = Conv(t, w) }
"""


def test_a_judge_that_refuses_leaves_the_model_as_it_was() -> None:
    model, judge = parse(CHAIN), Counting()
    outcome = apply(model, MERGE, judge=judge)
    assert outcome.reasons == {"t": "slower", "y": "slower"}
    assert [event.data["ratio"] for event in outcome.events] == [0.9, 0.9]
    assert outcome.proto == model.to_proto()
    assert judge.asked == ["t", "y"] * 3  # once each, and `apply` runs the pass three times


def test_after_a_refusal_the_rest_goes_on() -> None:
    model, judge = parse(CHAIN), Counting("t")
    outcome = apply(model, MERGE, judge=judge)
    assert outcome.rewrote == ["y", "y"]
    assert [node.op_type for node in outcome.proto.graph.node] == ["Conv"]
    assert_same_numbers(outcome.model, model)


# -- pretrained networks ----------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize("name", ["resnet56_cifar10", "smallvgg_cifar10", "vgg16_cifar10"])
def test_pretrained_networks_have_nothing_to_merge(name: str) -> None:
    model = Model.load(ASSETS / "models" / f"{name}.onnx")
    assert apply(model, MERGE).rewrote == []


# -- random graphs ----------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Model:
    """Draw two or three linear layers in a row, with things between and readers in the middle."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    rank = draw(st.sampled_from([0, 0, 1, 1, 2, 2, 2, 3]))  # 0: matrices
    side = [draw(st.integers(7, 10)) for _ in range(rank)]
    channels = draw(st.sampled_from([2, 4]))
    shape = [2, channels, *side]
    x, tensor = list(shape), "x"
    nodes: list[NodeProto] = []
    outputs: list[str] = []
    weights: dict[str, Array] = {}
    for i in range(draw(st.integers(2, 3))):
        layer = draw(convs(shape, i) if rank else matrices(shape, i))
        node, shapes, shape = layer
        node.input[0] = tensor
        same = [
            n for n in weights if n.startswith("w") and list(weights[n].shape) == shapes[f"w{i}"]
        ]
        if same and draw(st.booleans()):
            node.input[1] = same[0]
            shapes.pop(f"w{i}")
        for name, dims in shapes.items():
            weights[name] = random_weight(rng, name, dims)
            if name.startswith("b") and draw(st.integers(0, 3)) == 0:
                weights[name] *= 0
        nodes.append(node)
        tensor = node.output[0]
        between = draw(st.sampled_from([None] * 6 + ["Identity", "Dropout", "Relu"]))
        if between:
            nodes.append(helper.make_node(between, [tensor], [f"{tensor}.{between}"]))
            reader_of = draw(st.sampled_from([tensor, f"{tensor}.{between}"]))
            tensor = f"{tensor}.{between}"
        else:
            reader_of = tensor
        reader = draw(st.sampled_from([None] * 6 + ["output", "Relu", "twin"]))
        if reader == "output":
            outputs.append(reader_of)
        elif reader == "Relu":
            nodes.append(helper.make_node("Relu", [reader_of], [f"{reader_of}.relu"]))
            outputs.append(f"{reader_of}.relu")
        elif reader == "twin":  # reads the same weight and bias
            twin = NodeProto.FromString(node.SerializeToString())
            twin.output[:] = [f"twin{i}"]
            nodes.append(twin)
            outputs.append(f"twin{i}")
    if tensor not in outputs:
        outputs.append(tensor)
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return checked(helper.make_model(graph, opset_imports=opsets, ir_version=8))


Layer = tuple[NodeProto, dict[str, list[int]], list[int]]
"""The node, shapes of its constants, the shape of its output."""


@st.composite
def convs(draw: st.DrawFn, shape: list[int], i: int) -> Layer:
    channels, side = shape[1], shape[2:]
    group = draw(st.sampled_from([1, 1, 1, 2 - channels % 2, channels]))
    wide = draw(st.sampled_from([group, 2 * group, 8 * group, 24])) // group * group
    pointwise = draw(st.booleans())
    kernel, strides, dilations, front, behind = [], [], [], [], []
    mode = draw(st.sampled_from(["NOTSET"] * 4 + ["SAME_UPPER", "SAME_LOWER", "VALID"]))
    for n in side:
        k = 1 if pointwise else draw(st.sampled_from([1, 2, 3]))
        d = 1 if mode.startswith("SAME") else draw(st.sampled_from([1, 1, 2]))
        a, b = (draw(st.sampled_from([0, 0, 0, 1, 2])) if mode == "NOTSET" else 0 for _ in "ab")
        if not mode.startswith("SAME") and d * (k - 1) >= n + a + b:
            k = 1
        kernel.append(k)
        strides.append(draw(st.sampled_from([1, 1, 1, 2, 3, 4])))
        dilations.append(d)
        front.append(a)
        behind.append(b)
    attrs: dict[str, Any] = {"group": group, "auto_pad": mode}
    if draw(st.booleans()):
        attrs["kernel_shape"] = kernel
    if mode == "NOTSET" and (any(front + behind) or draw(st.booleans())):
        attrs["pads"] = front + behind
    attrs |= {"strides": strides, "dilations": dilations}
    shapes = {f"w{i}": [wide, channels // group, *kernel]}
    if draw(st.booleans()):
        shapes[f"b{i}"] = [wide]
    out = [
        -(-n // s) if mode.startswith("SAME") else (n + a + b - d * (k - 1) - 1) // s + 1
        for n, k, s, d, a, b in zip(side, kernel, strides, dilations, front, behind, strict=True)
    ]
    node = helper.make_node("Conv", ["", *shapes], [f"t{i}"], **attrs)
    return node, shapes, [shape[0], wide, *out]


@st.composite
def matrices(draw: st.DrawFn, shape: list[int], i: int) -> Layer:
    wide = draw(st.sampled_from([2, 3, 8]))
    if draw(st.booleans()):
        shapes = {f"w{i}": [shape[1], wide]}
        return helper.make_node("MatMul", ["", *shapes], [f"t{i}"]), shapes, [shape[0], wide]
    a = draw(st.sampled_from([False, False, False, True]))
    b = draw(st.booleans())
    rows, columns = shape[::-1] if a else shape
    shapes = {f"w{i}": [wide, columns] if b else [columns, wide]}
    bias = draw(st.sampled_from([[], [1], [wide], [1, wide], [rows, 1], [rows, wide], None]))
    if bias is not None:
        shapes[f"b{i}"] = bias
    factors = {name: draw(st.sampled_from([1.0, 0.5])) for name in ("alpha", "beta")}
    inputs = ["", *shapes]
    node = helper.make_node("Gemm", inputs, [f"t{i}"], transA=int(a), transB=int(b), **factors)
    return node, shapes, [rows, wide]


@settings(max_examples=RANDOM_GRAPHS)
@given(model=graphs())
def test_random_graphs(model: Model) -> None:
    before = model.to_proto().SerializeToString(deterministic=True)
    outcome = apply(model, MERGE)
    feeds = random_feeds(model)
    assert_close(run(outcome.model, feeds), run(model, feeds))
    if outcome.rewrote:
        assert size(outcome.model).macs < size(model).macs
        assert size(outcome.model).params < size(model).params
        refused = apply(model, MERGE, judge=Counting())
        assert refused.proto.SerializeToString(deterministic=True) == before
