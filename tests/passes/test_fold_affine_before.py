"""fold-affine-before: what folds forward, how exactly, and what stays for which reason."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import (
    ASSETS,
    RANDOM_GRAPHS,
    Outcome,
    apply,
    assert_pass,
    assert_same_numbers,
    assert_skipped,
    checked,
    needs_assets,
    parse,
    random_weight,
    run,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pwopt.editing import Edit
from pwopt.model import Model
from pwopt.passes.fold_affine_before import FoldAffineBefore
from pwopt.rewriting import Context, Judgement

Array = npt.NDArray[Any]

FOLD = FoldAffineBefore()


HEADER = "conv (float[N,4,7,7] x) => (float[N,6,5,5] y)"

PARAMETERS = "float[4] gamma, float[4] beta, float[4] mean, float[4] var"

BN = "t = BatchNormalization(x, gamma, beta, mean, var)"

SHIFT_FREE = "float[4] gamma, float[4] beta = {0,0,0,0}, float[4] mean = {0,0,0,0}, float[4] var"


def folded(model: Model | str, *, rtol: float = 1e-4) -> Outcome:
    """Apply the pass; assert that it folded something and that the numbers stay."""
    model = parse(model) if isinstance(model, str) else model
    outcome = apply(model, FOLD)
    assert outcome.rewrote
    assert_same_numbers(outcome.model, model, rtol)
    return outcome


def refuse(model: Model, edit: Edit, *, free: bool) -> Judgement:
    return Judgement(False, "does not pay")


# -- into a Conv ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["", ", b"])
def test_batch_normalization(bias: str) -> None:
    before = f"""
    {HEADER} <float[6,4,3,3] w, float[6] b, {PARAMETERS}>
    {{ {BN}  y = Conv<strides=[1,1]>(t, w{bias}) }}
    """
    if not bias:
        before = before.replace("float[6] b, ", "")
    name = "b" if bias else "y.bias"
    after = (
        f"{HEADER} <float[6,4,3,3] w, float[6] {name}> {{ y = Conv<strides=[1,1]>(x, w, {name}) }}"
    )
    outcome = assert_pass(before, FOLD, after)
    assert [(e.where, e.reason) for e in outcome.events] == [("t", "BatchNormalization folded")]


@pytest.mark.parametrize("operands", ["x, s", "s, x"])
@pytest.mark.parametrize("shape", ["", "1", "4,1,1", "1,4,1,1", "1,1,1,1"])
@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Div"])
def test_arithmetic(op: str, shape: str, operands: str) -> None:
    operand = f"float[{shape}]" if shape else "float"
    before = f"{HEADER} <float[6,4,3,3] w, {operand} s> {{ t = {op}({operands})  y = Conv(t, w) }}"
    if (op, operands) == ("Div", "s, x"):
        assert_skipped(before, FOLD, "Div divides by what is not constant", "t")
        return
    bias = ("", "") if op in ("Mul", "Div") else (", float[6] y.bias", ", y.bias")
    after = f"{HEADER} <float[6,4,3,3] w{bias[0]}> {{ y = Conv(x, w{bias[1]}) }}"
    assert_pass(before, FOLD, after)


@pytest.mark.parametrize("group", [2, 4])
def test_grouped_and_depthwise(group: int) -> None:
    outcome = folded(f"""
    conv (float[N,4,7,7] x) => (float[N,8,5,5] y)
    <float[8,{4 // group},3,3] w, float[8] b, {PARAMETERS}>
    {{ {BN}  y = Conv<group={group}>(t, w, b) }}
    """)
    assert len(outcome.proto.graph.node) == 1


@pytest.mark.parametrize(("size", "kernel"), [("9", "3"), ("5,6,4", "3,3,2")])
def test_one_and_three_dimensions(size: str, kernel: str) -> None:
    ones = ",".join("1" for _ in size.split(","))
    outcome = folded(f"""
    conv (float[N,4,{size}] x) => (float[] y)
    <float[6,4,{kernel}] w, float[4,{ones}] s, {PARAMETERS}>
    {{ u = Add(x, s)  {BN.replace("x", "u")}  y = Conv(t, w) }}
    """)
    assert outcome.rewrote == ["t", "u"]


def test_a_chain_folds_one_by_one() -> None:
    before = f"""
    {HEADER} <float[6,4,3,3] w, float m, float[4,1,1] d, {PARAMETERS}>
    {{ u = Sub(x, m)  v = Div(u, d)  {BN.replace("x", "v")}  y = Conv(t, w) }}
    """
    after = f"{HEADER} <float[6,4,3,3] w, float[6] y.bias> {{ y = Conv(x, w, y.bias) }}"
    assert assert_pass(before, FOLD, after).rewrote == ["t", "v", "u"]


@pytest.mark.parametrize("attributes", ["pads=[1,0,0,1]", 'auto_pad="SAME_UPPER"'])
def test_a_scale_alone_goes_into_a_padded_conv(attributes: str) -> None:
    outcome = folded(f"""
    conv (float[N,4,7,7] x) => (float[] y) <float[6,4,3,3] w, float[6] b, {SHIFT_FREE}>
    {{ {BN}  y = Conv<{attributes}>(t, w, b) }}
    """)
    assert outcome.proto.graph.node[0].input == ["x", "w", "b"]


@pytest.mark.parametrize("attributes", ["pads=[0,0,0,1]", 'auto_pad="SAME_UPPER"'])
def test_a_shift_does_not_go_into_a_padded_conv(attributes: str) -> None:
    text = f"""
    conv (float[N,4,7,7] x) => (float[] y) <float[6,4,3,3] w, {PARAMETERS}>
    {{ {BN}  y = Conv<{attributes}>(t, w) }}
    """
    assert_skipped(text, FOLD, "the Conv's padding would have to hold the shift", "t")


@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [("3,3", 'auto_pad="VALID"'), ("3,3", 'auto_pad="NOTSET"'), ("1,1", 'auto_pad="SAME_LOWER"')],
)
def test_auto_pad_without_padding(kernel: str, attributes: str) -> None:
    folded(f"""
    conv (float[N,4,7,7] x) => (float[] y) <float[6,4,{kernel}] w, {PARAMETERS}>
    {{ {BN}  y = Conv<{attributes}, strides=[2,2]>(t, w) }}
    """)


def test_into_all_readers() -> None:
    before = f"""
    conv (float[N,4,7,7] x) => (float[] y, float[] z)
    <float[6,4,3,3] w, float[6] b, float[2,4,1,1] v, {PARAMETERS}>
    {{ {BN}  y = Conv(t, w, b)  z = Conv<strides=[2,2]>(t, v) }}
    """
    after = """
    conv (float[N,4,7,7] x) => (float[] y, float[] z)
    <float[6,4,3,3] w, float[6] b, float[2,4,1,1] v, float[2] z.bias>
    { y = Conv(x, w, b)  z = Conv<strides=[2,2]>(x, v, z.bias) }
    """
    assert_pass(before, FOLD, after)


def test_readers_that_share_a_weight_go_on_sharing() -> None:
    outcome = folded(f"""
    conv (float[N,4,7,7] x) => (float[] y, float[] z, float[] a)
    <float[6,4,3,3] w, {PARAMETERS}>
    {{ {BN}  y = Conv(t, w)  z = Conv<strides=[2,2]>(t, w)  a = Conv(x, w) }}
    """)
    first, second, third = outcome.proto.graph.node
    assert first.input[1] == second.input[1] == "y.weight"
    assert third.input[1] == "w"


@pytest.mark.parametrize(("kind", "rtol"), [("float16", 2e-2), ("double", 1e-12)])
def test_other_types(kind: str, rtol: float) -> None:
    text = f"{HEADER} <float[6,4,3,3] w, float[6] b, {PARAMETERS}> {{ {BN}  y = Conv(t, w, b) }}"
    outcome = folded(text.replace("float[", f"{kind}["), rtol=rtol)
    kinds = {v.dtype.name for v in values(outcome.proto).values()}
    assert kinds == {kind.replace("double", "float64")}


# -- past pools, into Gemm and MatMul ---------------------------------------------------------

POOLED = f"""
pool (float[N,4,7,7] x) => (float[] y) <float[6,4,2,2] w, float[6] b, {PARAMETERS}>
{{ {BN}  u = POOL(t)  y = Conv(u, w, b) }}
"""

POSITIVE = {"gamma": np.array([0.5, 1, 2, 0.1])}

NEGATIVE = {"gamma": np.array([0.5, 1, -2, 0.1])}


@pytest.mark.parametrize(
    "pool",
    [
        "MaxPool<kernel_shape=[2,2], strides=[2,2]>",
        "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1], ceil_mode=1, strides=[2,2]>",
        "MaxPool<kernel_shape=[2,2], dilations=[2,2]>",
        "AveragePool<kernel_shape=[3,3], pads=[1,0,1,2]>",
        "AveragePool<kernel_shape=[3,3], count_include_pad=1>",
        'AveragePool<kernel_shape=[3,3], auto_pad="SAME_UPPER">',
    ],
)
def test_pools(pool: str) -> None:
    outcome = folded(parse(POOLED.replace("POOL", pool), POSITIVE))
    assert [node.op_type for node in outcome.proto.graph.node] == [pool.split("<")[0], "Conv"]


def test_a_mean_takes_any_scale() -> None:
    folded(parse(POOLED.replace("POOL", "AveragePool<kernel_shape=[3,3]>"), NEGATIVE))


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (
            "AveragePool<kernel_shape=[3,3], pads=[1,0,1,2], count_include_pad=1>",
            "AveragePool's padding counts, and would have to hold the shift",
        ),
        (
            'AveragePool<kernel_shape=[3,3], auto_pad="SAME_UPPER", count_include_pad=1>',
            "AveragePool's padding counts, and would have to hold the shift",
        ),
        (
            "AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>",
            "AveragePool in ceil_mode may count what lies beyond its input",
        ),
        (
            "MaxPool<kernel_shape=[2,2], dilations=[3,3], pads=[1,1,1,1]>",
            "windows of a dilated and padded MaxPool may hold nothing but padding",
        ),
    ],
)
def test_pools_that_stop_it(pool: str, reason: str) -> None:
    assert_skipped(parse(POOLED.replace("POOL", pool), POSITIVE), FOLD, reason, "t")


@pytest.mark.parametrize("pool", ["MaxPool<kernel_shape=[2,2]>", "GlobalMaxPool"])
def test_a_negative_scale_stops_at_a_maximum(pool: str) -> None:
    model = parse(
        POOLED.replace("POOL", pool).replace("w,", "w,").replace("2,2] w", "1,1] w"), NEGATIVE
    )
    op = pool.split("<")[0]
    reason = f"{op} would take the minimum where the scale is negative"
    assert_skipped(model, FOLD, reason, "t")


def test_a_padded_mean_that_counts_takes_a_scale() -> None:
    text = POOLED.replace(PARAMETERS, SHIFT_FREE)
    pool = "AveragePool<kernel_shape=[3,3], pads=[1,0,1,2], count_include_pad=1, ceil_mode=1>"
    folded(text.replace("POOL", pool))


def test_the_indices_of_a_maximum() -> None:
    text = f"""
    pool (float[N,4,7,7] x) => (float[] y, int64[] i) <float[6,4,2,2] w, {PARAMETERS}>
    {{ {BN}  u, i = MaxPool<kernel_shape=[2,2]>(t)  y = Conv(u, w) }}
    """
    assert apply(parse(text), FOLD).rewrote == []


@pytest.mark.parametrize("flatten", ["Flatten(u)", "Flatten<axis=1>(u)", "Reshape(u, rows)"])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("rows", ["0, -1", "0, 16", "-1, 16"])
def test_gemm(flatten: str, trans_b: int, rows: str) -> None:
    weight = "6,16" if trans_b else "16,6"
    outcome = folded(f"""
    gemm (float[N,4,4,4] x) => (float[] y)
    <float[{weight}] w, float[1,6] b, int64[2] rows = {{{rows}}}, {PARAMETERS}>
    {{
      {BN}
      u = AveragePool<kernel_shape=[2,2], strides=[2,2]>(t)
      v = {flatten}
      y = Gemm<transB={trans_b}, alpha=0.5, beta=2.0>(v, w, b)
    }}
    """)
    assert "BatchNormalization" not in {node.op_type for node in outcome.proto.graph.node}


@pytest.mark.parametrize("layer", ["Gemm<beta=2.0>(v, w, b)", "MatMul(v, w)"])
def test_a_scale_leaves_the_bias_alone(layer: str) -> None:
    bias = ", float[6] b" if "Gemm" in layer else ""
    outcome = folded(f"""
    gemm (float[N,4,2,2] x) => (float[] y) <float[16,6] w{bias}, {SHIFT_FREE}>
    {{ {BN}  v = Flatten(t)  y = {layer} }}
    """)
    assert list(outcome.proto.graph.node[-1].input)[1:] == ["w", *(["b"] if bias else [])]


def test_rows() -> None:
    folded(
        f"gemm (float[N,4] x) => (float[] y) <float[4,6] w, {PARAMETERS}> {{ {BN} y = Gemm(t, w) }}"
    )


def test_matmul_has_no_bias() -> None:
    text = (
        f"m (float[N,4] x) => (float[] y) <float[4,6] w, {PARAMETERS}> {{ {BN}  y = MatMul(t, w) }}"
    )
    assert_skipped(text, FOLD, "MatMul has no bias to take the shift", "t")


def test_a_matmul_of_more_axes_is_no_site() -> None:
    text = "m (float[N,4,4] x) => (float[] y) <float[4,6] w, float[4,1] s>"
    assert apply(parse(text + "{ t = Mul(x, s)  y = MatMul(t, w) }"), FOLD).events == []


def test_reshapes_that_are_no_rows() -> None:
    text = f"""
    gemm (float[N,4,H,4] x) => (float[] y)
    <float[16,6] w, int64[2] rows = {{-1, 16}}, {PARAMETERS}>
    {{ {BN}  v = Reshape(t, rows)  y = Gemm(v, w) }}
    """
    assert apply(parse(text), FOLD).events == []


def test_rows_of_what_has_no_known_shape() -> None:
    proto = parse(
        f"gemm (float[N,4,2,2] x) => (float[] y)"
        f"<float[16,6] w, int64[2] rows = {{-1, 16}}, {PARAMETERS}>"
        "{ a = Relu(x)  t = BatchNormalization(a, gamma, beta, mean, var)"
        "  v = Reshape(t, rows)  y = Gemm(v, w) }"
    ).proto
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.add(domain="com.example", version=1)
    assert list(FOLD.apply(Model(proto), Context())) == []


def test_through_identity_and_dropout() -> None:
    before = f"""
    {HEADER} <float[6,4,3,3] w, float ratio = {{0.5}}, bool training = {{0}}, {PARAMETERS}>
    {{ {BN}  u = Identity(t)  v = Dropout(u, ratio, training)  y = Conv(v, w) }}
    """
    outcome = folded(before)
    assert [node.op_type for node in outcome.proto.graph.node] == ["Identity", "Dropout", "Conv"]


# -- what is left alone -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["7", "7,1", "4,7,1", "4,1,7", "3,1,1,1", "1,4,7,7", "4,4,1,1"])
def test_what_varies_along_other_axes(shape: str) -> None:
    text = f"""
    conv (float[N,4,7,7] x) => (float[] y) <float[6,4,3,3] w, float[{shape}] s>
    {{ t = Mul(x, s)  y = Conv(t, w) }}
    """.replace("N", shape[0] if shape.count(",") == 3 else "2")
    reason = "the operand of Mul varies along more than the channels"
    assert_skipped(text, FOLD, reason, "t")


@pytest.mark.parametrize("shape", ["4,1,1", "1,1,4,1,1"])
def test_what_broadcasts_the_input(shape: str) -> None:
    layer = "w" if shape == "4,1,1" else "w3"
    text = f"""
    conv (float[1,1,7,7] x) => (float[] y) <float[6,4,3,3] w, float[{shape}] s>
    {{ t = Mul(x, s)  y = Conv(t, w) }}
    """
    if layer == "w3":
        text = text.replace("6,4,3,3", "6,1,1,3,3")
    reason = "the operand of Mul varies along more than the channels"
    assert_skipped(text, FOLD, reason, "t")


def test_open_channels() -> None:
    text = """
    conv (float[N,C,7,7] x) => (float[] y) <float[6,4,3,3] w, float[4,1,1] s>
    { t = Mul(x, s)  y = Conv(t, w) }
    """
    assert_skipped(text, FOLD, "the channels of its input are not known", "t")


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (f"{BN}  y = Conv(t, w)  z = Relu(t)", "Relu reads its output too"),
        (f"{BN}  y = Conv(t, w)  z = Identity(t)", "its output is an output of the model"),
        (
            f"{BN}  y = Conv(t, w)  z = Conv<pads=[1,1,1,1]>(t, w)",
            "the Conv's padding would have to hold the shift",
        ),
        (f"{BN}  y = Conv(t, w)  z = Add(x, t)", "Add reads its output not as its first input"),
    ],
)
def test_other_readers(nodes: str, reason: str) -> None:
    text = f"""
    conv (float[N,4,7,7] x) => (float[] y, float[] z) <float[6,4,3,3] w, {PARAMETERS}> {{ {nodes} }}
    """
    assert_skipped(text, FOLD, reason, "t")


def test_an_output_in_the_middle() -> None:
    text = f"""
    conv (float[N,4,7,7] x) => (float[] y, float[] t) <float[6,4,3,3] w, {PARAMETERS}>
    {{ {BN}  y = Conv(t, w) }}
    """
    assert_skipped(text, FOLD, "its output is an output of the model", "t")


def test_a_subgraph_that_reads_the_output() -> None:
    text = f"""
    conv (float[N,4,7,7] x, bool c) => (float[] y, float[] z) <float[6,4,3,3] w, {PARAMETERS}>
    {{
      {BN}
      y = Conv(t, w)
      z = If(c) <
        then_branch = yes () => (float[] one) {{ one = Conv(t, w) }},
        else_branch = no () => (float[] two) {{ two = Relu(t) }}
      >
    }}
    """
    assert_skipped(text, FOLD, "its output is read in a subgraph", "t")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("w", "the Conv's weight is not a constant"),
        ("b", "the Conv's bias is not a constant"),
        ("mean", "BatchNormalization's parameters are not constant"),
        ("gamma", "BatchNormalization's parameters are not constant"),
    ],
)
def test_constants_that_the_caller_may_override(name: str, reason: str) -> None:
    model = parse(
        f"{HEADER} <float[6,4,3,3] w, float[6] b, {PARAMETERS}> {{ {BN}  y = Conv(t, w, b) }}"
    )
    (tensor,) = (t for t in model.proto.graph.initializer if t.name == name)
    info = helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
    model.proto.graph.input.append(info)
    assert_skipped(model, FOLD, reason, "t")


def test_a_gemm_that_transposes_its_input() -> None:
    text = f"""
    gemm (float[4,4] x) => (float[] y) <float[4,6] w, {PARAMETERS}>
    {{ {BN}  y = Gemm<transA=1>(t, w) }}
    """
    assert_skipped(text, FOLD, "the Gemm transposes its input", "t")


def test_a_bias_that_differs_from_row_to_row() -> None:
    text = f"""
    gemm (float[3,4] x) => (float[] y) <float[4,6] w, float[3,6] b, {PARAMETERS}>
    {{ {BN}  y = Gemm(t, w, b) }}
    """
    assert_skipped(text, FOLD, "the Gemm's bias differs from row to row", "t")


@pytest.mark.parametrize("opset", [6, 14])
def test_training(opset: int) -> None:
    attributes = "<training_mode=1>" if opset == 14 else ""
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
    conv (float[N,4,7,7] x) => (float[N,6,5,5] y) <float[6,4,3,3] w, {PARAMETERS}>
    {{ {BN.replace("(", attributes + "(")}  y = Conv(t, w) }}
    """
    if opset == 14:
        text = text.replace("t = ", "t, m, v = ")
    assert_skipped(text, FOLD, "BatchNormalization is in training mode", "t")


def test_before_opset_7_arithmetic_stays() -> None:
    text = """<ir_version: 7, opset_import: ["" : 6]>
    conv (float[N,4,7,7] x) => (float[N,6,5,5] y) <float[6,4,3,3] w, float[4] s>
    { t = Mul<broadcast=1, axis=1>(x, s)  y = Conv(t, w) }
    """
    reason = "before opset 7, operands are broadcast by other rules"
    assert_skipped(text, FOLD, reason, "t")


@pytest.mark.parametrize(
    ("name", "value", "what"), [("w", 1e38, "weight"), ("b", np.inf, "bias"), ("var", -1, "weight")]
)
def test_what_would_not_be_finite(name: str, value: float, what: str) -> None:
    text = f"{HEADER} <float[6,4,3,3] w, float[6] b, {PARAMETERS}> {{ {BN}  y = Conv(t, w, b) }}"
    weights = {
        "w": {"w": np.full((6, 4, 3, 3), value), "gamma": np.full(4, 1e5)},
        "b": {"b": np.full(6, value)},
        "var": {"var": np.full(4, value)},
    }[name]
    reason = f"the folded {what} would not be finite in float32"
    assert_skipped(parse(text, weights), FOLD, reason, "t")


@pytest.mark.parametrize(
    "nodes", ["t = Mul(x, s)  y = Relu(t)", "t = Mul(x, x)  y = Conv(t, w)", "y = Conv(x, w)"]
)
def test_no_sites(nodes: str) -> None:
    text = f"conv (float[N,4,7,7] x) => (float[] y) <float[6,4,3,3] w, float s> {{ {nodes} }}"
    assert apply(parse(text), FOLD).events == []


def test_what_the_judge_refuses_stays() -> None:
    text = POOLED.replace("POOL", "AveragePool<kernel_shape=[2,2]>")
    assert apply(parse(text), FOLD, judge=refuse).reasons == {"t": "does not pay"}


# -- a pretrained network ---------------------------------------------------------------------


@needs_assets
def test_smallvgg() -> None:
    model = Model.load(ASSETS / "models" / "smallvgg_cifar10.onnx")
    outcome = apply(model, FOLD)
    assert "BatchNormalization" not in {node.op_type for node in outcome.proto.graph.node}
    with np.load(ASSETS / "data" / "cifar10_val.npz") as data:
        images = data["images"][:500].transpose(0, 3, 1, 2).astype(np.float32)
    (ours,), (theirs,) = (run(each, {"input": images}) for each in (outcome.model, model))
    assert np.array_equal(ours.argmax(1), theirs.argmax(1))


# -- random graphs ----------------------------------------------------------------------------

POOLS: dict[str, list[dict[str, Any]]] = {
    "MaxPool": [{}, {"pads": [1, 0, 1, 1]}, {"strides": [2, 2], "ceil_mode": 1}],
    "AveragePool": [
        {},
        {"pads": [1, 0, 1, 1]},
        {"pads": [1, 0, 1, 1], "count_include_pad": 1},
        {"strides": [2, 2], "ceil_mode": 1},
    ],
}


@st.composite
def graphs(draw: st.DrawFn) -> Model:
    """Draw arithmetic, pools and the like in a row, and one or two layers at the end."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    weights: dict[str, Array] = {}
    nodes, outputs, tensor, side = [], [], "x", 6

    def step(op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"t{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    for i in range(draw(st.integers(1, 4))):
        op = draw(
            st.sampled_from(
                [
                    "BatchNormalization",
                    "Mul",
                    "Add",
                    "Sub",
                    "Div",
                    "MaxPool",
                    "AveragePool",
                    "Identity",
                ]
            )
        )
        if op in POOLS:
            if side < 6:
                continue
            attributes = draw(st.sampled_from(POOLS[op]))
            tensor, side = step(op, [tensor], kernel_shape=[2, 2], **attributes), 5
        elif op == "Identity":
            tensor = step(op, [tensor])
        elif op == "BatchNormalization":
            operands = [f"{name}{i}" for name in ("gamma", "beta", "mean", "var")]
            weights |= {name: random_weight(rng, name, [4]) for name in operands}
            if draw(st.booleans()):
                weights[f"gamma{i}"] = np.abs(weights[f"gamma{i}"])
            if draw(st.booleans()):
                weights |= {name: np.zeros(4) for name in operands[1:3]}
            tensor = step(op, [tensor, *operands])
        else:
            shape = draw(st.sampled_from([[], [1], [4, 1, 1], [4, 1, 1], [1, 4, 1, 1], [1, 1]]))
            weights[f"s{i}"] = rng.uniform(0.5, 2.0, shape)
            tensor = step(op, draw(st.permutations([tensor, f"s{i}"])))
        if draw(st.integers(0, 5)) == 0:
            outputs.append(draw(st.sampled_from([tensor, step("Relu", [tensor])])))
    for i in range(draw(st.integers(1, 2))):
        bias = [f"b{i}"] if draw(st.booleans()) else []
        if draw(st.booleans()):
            group = draw(st.sampled_from([1, 2]))
            weights |= {f"w{i}": random_weight(rng, "w", [2, 4 // group, 2, 2])}
            pads = draw(st.sampled_from([[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]))
            outputs.append(step("Conv", [tensor, f"w{i}", *bias], pads=pads, group=group))
        else:
            trans = draw(st.integers(0, 1))
            mean = step("AveragePool", [tensor], kernel_shape=[2, 2], strides=[3, 3])
            rows = step("Flatten", [mean])
            size = 4 * _pooled_size(nodes, weights, mean)
            shape = [2, size] if trans else [size, 2]
            weights[f"w{i}"] = rng.standard_normal(shape) / 4
            outputs.append(step("Gemm", [rows, f"w{i}", *bias], transB=trans, alpha=0.5, beta=2.0))
        if bias:
            weights[bias[0]] = rng.standard_normal(2)
    return _model(nodes, weights, outputs)


def _pooled_size(nodes: list[Any], weights: dict[str, Array], name: str) -> int:
    """Height × width of a tensor so far."""
    info = _model(nodes, weights, [name]).proto.graph.output[0]
    return int(np.prod([dim.dim_value for dim in info.type.tensor_type.shape.dim[2:]]))


def _model(nodes: list[Any], weights: dict[str, Array], outputs: list[str]) -> Model:
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6, 6])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in dict.fromkeys(outputs)],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return checked(helper.make_model(graph, opset_imports=opsets, ir_version=8))


@settings(max_examples=RANDOM_GRAPHS)
@given(model=graphs())
def test_random_graphs(model: Model) -> None:
    outcome = apply(model, FOLD)
    assert_same_numbers(outcome.model, model)
    apply(model, FOLD, judge=refuse)
