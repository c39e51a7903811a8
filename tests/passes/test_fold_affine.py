"""fold-affine: what is folded, how exactly, and what is left alone for which reason."""

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

from pwopt.editing import Edit
from pwopt.model import Model
from pwopt.passes.fold_affine import FoldAffine
from pwopt.rewriting import Context, Judgement

Array = npt.NDArray[Any]

FOLD = FoldAffine()


HEADER = "conv (float[N,4,7,7] x) => (float[N,6,5,5] y)"

BN = "BatchNormalization(t, gamma, beta, mean, var)"

PARAMETERS = "float[6] gamma, float[6] beta, float[6] mean, float[6] var"

FOLDED = f"""
{HEADER}
<float[6,4,3,3] w, float[6] t.bias>
{{ y = Conv(x, w, t.bias) }}
"""

SCALED = f"""
{HEADER}
<float[6,4,3,3] w>
{{ y = Conv(x, w) }}
"""


def folded(model: Model, *, rtol: float = 1e-4) -> Outcome:
    """Apply the pass; assert that it folded something and that the numbers stay."""
    outcome = apply(model, FOLD)
    assert outcome.rewrote
    assert_same_numbers(outcome.model, model, rtol)
    return outcome


# -- behind a Conv ----------------------------------------------------------------------------


def test_batch_normalization_with_a_bias() -> None:
    before = f"""
    {HEADER}
    <float[6,4,3,3] w, float[6] b, float[6] gamma, float[6] beta, float[6] mean, float[6] var>
    {{
      t = Conv<strides=[1,1]>(x, w, b)
      y = BatchNormalization<epsilon=0.01>(t, gamma, beta, mean, var)
    }}
    """
    after = f"""
    {HEADER}
    <float[6,4,3,3] w, float[6] b>
    {{ y = Conv<strides=[1,1]>(x, w, b) }}
    """
    outcome = assert_pass(before, FOLD, after)
    assert [(e.where, e.reason) for e in outcome.events] == [("y", "BatchNormalization folded")]


def test_batch_normalization_without_a_bias() -> None:
    before = f"""
    {HEADER}
    <float[6,4,3,3] w, float[6] gamma, float[6] beta, float[6] mean, float[6] var>
    {{ t = Conv(x, w)  y = BatchNormalization(t, gamma, beta, mean, var) }}
    """
    assert_pass(before, FOLD, FOLDED)


def test_an_empty_bias_is_none() -> None:
    before = parse(
        f"{HEADER} <float[6,4,3,3] w, float[6,1,1] s> {{ t = Conv(x, w) y = Add(t, s) }}"
    )
    before.proto.graph.node[0].input.append("")
    assert folded(before).proto.graph.node[0].input == ["x", "w", "t.bias"]


@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("shape", ["", "1", "1,1", "6,1,1", "1,6,1,1", "1,1,1", "1,1,1,1"])
@pytest.mark.parametrize("operands", ["t, s", "s, t"])
def test_arithmetic_along_the_channels(op: str, shape: str, operands: str) -> None:
    operand = f"float[{shape}]" if shape else "float"
    before = f"""
    {HEADER}
    <float[6,4,3,3] w, {operand} s>
    {{ t = Conv(x, w)  y = {op}({operands}) }}
    """
    if (op, operands) == ("Div", "s, t"):
        assert_skipped(before, FOLD, "Div divides by what is not constant")
        return
    assert_pass(before, FOLD, SCALED if op in ("Mul", "Div") else FOLDED)


@pytest.mark.parametrize("op", ["Mul", "Add"])
@pytest.mark.parametrize(
    "shape", ["5", "5,1", "1,5", "5,5", "6,1,5", "6,5,1", "6,5,5", "1,1,5", "1,6,5,5", "3,6,1,1"]
)
def test_what_varies_along_other_axes_stays(op: str, shape: str) -> None:
    text = f"conv (float[3,4,7,7] x) => (float[3,6,5,5] y) <float[6,4,3,3] w, float[{shape}] s>"
    reason = f"the operand of {op} varies along more than the channels"
    assert_skipped(text + f"{{ t = Conv(x, w) y = {op}(t, s) }}", FOLD, reason)


@pytest.mark.parametrize("shape", ["6", "1,6", "6,1", "1,1,6", "1,1,1,6", "1,1,6,1", "6,6"])
def test_width_is_not_taken_for_channels(shape: str) -> None:
    text = f"conv (float[N,4,8,8] x) => (float[N,6,6,6] y) <float[6,4,3,3] w, float[{shape}] s>"
    reason = "the operand of Add varies along more than the channels"
    assert_skipped(text + "{ t = Conv(x, w) y = Add(t, s) }", FOLD, reason)


@pytest.mark.parametrize(("channels", "shape"), [(1, "6,1,1"), (1, "2,1,1,1"), (6, "1,1,6,1,1")])
def test_what_broadcasts_the_output_stays(channels: int, shape: str) -> None:
    text = f"conv (float[N,4,7,7] x) => (float[] y) <float[{channels},4,3,3] w, float[{shape}] s>"
    reason = "the operand of Mul varies along more than the channels"
    assert_skipped(text + "{ t = Conv(x, w) y = Mul(t, s) }", FOLD, reason)


def test_a_chain_folds_into_one_layer() -> None:
    before = f"""
    {HEADER}
    <float[6,4,3,3] w, float[6] b, float[6,1,1] p, float[1,6,1,1] q,
     float[6] gamma, float[6] beta, float[6] mean, float[6] var>
    {{
      t = Conv(x, w, b)
      u = Mul(p, t)
      v = Add(u, q)
      y = BatchNormalization(v, gamma, beta, mean, var)
    }}
    """
    after = f"{HEADER} <float[6,4,3,3] w, float[6] b> {{ y = Conv(x, w, b) }}"
    outcome = assert_pass(before, FOLD, after)
    assert [e.data["op"] for e in outcome.events] == ["Mul", "Add", "BatchNormalization"]


def test_a_chain_folds_up_to_what_somebody_else_reads() -> None:
    before = """
    conv (float[N,4,7,7] x) => (float[N,6,5,5] y, float[N,6,5,5] u)
    <float[6,4,3,3] w, float[6] b, float[6,1,1] p, float[6,1,1] q>
    {
      t = Conv(x, w, b)
      u = Mul(t, p)
      y = Add(u, q)
    }
    """
    after = """
    conv (float[N,4,7,7] x) => (float[N,6,5,5] y, float[N,6,5,5] u)
    <float[6,4,3,3] w, float[6] b, float[6,1,1] q>
    {
      u = Conv(x, w, b)
      y = Add(u, q)
    }
    """
    outcome = assert_pass(before, FOLD, after)
    assert outcome.reasons == {"y": "the Conv's output is read elsewhere too"}


@pytest.mark.parametrize(("dims", "kernel"), [("9", "3"), ("5,6,4", "3,3,2")])
def test_one_and_three_dimensions(dims: str, kernel: str) -> None:
    ones = ",".join("1" for _ in dims.split(","))
    text = f"""
    conv (float[N,4,{dims}] x) => (float[] y)
    <float[6,4,{kernel}] w, float[6,{ones}] s, float[6] gamma, float[6] beta, float[6] mean,
     float[6] var>
    {{
      t = Conv(x, w)
      u = Add(t, s)
      y = BatchNormalization(u, gamma, beta, mean, var)
    }}
    """
    assert len(folded(parse(text)).rewrote) == 2


@pytest.mark.parametrize("group", [2, 4])
def test_grouped_and_depthwise(group: int) -> None:
    text = f"""
    conv (float[N,4,7,7] x) => (float[N,8,5,5] y)
    <float[8,{4 // group},3,3] w, float[8,1,1] s>
    {{ t = Conv<group={group}>(x, w)  y = Mul(t, s) }}
    """
    folded(parse(text))


def test_padding_is_unharmed() -> None:
    text = """
    conv (float[N,4,7,7] x) => (float[] y)
    <float[6,4,3,3] w, float[6] b, float[6,1,1] s, float[6,1,1] a>
    { t = Conv<pads=[2,1,0,1], strides=[2,1]>(x, w, b)  u = Mul(t, s)  y = Add(u, a) }
    """
    folded(parse(text))


@pytest.mark.parametrize(("kind", "rtol"), [("float16", 1e-2), ("double", 1e-12)])
def test_other_types(kind: str, rtol: float) -> None:
    text = f"""
    {HEADER}
    <float[6,4,3,3] w, float[6] b, float[6] gamma, float[6] beta, float[6] mean, float[6] var>
    {{ t = Conv(x, w, b)  y = BatchNormalization(t, gamma, beta, mean, var) }}
    """
    outcome = folded(parse(text.replace("float[", f"{kind}[")), rtol=rtol)
    assert {v.dtype.name for v in values(outcome.proto).values()} == {
        kind.replace("double", "float64")
    }


def test_float16_with_statistics_in_float32() -> None:
    text = """
    conv (float16[N,4,7,7] x) => (float16[N,6,5,5] y)
    <float16[6,4,3,3] w, float[6] gamma, float[6] beta, float[6] mean, float[6] var>
    { t = Conv(x, w)  y = BatchNormalization(t, gamma, beta, mean, var) }
    """
    outcome = apply(parse(text), FOLD)
    assert outcome.rewrote == ["y"]
    assert {v.dtype for v in values(outcome.proto).values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("opset", [7, 9, 13, 21])
def test_opsets(opset: int) -> None:
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
    {HEADER}
    <float[6,4,3,3] w, float[6,1,1] s, float[6] gamma, float[6] beta, float[6] mean, float[6] var>
    {{ t = Conv(x, w)  u = Mul(t, s)  y = BatchNormalization(u, gamma, beta, mean, var) }}
    """
    assert len(folded(parse(text)).rewrote) == 2


OPSET_6 = f"""<ir_version: 3, opset_import: ["" : 6]>
{HEADER}
<float[6,4,3,3] w, float[6] gamma, float[6] beta, float[6] mean, float[6] var>
{{ t = Conv(x, w)  y = BatchNormalization<is_test=1>(t, gamma, beta, mean, var) }}
"""


def listed(text: str) -> Model:
    """Parse a model of IR 3, where initialisers are inputs too."""
    proto = parse(text.replace("ir_version: 3", "ir_version: 4")).proto
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    return checked(proto)


def test_ir_3_lists_initializers_as_inputs() -> None:
    graph = apply(listed(OPSET_6), FOLD).proto.graph
    assert [node.op_type for node in graph.node] == ["Conv"]
    assert {i.name for i in graph.input} == {"x", "w", "t.bias"}
    assert {t.name for t in graph.initializer} == {"w", "t.bias"}


def test_opset_6_means_the_same() -> None:
    model = listed(OPSET_6)
    later = parse(OPSET_6[OPSET_6.index("conv") :].replace("<is_test=1>", ""))
    after = apply(model, FOLD).proto
    after.opset_import[0].version = 17  # onnxruntime starts at 7; Conv has not changed since
    after.ir_version = 8
    assert_same_numbers(after, later)


def test_before_opset_7_training_is_the_default() -> None:
    model = listed(OPSET_6.replace("<is_test=1>", ""))
    assert_skipped(model, FOLD, "BatchNormalization is in training mode")


def test_before_opset_7_arithmetic_stays() -> None:
    text = f"""<ir_version: 3, opset_import: ["" : 6]>
    {HEADER} <float[6,4,3,3] w, float[6] s>
    {{ t = Conv(x, w)  y = Mul<broadcast=1, axis=1>(t, s) }}
    """
    assert_skipped(listed(text), FOLD, "before opset 7, operands are broadcast by other rules")


# -- behind a Gemm ----------------------------------------------------------------------------


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [None, "", "1", "6", "1,6", "1,1"])
@pytest.mark.parametrize("op", ["BatchNormalization", "Mul", "Add"])
def test_gemm(trans_a: int, trans_b: int, bias: str | None, op: str) -> None:
    data = "4,3" if trans_a else "3,4"
    weight = "6,4" if trans_b else "4,6"
    c = {None: "", "": ", float c"}.get(bias, f", float[{bias}] c")
    attributes = f"alpha=0.5, beta=1.5, transA={trans_a}, transB={trans_b}"
    operands = "gamma, beta, mean, var" if op == "BatchNormalization" else "s"
    extra = ", ".join(f"float[6] {name}" for name in operands.split(", "))
    text = f"""
    gemm (float[{data}] x) => (float[3,6] y)
    <float[{weight}] w{c}, {extra}>
    {{
      t = Gemm<{attributes}>(x, w{", c" if c else ""})
      y = {op}(t, {operands})
    }}
    """
    outcome = folded(parse(text))
    (node,) = outcome.proto.graph.node
    assert {a.name for a in node.attribute} == {"alpha", "transA", "transB"}
    assert [values(outcome.proto)[name].shape for name in node.input[2:]] in ([], [(6,)])


@pytest.mark.parametrize("shape", ["3,6", "3,1"])
def test_a_gemm_whose_bias_differs_from_row_to_row_stays(shape: str) -> None:
    text = f"""
    gemm (float[3,4] x) => (float[3,6] y) <float[4,6] w, float[{shape}] c, float[6] s>
    {{ t = Gemm(x, w, c)  y = Mul(t, s) }}
    """
    assert_skipped(text, FOLD, "the Gemm's bias differs from row to row")


@pytest.mark.parametrize("shape", ["6,1", "6,6", "1,6,1", "1,1,6"])
def test_rows_are_not_taken_for_channels(shape: str) -> None:
    text = f"gemm (float[6,4] x) => (float[] y) <float[4,6] w, float[{shape}] s>"
    reason = "the operand of Add varies along more than the channels"
    assert_skipped(text + "{ t = Gemm(x, w) y = Add(t, s) }", FOLD, reason)


def test_a_gemm_that_reads_one_tensor_twice() -> None:
    text = """
    gemm (float[N,1] x) => (float[N,6] y) <float[1,6] w, float[6] s>
    { t = Gemm(x, w, w)  y = Mul(t, s) }
    """
    folded(parse(text))


# -- behind a ConvTranspose -------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("bias", ["", "b"])
@pytest.mark.parametrize(
    "attributes", ["pads=[1,0,0,1]", "output_padding=[1,0]", "dilations=[2,1]"]
)
def test_conv_transpose(group: int, bias: str, attributes: str) -> None:
    text = f"""
    deconv (float[N,6,5,5] x) => (float[] y)
    <float[6,{12 // group},3,3] w, float[12] b, float[12,1,1] s, float[12] gamma, float[12] beta,
     float[12] mean, float[12] var>
    {{
      t = ConvTranspose<group={group}, strides=[2,2], {attributes}>(x, w, {bias})
      u = Div(t, s)
      y = BatchNormalization(u, gamma, beta, mean, var)
    }}
    """
    if not bias:
        text = text.replace(", )", ")").replace("float[12] b, ", "")
    outcome = folded(parse(text))
    assert [node.op_type for node in outcome.proto.graph.node] == ["ConvTranspose"]


# -- behind a MatMul --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["N,4", "N,3,4", "2,N,3,4"])
def test_a_scale_folds_into_a_matmul(shape: str) -> None:
    before = f"""
    m (float[{shape}] x) => (float[] y) <float[4,6] w, float[6] s>
    {{ t = MatMul(x, w)  y = Mul(s, t) }}
    """
    after = f"m (float[{shape}] x) => (float[] y) <float[4,6] w> {{ y = MatMul(x, w) }}"
    assert_pass(before, FOLD, after)


@pytest.mark.parametrize("op", ["Add(t, s)", "Sub(t, s)", "Sub(s, t)", "Add(t, x)"])
def test_a_shift_is_a_matmuls_bias_already(op: str) -> None:
    text = "m (float[N,6] x) => (float[] y) <float[6,6] w, float[6] s>"
    text = text if "s" in op else text.replace(", float[6] s", "")
    assert apply(parse(f"{text} {{ t = MatMul(x, w)  y = {op} }}"), FOLD).events == []


@pytest.mark.parametrize("last", ["Mul(u, s)", "Add(s, u)", "Sub(s, u)", "Div(u, s)"])
@pytest.mark.parametrize("first", ["Add(t, b)", "Sub(t, b)", "Sub(b, t)"])
def test_a_matmul_with_a_bias(first: str, last: str) -> None:
    before = f"""
    m (float[N,3,4] x) => (float[] y) <float[4,6] w, float[1,6] b, float[6] s>
    {{ t = MatMul(x, w)  u = {first}  y = {last} }}
    """
    after = """
    m (float[N,3,4] x) => (float[] y) <float[4,6] w, float[6] b>
    { y.product = MatMul(x, w)  y = Add(y.product, b) }
    """
    assert_pass(before, FOLD, after)


def test_batch_normalization_behind_a_matmul() -> None:
    before = f"""
    m (float[N,4] x) => (float[] y) <float[4,6] w, {PARAMETERS}>
    {{ t = MatMul(x, w)  y = {BN} }}
    """
    after = """
    m (float[N,4] x) => (float[] y) <float[4,6] w, float[6] t.bias>
    { y.product = MatMul(x, w)  y = Add(y.product, t.bias) }
    """
    assert_pass(before, FOLD, after)


def test_a_chain_behind_a_matmul() -> None:
    outcome = folded(
        parse(f"""
        m (float[N,4] x) => (float[] y)
        <float[4,6] w, float[6] a, float[6] b, float[1,1] c, {PARAMETERS}>
        {{
          r = MatMul(x, w)
          s = Mul(r, a)
          i = Identity(s)
          v = Add(b, i)
          t = Mul(v, c)
          y = {BN}
        }}
        """)
    )
    assert outcome.rewrote == ["s", "t", "y"]
    assert [node.op_type for node in outcome.proto.graph.node] == ["MatMul", "Add"]


@pytest.mark.parametrize(
    ("declared", "nodes", "reason"),
    [
        (
            "float[N,6,4] x) => (float[] y) <float[4,6] w",
            f"t = MatMul(x, w)  y = {BN}",
            "BatchNormalization normalises another axis",
        ),
        (
            "float[N,4] x) => (float[] y) <float[4,6] w, float[1,1,6] s",
            "t = MatMul(x, w)  y = Mul(t, s)",
            "the operand of Mul varies along more than the channels",
        ),
        (
            "float[6,4] x) => (float[] y) <float[4,6] w, float[6,1] s",
            "t = MatMul(x, w)  y = Mul(t, s)",
            "the operand of Mul varies along more than the channels",
        ),
        (
            "float[6,4] x) => (float[] y) <float[4,6] w, float[6,1] b, float[6] s",
            "t = MatMul(x, w)  u = Add(t, b)  y = Mul(u, s)",
            "the operand of Add varies along more than the channels",
        ),
        (
            "float[N,4] x, float[N,6] r) => (float[] y) <float[4,6] w, float[6] s",
            "t = MatMul(x, w)  u = Add(t, r)  y = Mul(u, s)",
            "the other operand of Add is not a constant",
        ),
        (
            "float[4,6] x) => (float[] y) <float[4,4] w, float[6] s",
            "t = MatMul(w, x)  y = Mul(t, s)",
            "the MatMul's weight is not a constant",
        ),
        (
            "float[2,3,4] x) => (float[] y) <float[2,4,6] w, float[6] s",
            "t = MatMul(x, w)  y = Mul(t, s)",
            "the MatMul's weight is not a matrix",
        ),
        (
            "float[N,4] x) => (float[] y) <float[4] w, float s",
            "t = MatMul(x, w)  y = Mul(t, s)",
            "the MatMul's weight is not a matrix",
        ),
        (
            "float[N,4] x) => (float[] y, float[] t) <float[4,6] w, float[6] b, float[6] s",
            "t = MatMul(x, w)  u = Add(t, b)  y = Mul(u, s)",
            "the MatMul's output is read elsewhere too",
        ),
    ],
)
def test_matmuls_that_stay(declared: str, nodes: str, reason: str) -> None:
    parameters = f", {PARAMETERS}" if BN in nodes else ""
    assert_skipped(f"m ({declared}{parameters}> {{ {nodes} }}", FOLD, reason)


# -- past Identity and Dropout ----------------------------------------------------------------


def test_identity_and_dropout() -> None:
    before = f"""
    {HEADER} <float[6,4,3,3] w, float[6] b, float[6,1,1] s, float r = {{0.5}}, bool no = {{0}}>
    {{
      t = Conv(x, w, b)
      u = Identity(t)
      v = Dropout(u, r, no)
      z = Dropout(v)
      y = Mul(z, s)
    }}
    """
    assert_pass(before, FOLD, f"{HEADER} <float[6,4,3,3] w, float[6] b> {{ y = Conv(x, w, b) }}")


def test_dropout_in_training() -> None:
    text = f"""
    {HEADER} <float[6,4,3,3] w, float r = {{0.5}}, bool yes = {{1}}, {PARAMETERS}>
    {{ s = Conv(x, w)  t = Dropout(s, r, yes)  y = {BN} }}
    """
    assert_skipped(text, FOLD, "reads Dropout, not a layer with a weight")


def test_dropout_that_may_be_in_training() -> None:
    text = f"""
    conv (float[N,4,7,7] x, bool c) => (float[N,6,5,5] y)
    <float[6,4,3,3] w, float r = {{0.5}}, {PARAMETERS}>
    {{ s = Conv(x, w)  t = Dropout(s, r, c)  y = {BN} }}
    """
    assert_skipped(text, FOLD, "reads Dropout, not a layer with a weight")


@pytest.mark.parametrize(("attributes", "folds"), [("<is_test=1>", True), ("", False)])
def test_before_opset_7_dropout_trains_unless_told(attributes: str, folds: bool) -> None:
    text = OPSET_6.replace(
        "y = BatchNormalization<is_test=1>(t", f"u = Dropout{attributes}(t)  y = BN(u"
    ).replace("BN(", "BatchNormalization<is_test=1>(")
    assert bool(apply(listed(text), FOLD).rewrote) == folds


def test_a_mask_that_is_read() -> None:
    text = f"""
    conv (float[N,4,7,7] x) => (float[N,6,5,5] y, bool[] m) <float[6,4,3,3] w, {PARAMETERS}>
    {{ s = Conv(x, w)  t, m = Dropout(s)  y = {BN} }}
    """
    assert_skipped(text, FOLD, "reads Dropout, not a layer with a weight")


def test_an_output_behind_the_identity() -> None:
    text = """
    conv (float[N,4,7,7] x) => (float[N,6,5,5] y, float[N,6,5,5] u)
    <float[6,4,3,3] w, float[6,1,1] s> { t = Conv(x, w)  u = Identity(t)  y = Mul(u, s) }
    """
    assert_skipped(text, FOLD, "the Conv's output is read elsewhere too")


# -- constants as exporters leave them --------------------------------------------------------


@pytest.mark.parametrize(
    "nodes",
    [
        "s = Identity(p)",
        "a = Constant<value_ints = [1, 2]>()  s = Unsqueeze(q, a)",
        "a = Constant<value_ints = [-1, 1, 1]>()  s = Reshape(q, a)",
        "a = Constant<value_ints = [1, 6, 1, 1]>()  s = Expand(p, a)",
        "a = Constant<value_ints = [6, 1, 1]>()  b = Identity(one)  s = Expand(b, a)",
        "b = Constant<value_float = 2.5>()  s = Identity(b)",
        "b = Constant<value_floats = [2.5]>()  s = Squeeze(b)",
        "b = Constant<value_int = 3>()  s = CastLike(b, t)",
        "b = Constant<value_int = 3>()  s = Cast<to = 1>(b)",
        "a = Transpose<perm = [1, 0, 2]>(r)  s = Identity(a)",
    ],
)
@pytest.mark.parametrize("op", ["Mul", "Sub"])
def test_computed_constants(nodes: str, op: str) -> None:
    text = f"""
    {HEADER} <float[6,4,3,3] w, float[6] c, float[6,1,1] p, float[6] q, float[1,6,1] r,
     float one>
    {{ t = Conv(x, w, c)  {nodes}  y = {op}(t, s) }}
    """
    outcome = folded(parse(text))
    assert [node.op_type for node in outcome.proto.graph.node] == ["Conv"]


def test_computed_weights() -> None:
    text = """
    m (float[N,4] x) => (float[] y) <float[6,4] w, float[6] b, float[6] s>
    {
      v = Transpose(w)
      c = Identity(b)
      t = Gemm(x, v, c)
      y = Mul(t, s)
    }
    """
    (node,) = folded(parse(text)).proto.graph.node
    assert node.op_type == "Gemm"


def test_what_a_constant_is_not_computed_from() -> None:
    text = f"""
    {HEADER} <float[6,4,3,3] w, float[6,1,1] s>
    {{ t = Conv(x, w)  u = Exp(s)  y = Mul(t, u) }}
    """
    assert_skipped(text, FOLD, "the other operand of Mul is not a constant")


# -- weights in all places --------------------------------------------------------------------

SHARED = """
shared (float[N,4,7,7] x) => (float[N,6,5,5] y, float[N,6,5,5] z)
<float[6,4,3,3] w, float[6] b, float[6,1,1] s>
{
  t = Conv(x, w, b)
  y = Mul(t, s)
  z = Conv(x, w, b)
}
"""


def test_a_shared_weight_is_copied_first() -> None:
    after = """
    shared (float[N,4,7,7] x) => (float[N,6,5,5] y, float[N,6,5,5] z)
    <float[6,4,3,3] w, float[6] b, float[6,4,3,3] t.weight, float[6] t.bias>
    {
      y = Conv(x, t.weight, t.bias)
      z = Conv(x, w, b)
    }
    """
    assert_pass(SHARED, FOLD, after)


def test_a_weight_that_is_an_output_is_copied_first() -> None:
    text = """
    conv (float[N,4,7,7] x) => (float[N,6,5,5] y, float[6,4,3,3] w)
    <float[6,4,3,3] w, float[6,1,1] s>
    { t = Conv(x, w)  y = Mul(t, s) }
    """
    folded(parse(text))


def test_names_that_are_taken_stay_with_their_owner() -> None:
    model = parse(SHARED.replace("z", "t.weight"))
    model.proto.graph.initializer.append(numpy_helper.from_array(np.arange(3.0), "t.bias"))
    after = folded(model).proto
    assert after.graph.node[0].input == ["x", "t.weight_2", "t.bias_2"]
    assert model.proto.graph.initializer[-1] in after.graph.initializer


def test_constant_nodes() -> None:
    text = """
    conv (float[N,1,4,4] x) => (float[N,2,4,4] y, float[2,1,1] again, float[2] b)
    {
      w = Constant<value = float[2,1,1,1] {2, 3}>()
      b = Constant<value = float[2] {5, 7}>()
      p = Constant<value = float[2,1,1] {11, 13}>()
      q = Constant<value = float {17}>()
      t = Conv(x, w, b)
      u = Mul(t, p)
      y = Add(u, q)
      again = Identity(p)
    }
    """
    after = folded(parse(text)).proto
    ops = [node.op_type for node in after.graph.node]
    assert ops == ["Constant", "Constant", "Conv", "Identity"]
    weight, bias = (values(after)[name] for name in after.graph.node[2].input[1:])
    assert weight.ravel().tolist() == [22, 39]
    assert bias.tolist() == [5 * 11 + 17, 7 * 13 + 17]


def test_layers_that_share_a_weight_go_on_sharing() -> None:
    before = """
    shared (float[N,4,7,7] x) => (float[] y, float[] z, float[] a)
    <float[6,4,3,3] w, float[6,1,1] s, float[6,1,1] r>
    {
      t = Conv(x, w)
      u = Conv<strides=[2,2]>(x, w)
      v = Conv(x, w)
      y = Mul(t, s)
      z = Mul(u, s)
      a = Mul(v, r)
    }
    """
    after = """
    shared (float[N,4,7,7] x) => (float[] y, float[] z, float[] a)
    <float[6,4,3,3] t.weight, float[6,4,3,3] w>
    {
      y = Conv(x, t.weight)
      z = Conv<strides=[2,2]>(x, t.weight)
      a = Conv(x, w)
    }
    """
    assert_pass(before, FOLD, after)


def test_a_shift_leaves_the_weight_alone() -> None:
    text = f"{HEADER} <float[6,4,3,3] w, float[6,1,1] s> {{ t = Conv(x, w) y = Sub(t, s) }}"
    model = parse(text)
    after = folded(model).proto
    assert after.graph.initializer[0] == model.proto.graph.initializer[0]


def test_what_the_judge_refuses_stays() -> None:
    def refuse(model: Model, edit: Edit, *, free: bool) -> Judgement:
        assert len(model.graph.nodes) == 2
        return Judgement(False, "does not pay", {"ratio": 0.9})

    outcome = apply(parse(SHARED), FOLD, judge=refuse)
    (event,) = outcome.events
    assert (event.kind, event.reason) == ("skipped", "does not pay")
    assert event.data == {"op": "Mul", "ratio": 0.9}


# -- what is left alone -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"{HEADER} <float[6,4,3,3] w, float[6,4,3,3] v>"
            "{ t = Conv(x, w)  u = Conv(x, v)  y = Add(t, u) }",
            "the other operand of Add is not a constant",
        ),
        (
            f"{HEADER} <float[6,4,3,3] w> {{ t = Conv(x, w)  y = Add(t, t) }}",
            "the Conv's output is read elsewhere too",
        ),
        (
            "conv (float[N,4,7,7] x, float[6,4,3,3] w) => (float[N,6,5,5] y) <float[6,1,1] s>"
            "{ t = Conv(x, w)  y = Mul(t, s) }",
            "the Conv's weight is not a constant",
        ),
        (
            "conv (float[N,4,7,7] x, float[6] b) => (float[N,6,5,5] y)"
            "<float[6,4,3,3] w, float[6,1,1] s> { t = Conv(x, w, b)  y = Mul(t, s) }",
            "the Conv's bias is not a constant",
        ),
        (
            "conv (float[N,4,7,7] x, float[6] mean) => (float[N,6,5,5] y)"
            "<float[6,4,3,3] w, float[6] gamma, float[6] beta, float[6] var>"
            f"{{ t = Conv(x, w)  y = {BN} }}",
            "BatchNormalization's parameters are not constant",
        ),
        (
            f"conv (float[N,6,7,7] x) => (float[N,6,7,7] y) <{PARAMETERS}>"
            f"{{ t = Relu(x)  y = {BN} }}",
            "reads Relu, not a layer with a weight",
        ),
        (
            f"conv (float[N,6,7,7] t) => (float[N,6,7,7] y) <{PARAMETERS}> {{ y = {BN} }}",
            "reads an input, not a layer with a weight",
        ),
        (
            f"{HEADER} <int8[6,4,3,3] q, float scale, float[6,1,1] s>"
            "{ w = DequantizeLinear(q, scale)  t = Conv(x, w)  y = Mul(t, s) }",
            "the Conv's weight is not a constant",
        ),
        (
            "conv (bfloat16[N,4,7,7] x) => (bfloat16[N,6,5,5] y)"
            "<bfloat16[6,4,3,3] w, bfloat16[6,1,1] s> { t = Conv(x, w)  y = Mul(t, s) }",
            "the Conv's weight is bfloat16",
        ),
    ],
)
def test_skips(text: str, reason: str) -> None:
    if "bfloat16" in text:  # Conv takes it from opset 22 on
        text = f'<ir_version: 10, opset_import: ["" : 22]> {text}'
    assert_skipped(text, FOLD, reason)


def test_training_mode() -> None:
    text = f"""
    {HEADER}
    <float[6,4,3,3] w, {PARAMETERS}>
    {{ t = Conv(x, w)  y, m, v = {BN.replace("(", "<training_mode=1>(")} }}
    """
    assert_skipped(text, FOLD, "BatchNormalization is in training mode")


def test_statistics_given_out() -> None:
    text = f"""<ir_version: 4, opset_import: ["" : 9]>
    {HEADER}
    <float[6,4,3,3] w, {PARAMETERS}>
    {{ t = Conv(x, w)  y, m, v, n, u = {BN} }}
    """
    assert_skipped(text, FOLD, "BatchNormalization gives out its statistics")


def test_statistics_of_every_position() -> None:
    text = f"""<ir_version: 4, opset_import: ["" : 7]>
    {HEADER}
    <float[6,4,3,3] w, {PARAMETERS}>
    {{ t = Conv(x, w)  y = {BN.replace("(", "<spatial=0>(")} }}
    """
    reason = "BatchNormalization normalises every position on its own"
    assert_skipped(text, FOLD, reason)


def test_several_readers() -> None:
    text = """
    conv (float[N,4,7,7] x) => (float[N,6,5,5] y, float[N,6,5,5] z)
    <float[6,4,3,3] w, float[6,1,1] s>
    { t = Conv(x, w)  y = Mul(t, s)  z = Relu(t) }
    """
    assert_skipped(text, FOLD, "the Conv's output is read elsewhere too")


def test_an_output_in_the_middle() -> None:
    text = """
    conv (float[N,4,7,7] x) => (float[N,6,5,5] y, float[N,6,5,5] t)
    <float[6,4,3,3] w, float[6,1,1] s>
    { t = Conv(x, w)  y = Mul(t, s) }
    """
    assert_skipped(text, FOLD, "the Conv's output is read elsewhere too")


def test_a_subgraph_that_reads_the_output() -> None:
    text = """
    conv (float[N,4,7,7] x, bool c) => (float[N,6,5,5] y, float[] z)
    <float[6,4,3,3] w, float[6,1,1] s>
    {
      t = Conv(x, w)
      y = Mul(t, s)
      z = If(c) <
        then_branch = yes () => (float[N,6,5,5] one) { one = Relu(t) },
        else_branch = no () => (float[N,6,5,5] two) { two = Mul(t, s) }
      >
    }
    """
    assert_skipped(text, FOLD, "the Conv's output is read elsewhere too")


@pytest.mark.parametrize("condition", [True, False])
def test_subgraphs_stay_and_see_the_new_output(condition: bool) -> None:
    text = """
    conv (float[N,4,7,7] x, bool c) => (float[] z)
    <float[6,4,3,3] w, float[6,1,1] s>
    {
      t = Conv(x, w)
      y = Mul(t, s)
      z = If(c) <
        then_branch = yes () => (float[N,6,5,5] one) { one = Mul(y, s) },
        else_branch = no () => (float[N,6,5,5] two) { u = Conv(x, w) two = Mul(u, s) }
      >
    }
    """
    model = parse(text)
    outcome = apply(model, FOLD)
    assert outcome.rewrote == ["y"]
    assert outcome.proto.graph.node[-1] == model.proto.graph.node[-1]
    feeds = random_feeds(model) | {"c": np.array(condition)}
    assert_close(run(outcome.model, feeds), run(model, feeds))


@pytest.mark.parametrize("name", ["w", "b", "s"])
def test_constants_that_the_caller_may_override_stay(name: str) -> None:
    text = f"{HEADER} <float[6,4,3,3] w, float[6] b, float[6,1,1] s>"
    model = parse(text + "{ t = Conv(x, w, b)  y = Mul(t, s) }")
    (tensor,) = (t for t in model.proto.graph.initializer if t.name == name)
    info = helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
    model.proto.graph.input.append(info)
    what = {"w": "the Conv's weight", "b": "the Conv's bias", "s": "the other operand of Mul"}
    assert_skipped(model, FOLD, f"{what[name]} is not a constant")


def test_what_float16_cannot_hold_stays() -> None:
    text = """
    conv (float16[N,4,7,7] x) => (float16[N,6,5,5] y) <float16[6,4,3,3] w, float16[6,1,1] s>
    { t = Conv(x, w)  y = Mul(t, s) }
    """
    weights = {"w": np.full((6, 4, 3, 3), 300.0), "s": np.full((6, 1, 1), 300.0)}
    reason = "the folded weight would not be finite in float16"
    assert_skipped(parse(text, weights), FOLD, reason)


@pytest.mark.parametrize(
    ("name", "value"), [("w", np.nan), ("b", np.inf), ("var", -1.0), ("mean", np.nan)]
)
def test_what_is_not_finite_stays(name: str, value: float) -> None:
    text = f"{HEADER} <float[6,4,3,3] w, float[6] b, {PARAMETERS}> {{ t = Conv(x, w, b) y = {BN} }}"
    shape = (6, 4, 3, 3) if name == "w" else (6,)
    reason = "the folded weight would not be finite in float32"
    assert_skipped(parse(text, {name: np.full(shape, value)}), FOLD, reason)


def test_arithmetic_elsewhere_is_no_site() -> None:
    text = "g (float[N,3] x) => (float[N,3] y) <float[3] s> { t = Relu(x) y = Mul(t, s) }"
    assert apply(parse(text), FOLD).events == []


def test_operators_of_another_domain_are_no_sites() -> None:
    model = parse(f"{HEADER} <float[6,4,3,3] w, float[6,1,1] s> {{ t = Conv(x, w) y = Mul(t, s) }}")
    model.proto.graph.node[1].domain = "com.example"
    model.proto.opset_import.add(domain="com.example", version=1)
    assert list(FOLD.apply(model, Context())) == []


def test_the_layer_keeps_its_name_and_others_their_notes() -> None:
    text = f"""
    {HEADER}
    <float[6,4,3,3] w, float[6] b, float[6,1,1] s, float[N,6,5,5] t, float[N,6,5,5] u>
    {{ t = Conv(x, w, b)  u = Mul(t, s)  y = Relu(u) }}
    """
    model = parse(text)
    layer, _, relu = model.proto.graph.node
    layer.name, relu.name = "stem", "act"
    for node in (layer, relu):
        node.doc_string = "a note"
        node.metadata_props.add(key="scope", value="net.0")
    graph = folded(model).proto.graph
    assert [node.name for node in graph.node] == ["stem", "act"]
    assert graph.node[0].doc_string == "a note"
    assert graph.node[0].metadata_props == layer.metadata_props
    assert graph.node[1] == relu
    assert [info.name for info in graph.value_info] == ["u"]


def test_empty_and_repeated_names() -> None:
    model = parse(SHARED)
    for name in ("", "same"):
        for node in model.proto.graph.node:
            node.name = name
        assert apply(model, FOLD).rewrote == ["y"]


# -- pretrained networks ----------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize(
    ("name", "sites"), [("resnet56_cifar10", 0), ("smallvgg_cifar10", 0), ("vgg16_cifar10", 1)]
)
def test_pretrained_networks(name: str, sites: int) -> None:
    model = Model.load(ASSETS / "models" / f"{name}.onnx")
    outcome = apply(model, FOLD)
    assert len(outcome.rewrote) == sites
    assert_same_numbers(outcome.model, model)


# -- random graphs ----------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Model:
    """Draw a layer with a chain of arithmetic behind it, and readers in the middle."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    shapes, layer, shape = draw(st.one_of(convs(), transposed(), gemms(), matmuls()))
    x = shapes.pop("x")
    weights = {name: random_weight(rng, name, dims) for name, dims in shapes.items()}
    nodes, outputs, tensor = [layer], [], "t0"
    operators = ["Mul", "Add", "Sub", "Div", "BatchNormalization", "Identity", "Dropout"]
    for i in range(1, draw(st.integers(1, 3)) + 1):
        op = draw(st.sampled_from(operators))
        if op == "BatchNormalization":
            operands = [f"{name}{i}" for name in ("gamma", "beta", "mean", "var")]
            weights |= {name: random_weight(rng, name, shape[1:2]) for name in operands}
            inputs = [tensor, *operands]
        elif op in ("Identity", "Dropout"):
            inputs = [tensor]
        else:
            name = draw(st.sampled_from([f"s{i}", *(n for n in weights if n.startswith("s"))]))
            if name not in weights:
                last = len(shape) - 1
                along = draw(st.sampled_from([(), (0,), (1,), (1,), (1,), (last,), (last,)]))
                dims = [size if axis in along else 1 for axis, size in enumerate(shape)]
                start = draw(st.integers(0, min(along, default=len(shape))))
                weights[name] = rng.uniform(0.5, 2.0, dims[start:])
            operand = name
            if draw(st.booleans()):
                operand = f"{name}.{i}"
                nodes.append(helper.make_node("Identity", [name], [operand]))
            inputs = draw(st.permutations([tensor, operand]))
        nodes.append(helper.make_node(op, inputs, [f"t{i}"]))
        reader = draw(st.sampled_from([None, None, None, None, "output", "Relu", "twin"]))
        if reader == "output":
            outputs.append(tensor)
        elif reader == "Relu":
            nodes.append(helper.make_node("Relu", [tensor], [f"{tensor}.relu"]))
            outputs.append(f"{tensor}.relu")
        elif reader == "twin":  # reads the same weight and bias
            twin = NodeProto.FromString(layer.SerializeToString())
            twin.output[:] = [f"twin{i}"]
            nodes.append(twin)
            outputs.append(f"twin{i}")
        tensor = f"t{i}"
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in [*outputs, tensor]],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return checked(helper.make_model(graph, opset_imports=opsets, ir_version=8))


Layer = tuple[dict[str, list[int]], NodeProto, list[int]]
"""Shapes of its inputs, the node, the shape of its output."""


@st.composite
def convs(draw: st.DrawFn) -> Layer:
    group, wide = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 4, 6]))
    spatial = draw(st.sampled_from([[4], [4, 6]]))
    shapes = {"x": [2, 4, *spatial], "w": [wide, 4 // group, *[3 for _ in spatial]]}
    if draw(st.booleans()):
        shapes["b"] = [wide]
    inputs = [name for name in ("x", "w", "b") if name in shapes]
    pads = [1] * 2 * len(spatial)
    node = helper.make_node("Conv", inputs, ["t0"], group=group, pads=pads)
    return shapes, node, [2, wide, *spatial]


@st.composite
def transposed(draw: st.DrawFn) -> Layer:
    group, wide = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 4]))
    shapes = {"x": [2, 4, 3, 2], "w": [4, wide // group, 2, 2]}
    if draw(st.booleans()):
        shapes["b"] = [wide]
    inputs = [name for name in ("x", "w", "b") if name in shapes]
    node = helper.make_node("ConvTranspose", inputs, ["t0"], group=group, strides=[1, 2])
    return shapes, node, [2, wide, 4, 4]


@st.composite
def matmuls(draw: st.DrawFn) -> Layer:
    leading = draw(st.sampled_from([[4], [2], [2, 4], [3, 2]]))
    shapes = {"x": [*leading, 3], "w": [3, 4]}
    return shapes, helper.make_node("MatMul", ["x", "w"], ["t0"]), [*leading, 4]


@st.composite
def gemms(draw: st.DrawFn) -> Layer:
    rows, columns = draw(st.sampled_from([2, 4])), draw(st.sampled_from([1, 4]))
    a, b = draw(st.booleans()), draw(st.booleans())
    shapes = {"x": [3, rows] if a else [rows, 3], "w": [columns, 3] if b else [3, columns]}
    bias = [[], [1], [columns], [1, columns], [rows, 1], [rows, columns], None]
    dims = draw(st.sampled_from(bias))
    if dims is not None:
        shapes["b"] = dims
    inputs = [name for name in ("x", "w", "b") if name in shapes]
    factors = {name: draw(st.sampled_from([1.0, 0.5])) for name in ("alpha", "beta")}
    node = helper.make_node("Gemm", inputs, ["t0"], transA=int(a), transB=int(b), **factors)
    return shapes, node, [rows, columns]


@settings(max_examples=RANDOM_GRAPHS)
@given(model=graphs())
def test_random_graphs(model: Model) -> None:
    outcome = apply(model, FOLD)
    assert_same_numbers(outcome.model, model)
    assert len(outcome.proto.graph.node) <= len(model.proto.graph.node)
    apply(model, FOLD, judge=lambda model, edit, free: Judgement(False, "does not pay"))


@pytest.mark.parametrize(("dtype", "size"), [("float16", 1e-4), ("float", 1e-25)])
def test_folding_that_would_round_a_whole_channel_away(dtype: str, size: float) -> None:
    text = """
    g (float[N,8,6,6] x) => (float[N,8,4,4] y) <float[8,8,3,3] w, float[1,8,1,1] s>
    { t = Conv(x, w)
      y = Mul(t, s) }
    """.replace("float", dtype)
    rng = np.random.default_rng(0)
    weights = {"w": size * rng.normal(size=(8, 8, 3, 3)), "s": np.full((1, 8, 1, 1), size)}
    kind = "float16" if dtype == "float16" else "float32"
    model = parse(text, weights)
    assert_skipped(model, FoldAffine(), f"the folded weight would be too small for {kind}")
